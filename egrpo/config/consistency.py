"""What settings of several sections must agree in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from egrpo.core.noise import DETERMINISTIC
from egrpo.core.schedule import check_sigmas

if TYPE_CHECKING:
    from egrpo.config.models import RunConfig


def problems(run: RunConfig) -> Iterator[str]:
    """Key and fault of what does not fit; where the first is refused, others are not asked for."""
    yield from _trained(run)
    yield from _grids(run)
    yield from _method(run)
    yield from _bounds(run)
    if run.profile.fp8_sampling and (run.model.dtype != "bfloat16" or run.model.fp8_weights):
        yield "profile.fp8_sampling: needs model.dtype: bfloat16 without model.fp8_weights"


def _trained(run: RunConfig) -> Iterator[str]:
    weights, spans = run.train.rewards, run.profile.spans
    if not weights:
        yield "train.rewards: at least one reward must be trained"
    for name in sorted(set(weights) - set(run.rewards)):
        known = ", ".join(sorted(run.rewards))
        yield f"train.rewards: {name!r} is not defined under rewards ({known})"
    for name, weight in weights.items():
        if weight == 0:
            yield f"train.rewards: {name!r} has weight 0 and trains nothing; null leaves it out"
    if min(spans) >= run.method.steps:  # the profile leaves longer ones out
        yield f"profile.spans: {min(spans)} does not fit {run.method.steps} steps"
    if run.method.reads_profile and 1 not in spans:
        yield "profile.spans: must hold 1 where the plan reads the profile"
    snapshots = run.train.snapshots
    if snapshots != sorted(set(snapshots)) or min(snapshots, default=1) < 1:
        yield "train.snapshots: distinct, ascending numbers of at least 1 are needed"


def _grids(run: RunConfig) -> Iterator[str]:
    for model, steps, stock in (
        (run.model, run.method.steps, run.method.stock_grid),
        (run.model, run.evaluate.steps, True),
        (run.evaluation_model, run.evaluate.steps, True),
    ):
        s = run.schedule
        try:
            check_sigmas(s.sigmas(model, steps, stock=stock))
        except (ValueError, ArithmeticError):
            yield (
                f"schedule: shift {s.shift} and terminal {s.terminal} leave no grid of {steps} "
                f"steps from 1 to 0, for images of {model.height} x {model.width} pixels"
            )


def _method(run: RunConfig) -> Iterator[str]:
    method, train = run.method, run.train
    if train.loss not in method.losses:
        yield (
            f"train.loss: {train.loss} is not for method {method.name}, whose trained edges allow "
            f"{' or '.join(method.losses)}"
        )
    if train.loss == "guarded" and method.dynamics == "cps":
        yield "train.loss: guarded needs a Gaussian log-probability; cps has none"
    if train.kl_weight > 0 and train.kl != "velocity" and method.dynamics in DETERMINISTIC:
        yield (
            f"train.kl: {train.kl} compares stochastic transitions, method {method.name} has none; "
            "set it to velocity"
        )
    for key in ("sample_average", "ema_ramp", "ema_weight"):
        if train.ema_decay is None and getattr(train, key):
            yield f"train.{key}: needs train.ema_decay"


def _bounds(run: RunConfig) -> Iterator[str]:
    bounds = run.train.bounds
    known = sorted({"diversity", "distance_to_base", *(f"reward/{name}" for name in run.rewards)})
    for name in sorted(set(bounds) - set(known)):
        yield f"train.bounds: no monitor {name!r}; there are {', '.join(known)}"
    if bounds and not run.train.monitor_every:
        yield "train.bounds: nothing is monitored; set train.monitor_every"
    if "distance_to_base" in bounds and bounds["distance_to_base"].collapse is not None:
        yield "train.bounds: distance_to_base begins at 0 and cannot collapse"
    if "diversity" in bounds and run.train.monitor_samples < 2:
        yield "train.bounds: diversity needs train.monitor_samples of at least 2"
