"""Transitions from sigma_i to sigma_j: mean, standard deviation, log-probability.

x is the latent [B, ...] at t = sigma_i, v the velocity there [B, ...], dt = sigma_j - sigma_i < 0.
A merged step (j - i > 1) is one such transition. All is computed in float32, or in float64 for
float64 latents.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from egrpo.core.noise import STD, Matching, flow_sde_scale
from egrpo.core.schedule import Sigmas

MATCHING_FLOOR = 1e-10
"""Added to a matching error before its power, whose gradient is infinite at 0."""


def working(x: Tensor) -> Tensor:
    """``x`` in at least float32: half precision overflows in log-probabilities."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _euler(x: Tensor, v: Tensor, sigmas: Sigmas, i: int, j: int, _: float) -> Tensor:
    """``x + v*dt``."""
    return x + v * (sigmas[j] - sigmas[i])


def _flow_sde(x: Tensor, v: Tensor, sigmas: Sigmas, i: int, j: int, a: float) -> Tensor:
    """``x*(1 + s^2/(2t)*dt) + v*(1 + s^2*(1-t)/(2t))*dt`` (Flow-GRPO, arXiv 2505.05470, eq. 9)."""
    t, dt, s2 = sigmas[i], sigmas[j] - sigmas[i], flow_sde_scale(sigmas, i, a) ** 2
    return x * (1 + s2 / (2 * t) * dt) + v * (1 + s2 * (1 - t) / (2 * t)) * dt


def _dance_sde(x: Tensor, v: Tensor, sigmas: Sigmas, i: int, j: int, eta: float) -> Tensor:
    """``x + v*dt - eta^2/2 * score * dt``, ``score = -(x - (1-t)*x0)/t^2``, ``x0 = x - t*v``.

    DanceGRPO, arXiv 2505.07818.
    """
    t, dt = sigmas[i], sigmas[j] - sigmas[i]
    score = -(x - (1 - t) * (x - t * v)) / t**2
    return x + dt * v - 0.5 * eta**2 * score * dt


def _cps(x: Tensor, v: Tensor, sigmas: Sigmas, i: int, j: int, a: float) -> Tensor:
    """``(1-s')*x0 + sqrt(s'^2 - std^2)*x1`` with ``x0 = x - t*v``, ``x1 = x + (1-t)*v``.

    Coefficients-preserving sampling (arXiv 2509.05952); s' = sigma_j.
    """
    t, end = sigmas[i], sigmas[j]
    kept = end * math.cos(a * math.pi / 2.0)  # sqrt(s'^2 - std^2)
    return (1 - end) * (x - t * v) + kept * (x + (1 - t) * v)


MEAN: dict[str, Callable[[Tensor, Tensor, Sigmas, int, int, float], Tensor]] = {
    "ode": _euler,
    "dpm2": _euler,  # of the first step of a chain; see dpm2_mean for the others
    "flow_sde": _flow_sde,
    "dance_sde": _dance_sde,
    "cps": _cps,
}
"""Mean by name of the dynamics: ``MEAN[name](x, v, sigmas, start, stop, noise_level)``."""


def transition(
    x: Tensor, v: Tensor, sigmas: Sigmas, start: int, stop: int, dynamics: str, noise_level: float
) -> tuple[Tensor, float]:
    """Mean [B, ...] and standard deviation (one float) of the edge ``start -> stop``."""
    step = (sigmas, start, stop, noise_level)
    return MEAN[dynamics](working(x), working(v), *step), STD[dynamics](*step)


def data_prediction(x: Tensor, v: Tensor, sigma: float) -> Tensor:
    """``x0 = x - sigma * v`` [B, ...]: where the straight path from ``x`` ends."""
    return working(x) - sigma * working(v)


def dpm2_mean(
    x: Tensor, v: Tensor, sigmas: Sigmas, start: int, stop: int, before: int, data_before: Tensor
) -> Tensor:
    """Second-order multistep DPM-Solver++ (arXiv 2211.01095, Algorithm 2), midpoint form.

    Euler plus ``(1 - sigma_j/sigma_i) * h / (2*h0) * (x0 - x0')``, where x0' is the data prediction
    at the grid index ``before``, h and h0 the steps ahead and behind in ``log((1-sigma)/sigma)``.
    A step that lands on sigma = 0 has no finite h and is Euler's, as is the first of a chain.
    """
    euler, _ = transition(x, v, sigmas, start, stop, "ode", 0.0)
    if sigmas[stop] == 0.0 or sigmas[before] == 1.0:  # h or h0 infinite
        return euler
    grid = (sigmas[before], sigmas[start], sigmas[stop])
    older, here, there = (math.log((1.0 - s) / s) for s in grid)
    factor = (1.0 - sigmas[stop] / sigmas[start]) * (there - here) / (2.0 * (here - older))
    return euler + factor * (data_prediction(x, v, sigmas[start]) - data_before)


def log_prob(x_next: Tensor, mean: Tensor, std: float, dynamics: str) -> Tensor:
    """Log-probability [B] of ``x_next``, rounded to its storage dtype: the Gaussian log-density.

    The **mean** over the non-batch dimensions, in nats per dimension, as in all public code of
    these methods; ratios and the clip range are in that unit. CPS drops the variance, which
    vanishes with sigma: ``-mean((x' - mean)^2)``.

    Raises:
        ValueError: if ``std`` is not positive and the dynamics are not CPS.
    """
    if dynamics == "cps":
        return -((working(x_next) - mean) ** 2).flatten(1).mean(1)
    if std <= 0:
        raise ValueError("a step without noise has no log-probability")
    z = (working(x_next) - mean) / std
    per_dim = -0.5 * z * z - math.log(std) - 0.5 * math.log(2.0 * math.pi)
    return per_dim.flatten(1).mean(1)


def matching_log_prob(v: Tensor, target: Tensor, sigma: float, matching: Matching) -> Tensor:
    """Surrogate log-probability [B] of samples noised to ``sigma``; see :class:`Matching`."""
    error = ((working(v) - working(target)) ** 2).flatten(1).mean(1)
    power, weight = matching.power, sigma if matching.time_weight else 1.0
    if power == 1.0:
        return -weight * error
    return -weight / power * ((error + MATCHING_FLOOR) ** power - MATCHING_FLOOR**power)
