"""Standard deviation of one transition, as a float. Needs no torch, so planning needs none.

Notation: flow time t = sigma_i, target sigma_j < sigma_i, D = sigma_i - sigma_j.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from egrpo.core.schedule import Sigmas


def flow_sde_scale(sigmas: Sigmas, start: int, noise_level: float) -> float:
    """Diffusion coefficient ``s_t = a * sqrt(t / (1 - t))`` of Flow-SDE.

    Where t = 1 the denominator uses ``sigmas[1]`` instead, as Flow-GRPO's code does
    (arXiv 2505.05470, eq. 9 and ``sde_step_with_logprob``).
    """
    t = sigmas[start]
    guard = sigmas[1] if t == 1.0 else t
    return noise_level * math.sqrt(t / (1.0 - guard))


def flow_sde_std(sigmas: Sigmas, start: int, stop: int, noise_level: float) -> float:
    """``s_t * sqrt(D)``: one step or one merged step; the scale is that of its start."""
    return flow_sde_scale(sigmas, start, noise_level) * math.sqrt(sigmas[start] - sigmas[stop])


def dance_sde_std(sigmas: Sigmas, start: int, stop: int, noise_level: float) -> float:
    """``eta * sqrt(D)`` (DanceGRPO, arXiv 2505.07818)."""
    return noise_level * math.sqrt(sigmas[start] - sigmas[stop])


def cps_std(sigmas: Sigmas, start: int, stop: int, noise_level: float) -> float:
    """``sigma_j * sin(a * pi / 2)`` (coefficients-preserving sampling, arXiv 2509.05952)."""
    return sigmas[stop] * math.sin(noise_level * math.pi / 2.0)


STD: dict[str, Callable[[Sigmas, int, int, float], float]] = {
    "ode": lambda *_: 0.0,
    "dpm2": lambda *_: 0.0,
    "flow_sde": flow_sde_std,
    "dance_sde": dance_sde_std,
    "cps": cps_std,
}
"""Standard deviation by name of the dynamics: ``STD[name](sigmas, start, stop, noise_level)``."""

DETERMINISTIC = ("ode", "dpm2")
"""Euler, and the second-order multistep DPM-Solver++ (arXiv 2211.01095)."""

NOISING = "noising"
"""The forward process: from a finished sample back to ``(1 - sigma) * x + sigma * noise``."""


class Matching(NamedTuple):
    """Surrogate log-probability of a noising edge, from its error e = mean((v - target)^2).

    ``-((e + d)^power - d^power) / power`` with d = 1e-10, times the flow time where
    ``time_weight`` is set (AWM, arXiv 2509.25050, and its public code). The default is -e.
    """

    power: float = 1.0
    time_weight: bool = False


SQUARED_ERROR = Matching()
