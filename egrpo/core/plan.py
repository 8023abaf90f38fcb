"""The merge plan: for each active step, how many grid intervals its SDE step covers.

A plan is data: small, diffable JSON. Making one needs no torch.
Source: E-GRPO (arXiv 2601.00423); Table 4 for the thresholds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from egrpo.core.entropy import MEASURES, step_entropy
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

    @property
    def merged_entropy(self) -> list[float]:
        """Entropy of each active step over its span, in ``measure``."""
        how: dict[str, Any] = {"dynamics": self.dynamics, "measure": self.measure}
        entropy = partial(step_entropy, self.sigmas, noise_level=self.noise_level, **how)
        return [*map(entropy, self.active, self.spans)]

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
            of: dict[str, Any] = {"sigmas": check_sigmas(data["sigmas"])}
            of |= {key: tuple(data[key]) for key in ("entropy", "active", "spans")}
            of |= {key: data[key] for key in ("threshold", "measure", "dynamics", "noise_level")}
            of |= {"warnings": tuple(data.get("warnings", ()))}
            of |= {"samples": None if data.get("samples") is None else tuple(data["samples"])}
        except KeyError as error:
            raise ValueError(f"plan has no key {error}") from None
        except TypeError as error:
            raise ValueError(f"plan holds a value of the wrong type: {error}") from None
        plan = cls(**of)
        for fault in plan._faults():
            raise ValueError(f"plan: {fault}")
        return plan

    def _faults(self) -> Iterator[str]:
        """What cannot be; what follows the first presumes that it was none."""
        samples = self.samples or ()
        tau = 0.0 if self.threshold is None else self.threshold
        if not all(type(n) is int for n in (*self.active, *self.spans, *samples)):
            yield "active, spans and samples must be whole numbers"
        if min(samples, default=2) < 2:
            yield "samples must be at least 2 for each step"
        numbers = (*self.entropy, self.noise_level, tau)
        if not all(type(n) in (int, float) and math.isfinite(n) for n in numbers):
            yield "entropy, noise_level and threshold must be finite numbers"
        if not all(isinstance(line, str) for line in self.warnings):
            yield "warnings must be text"
        if self.samples is not None and len(samples) != len(self.active):
            yield f"{len(samples)} samples for {len(self.active)} steps"
        check_spans(self.steps, self.active, self.spans)
        if len(self.entropy) != self.steps - 1:
            found = f"{len(self.entropy)} entropy values for {self.steps} steps"
            yield f"{found}; {self.steps - 1} are needed"
        if self.dynamics not in STD or self.measure not in MEASURES:
            yield f"unknown dynamics {self.dynamics!r} or measure {self.measure!r}"


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
    """Choose the span of every active step: the least that reaches ``threshold``, or ``span``.

    Exactly one of them is given; a threshold of 0 merges nothing, in every measure. A fixed span
    that would land on sigma = 0 follows ``on_unreachable`` too.

    Raises:
        ValueError: if an active step lies beyond the schedule, a name is unknown, or a step is
            out of reach and ``on_unreachable`` is ``error``.
    """
    grid = check_sigmas(sigmas)
    steps = len(grid) - 1
    if on_unreachable not in POLICIES:
        known = ", ".join(POLICIES)
        raise ValueError(f"on_unreachable must be one of {known}, got {on_unreachable!r}")
    if (threshold is None) == (span is None):
        raise ValueError("give either a threshold or a fixed span")
    if span is not None and span < 1:
        raise ValueError(f"a fixed span must be at least 1, got {span}")
    check_spans(steps, active, [1] * len(active))
    of: dict[str, Any] = {"noise_level": noise_level, "dynamics": dynamics, "measure": measure}
    entropy: Any = partial(step_entropy, grid, **of)

    def fits(i: int, n: int) -> bool:
        if threshold is None:
            return n == span
        return threshold == 0 or entropy(i, n) >= threshold  # nats can be negative

    fixed = f"span {span} would land on sigma = 0"
    why = f"threshold {threshold} ({measure}) is out of reach" if span is None else fixed
    spans: dict[int, int] = {}
    warnings: list[str] = []
    for i in active:
        longest = steps - 1 - i
        found = next((n for n in range(1, longest + 1) if fits(i, n)), None)
        if found is None:
            if on_unreachable == "error":
                raise ValueError(f"step {i}: {why}; the longest span is {longest}")
            action = f"span capped at {longest}" if on_unreachable == "cap" else "step left out"
            warnings.append(f"step {i}: {why}, {action}")
        if found is not None or on_unreachable == "cap":
            spans[i] = found or longest
    if not spans:
        raise ValueError(
            f"no active step is left of {list(active)}: lower the threshold {threshold} or set "
            "on_unreachable to cap"
        )
    single = tuple(entropy(i, 1) for i in range(steps - 1))
    chosen = tuple(spans), tuple(spans.values())
    return Plan(grid, single, *chosen, threshold, **of, warnings=tuple(warnings))
