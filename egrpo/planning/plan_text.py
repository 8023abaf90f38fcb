"""``egrpo plan`` at the command line: a plan from numbers, or from the profile of any model."""

from __future__ import annotations

import json
import math
from pathlib import Path

from egrpo.core.entropy import MEASURES
from egrpo.core.noise import DETERMINISTIC, STD
from egrpo.core.plan import Plan, make_plan
from egrpo.core.schedule import shifted_sigmas, stock_end
from egrpo.core.spread import choose_threshold
from egrpo.errors import UserError, say


def plan_text(
    *,
    steps: int,
    shift: float,
    end: str,
    noise_level: float,
    threshold: str,
    active: int,
    measure: str,
    dynamics: str,
    on_unreachable: str,
    as_json: bool,
    profile: Path | None,
    rewards: str,
    factor: float,
) -> str:
    """The plan as a table, or as one JSON object.

    With a ``profile`` its grid, dynamics and noise level take the place of the options. Raises
    UserError naming the option that is out of range.
    """
    if active < 1:
        raise UserError(f"--active: at least 1 step must branch, got {active}")
    if measure not in MEASURES:
        raise UserError(f"--measure: {measure!r}; choose {', '.join(MEASURES)}")
    if profile is not None:
        from egrpo.planning.plan import grid_of

        sigmas, dynamics, noise_level = grid_of(profile)
    else:
        _check(shift, noise_level, dynamics)
        last = stock_end(shift, dynamic=False) if end == "stock" else None
    tau = _threshold(threshold, profile, rewards, measure, factor)
    if dynamics == "cps" and tau != 0:
        raise UserError(
            "--threshold: must be 0 with cps, whose entropy falls as a step gets longer"
        )
    try:
        made = make_plan(
            sigmas if profile is not None else shifted_sigmas(steps, shift, end=last),
            range(active),
            threshold=tau,
            noise_level=noise_level,
            dynamics=dynamics,
            measure=measure,
            on_unreachable=on_unreachable,
        )
    except ValueError as error:
        raise UserError(f"egrpo plan: {error}") from None
    for warning in made.warnings:
        say(f"egrpo: warning: {warning}")
    return json.dumps(made.to_dict()) if as_json else _table(made)


def _check(shift: float, noise_level: float, dynamics: str) -> None:
    if dynamics not in STD or dynamics in DETERMINISTIC:
        raise UserError(f"--dynamics: {dynamics!r}; choose flow_sde, dance_sde or cps")
    if not 0 < noise_level <= (1 if dynamics == "cps" else 5):
        raise UserError(
            f"--noise-level: must be positive and at most 5 (cps: 1), got {noise_level}"
        )
    if not 1e-3 <= shift <= 1e3:
        raise UserError(f"--shift: must lie between 0.001 and 1000, got {shift}")


def _threshold(text: str, profile: Path | None, rewards: str, measure: str, factor: float) -> float:
    if text != "auto":
        try:
            tau = float(text)
        except ValueError:
            raise UserError(f"--threshold: a number or auto is needed, got {text!r}") from None
        if not math.isfinite(tau):
            raise UserError(f"--threshold: must be a finite number, got {text}")
        return tau
    if profile is None:
        raise UserError(
            "--threshold: auto needs --profile, the entropy_profile.parquet of a model; "
            "`snakemake --cores all plans` measures it, without training anything"
        )
    from egrpo.planning.plan import measured_spread
    from egrpo.store.tables import ENTROPY_PROFILE, read_table

    quantities = read_table(profile, ENTROPY_PROFILE)["quantity"].unique().to_pylist()
    there = [q.removeprefix("reward:") for q in quantities if q.startswith("reward:")]
    wanted = [name.strip() for name in rewards.split(",") if name.strip()] or there
    for name in wanted:
        if name not in there:
            raise UserError(f"--rewards: {profile} has no {name!r}; it has {', '.join(there)}")
    try:
        choice = choose_threshold(
            measured_spread(profile, dict.fromkeys(wanted, 1.0)), measure, factor
        )
    except ValueError as error:
        raise UserError(f"{profile}: {error}") from None
    return choice.threshold


def _table(plan: Plan) -> str:
    lines = [
        f"threshold {plan.threshold:g} [{plan.measure}]",
        f"{'step':>4} {'span':>4} {'sigma':>14} {'alone':>8} {'merged':>8}",
    ]
    for i, span, merged in zip(plan.active, plan.spans, plan.merged_entropy, strict=True):
        sigma = f"{plan.sigmas[i]:.3f}->{plan.sigmas[i + span]:.3f}"
        lines.append(f"{i:>4} {span:>4} {sigma:>14} {plan.entropy[i]:>8.4f} {merged:>8.4f}")
    lines.append(" ".join(f"{name}: {count}" for name, count in plan.nfe().items()))
    return "\n".join(lines)
