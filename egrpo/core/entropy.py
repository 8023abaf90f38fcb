"""Closed-form entropy of a stochastic transition, in the unit that thresholds are given in.

Source: E-GRPO (arXiv 2601.00423): ``h = d/2 * log(2*pi*e*s_t^2*D)``.
"""

from __future__ import annotations

import math

from egrpo.core.noise import STD
from egrpo.core.schedule import Sigmas

MEASURES = ("exp_per_dim", "nats_per_dim", "variance")
"""``exp_per_dim``: exp(h/d), the unit of the paper's thresholds; ``nats_per_dim``: h/d in nats;
``variance``: (std / a)^2, for Flow-SDE ``t/(1-t) * D``, free of the noise level."""


def step_entropy(
    sigmas: Sigmas,
    start: int,
    span: int,
    *,
    noise_level: float,
    dynamics: str = "flow_sde",
    measure: str = "exp_per_dim",
) -> float:
    """Entropy of the transition from ``start`` over ``span`` intervals.

    Args:
        sigmas, start, span: the grid, an index of it, and at least 1 interval.
        noise_level: a (Flow-SDE, CPS) or eta (Dance-SDE); of 0 the entropy is 0 (or -inf nats).
        dynamics: a key of :data:`egrpo.core.noise.STD`.
        measure: one of :data:`MEASURES`.

    Raises:
        ValueError: if the step leaves the grid or the measure is unknown.
    """
    stop = start + span
    if span < 1 or start < 0 or stop >= len(sigmas):
        raise ValueError(
            f"step {start} with span {span} leaves the schedule of {len(sigmas) - 1} steps"
        )
    std = STD[dynamics](sigmas, start, stop, noise_level)
    if measure == "exp_per_dim":
        return math.sqrt(2.0 * math.pi * math.e) * std
    if measure == "nats_per_dim":
        return 0.5 * math.log(2.0 * math.pi * math.e) + math.log(std) if std > 0 else -math.inf
    if measure == "variance":
        return (std / noise_level) ** 2 if noise_level > 0 else 0.0
    raise ValueError(f"measure must be one of {', '.join(MEASURES)}, got {measure!r}")
