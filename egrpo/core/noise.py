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


STD: dict[str, Callable[[Sigmas, int, int, float], float]] = {
    "ode": lambda *_: 0.0,
    "dpm2": lambda *_: 0.0,
    "flow_sde": lambda sigmas, i, j, a: (
        flow_sde_scale(sigmas, i, a) * math.sqrt(sigmas[i] - sigmas[j])
    ),
    "dance_sde": lambda sigmas, i, j, eta: eta * math.sqrt(sigmas[i] - sigmas[j]),
    "cps": lambda sigmas, i, j, a: sigmas[j] * math.sin(a * math.pi / 2.0),
}
"""Standard deviation by name of the dynamics: ``STD[name](sigmas, start, stop, noise_level)``.

``flow_sde``: ``s_t * sqrt(D)``, of a merged step too: the scale is that of its start;
``dance_sde``: ``eta * sqrt(D)`` (DanceGRPO, arXiv 2505.07818); ``cps``: ``sigma_j * sin(a*pi/2)``
(coefficients-preserving sampling, arXiv 2509.05952)."""

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
