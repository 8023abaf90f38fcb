"""The merge plan: for each active step, how many grid intervals its SDE step covers.

A plan is data: small, diffable JSON. Making one needs no torch.
Source: E-GRPO (arXiv 2601.00423); Table 4 for the thresholds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from egrpo.core.entropy import MEASURES, profile, step_entropy
from egrpo.core.noise import STD
from egrpo.core.schedule import Sigmas, check_sigmas

POLICIES = ("cap", "drop", "error")
"""What to do with a step whose threshold is out of reach: take the longest span that does not
land on sigma = 0 (``cap``), leave the step out (``drop``), or refuse (``error``)."""


@dataclass(frozen=True)
class Plan:
    """Active steps and their spans over one sigma grid.

    Attributes:
        sigmas: the grid, T + 1 floats from 1 to 0.
        entropy: closed-form entropy of the single steps 0..T-2 in ``measure``.
        active: grid indices that branch, ascending.
        spans: intervals merged at each active step, same length as ``active``.
        threshold: tau, in ``measure``; 0 means no merging; None for fixed spans.
        measure, dynamics, noise_level: what the entropy was computed for.
        warnings: one line for each step where the threshold was out of reach.
        samples: number of samples of each active step where they differ; None: the group size.
    """

    sigmas: Sigmas
    entropy: tuple[float, ...]
    active: tuple[int, ...]
    spans: tuple[int, ...]
    threshold: float | None
    measure: str
    dynamics: str
    noise_level: float
    warnings: tuple[str, ...] = ()
    samples: tuple[int, ...] | None = None

    @property
    def steps(self) -> int:
        """T, the number of grid intervals."""
        return len(self.sigmas) - 1

    def nfe(self) -> dict[str, int]:
        """Network evaluations for one prompt of the tree that E-GRPO grows from this plan.

        ``anchor``: evaluations along the anchor, shared with the branch points;
        ``suffix_per_sample``: ODE evaluations after the branches, for one sample per step;
        ``train``: forward+backward passes, one per active step.
        """
        suffix = sum(self.steps - i - span for i, span in zip(self.active, self.spans, strict=True))
        anchor = self.active[-1] + 1 if self.active else 0
        return {"anchor": anchor, "suffix_per_sample": suffix, "train": len(self.active)}

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, with ``nfe`` added for readers."""
        return {**asdict(self), "nfe": self.nfe()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Plan:
        """Read what :meth:`to_dict` wrote.

        Raises:
            ValueError: if a field is missing or does not fit the grid.
        """
        try:
            plan = cls(
                sigmas=check_sigmas(data["sigmas"]),
                entropy=tuple(data["entropy"]),
                active=tuple(data["active"]),
                spans=tuple(data["spans"]),
                threshold=data["threshold"],
                measure=data["measure"],
                dynamics=data["dynamics"],
                noise_level=data["noise_level"],
                warnings=tuple(data.get("warnings", ())),
                samples=None if data.get("samples") is None else tuple(data["samples"]),
            )
        except KeyError as error:
            raise ValueError(f"plan has no key {error}") from None
        except TypeError as error:
            raise ValueError(f"plan holds a value of the wrong type: {error}") from None
        if not all(type(n) is int for n in (*plan.active, *plan.spans, *(plan.samples or ()))):
            raise ValueError("plan: active, spans and samples must be whole numbers")
        if min(plan.samples or (2,)) < 2:
            raise ValueError("plan: samples must be at least 2 for each step")
        level, tau = plan.noise_level, plan.threshold
        if not all(_is_finite(n) for n in (*plan.entropy, level, 0.0 if tau is None else tau)):
            raise ValueError("plan: entropy, noise_level and threshold must be finite numbers")
        if not all(isinstance(line, str) for line in plan.warnings):
            raise ValueError("plan: warnings must be text")
        if plan.samples is not None and len(plan.samples) != len(plan.active):
            raise ValueError(f"plan: {len(plan.samples)} samples for {len(plan.active)} steps")
        check_spans(plan.steps, plan.active, plan.spans)
        if len(plan.entropy) != plan.steps - 1:
            raise ValueError(
                f"plan has {len(plan.entropy)} entropy values for {plan.steps} steps; "
                f"{plan.steps - 1} are needed"
            )
        if plan.dynamics not in STD or plan.measure not in MEASURES:
            raise ValueError(
                f"plan: unknown dynamics {plan.dynamics!r} or measure {plan.measure!r}"
            )
        return plan


def _is_finite(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]


def check_spans(steps: int, active: Sequence[int], spans: Sequence[int]) -> None:
    """Raise ValueError unless each active step and its end lie on the grid before sigma = 0."""
    if len(active) != len(spans):
        raise ValueError(f"{len(active)} active steps but {len(spans)} spans")
    if list(active) != sorted(set(active)):
        raise ValueError(f"active steps must be distinct and ascending, got {list(active)}")
    for i, span in zip(active, spans, strict=True):
        if not 0 <= i < steps - 1:
            raise ValueError(
                f"active step {i} lies beyond the schedule: {steps} steps allow 0..{steps - 2}, "
                "because an SDE step must not land on sigma = 0"
            )
        if span < 1 or i + span >= steps:
            raise ValueError(f"span {span} at step {i} must be 1..{steps - 1 - i}")


def least_span(
    sigmas: Sigmas, start: int, threshold: float, *, noise_level: float, dynamics: str, measure: str
) -> int | None:
    """Least span whose entropy reaches ``threshold``; None if none does before sigma = 0."""
    if threshold == 0:
        return 1  # tau = 0 means no merging, in every measure (nats can be negative)
    for span in range(1, len(sigmas) - 1 - start):
        entropy = step_entropy(
            sigmas, start, span, noise_level=noise_level, dynamics=dynamics, measure=measure
        )
        if entropy >= threshold:
            return span
    return None


def make_plan(
    sigmas: Sequence[float],
    active: Sequence[int],
    *,
    threshold: float | None = None,
    span: int | None = None,
    noise_level: float,
    dynamics: str = "flow_sde",
    measure: str = "exp_per_dim",
    on_unreachable: str = "cap",
) -> Plan:
    """Choose the span of every active step: by ``threshold``, or the fixed ``span``.

    Exactly one of ``threshold`` and ``span`` is given. A fixed span that would land on
    sigma = 0 follows ``on_unreachable`` too.

    Raises:
        ValueError: if an active step lies beyond the schedule, a name is unknown, or a step is
            out of reach and ``on_unreachable`` is ``error``.
    """
    grid = check_sigmas(sigmas)
    steps = len(grid) - 1
    if on_unreachable not in POLICIES:
        raise ValueError(
            f"on_unreachable must be one of {', '.join(POLICIES)}, got {on_unreachable!r}"
        )
    if (threshold is None) == (span is None):
        raise ValueError("give either a threshold or a fixed span")
    if span is not None and span < 1:
        raise ValueError(f"a fixed span must be at least 1, got {span}")
    check_spans(steps, active, [1] * len(active))
    kept: list[int] = []
    spans: list[int] = []
    warnings: list[str] = []
    for i in active:
        longest = steps - 1 - i
        if threshold is not None:
            chosen = least_span(
                grid, i, threshold, noise_level=noise_level, dynamics=dynamics, measure=measure
            )
            why = f"threshold {threshold} ({measure}) is out of reach"
        else:
            assert span is not None
            chosen = span if span <= longest else None
            why = f"span {span} would land on sigma = 0"
        if chosen is None:
            if on_unreachable == "error":
                raise ValueError(f"step {i}: {why}; the longest span is {longest}")
            action = f"span capped at {longest}" if on_unreachable == "cap" else "step left out"
            warnings.append(f"step {i}: {why}, {action}")
            if on_unreachable == "drop":
                continue
            chosen = longest
        kept.append(i)
        spans.append(chosen)
    if not kept:
        raise ValueError(
            f"no active step is left of {list(active)}: lower the threshold {threshold} or set "
            "on_unreachable to cap"
        )
    return Plan(
        sigmas=grid,
        entropy=tuple(profile(grid, noise_level=noise_level, dynamics=dynamics, measure=measure)),
        active=tuple(kept),
        spans=tuple(spans),
        threshold=threshold,
        measure=measure,
        dynamics=dynamics,
        noise_level=noise_level,
        warnings=tuple(warnings),
    )
