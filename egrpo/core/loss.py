"""The objectives over trained edges.

Clipped: mean over active steps and samples of ``max(-A*r, -A*clip(r, 1-eps, 1+eps))``,
``r = exp(logp_new - logp_old)`` (E-GRPO, arXiv 2601.00423). Negative-aware: DiffusionNFT's.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Objective(NamedTuple):
    """The weighted **sum** of the loss over edges, a scalar, and what to watch, detached.

    ``ratio``: [E] probability ratios; ``clipped``: [E] bool, edges whose gradient the clip removed.
    """

    loss: Tensor
    ratio: Tensor
    clipped: Tensor


def clipped_objective(
    log_ratio: Tensor, advantage: Tensor, weight: Tensor, clip_range: float
) -> Objective:
    """PPO's clipped loss of E edges (all arguments [E], float32)."""
    ratio = torch.exp(log_ratio)
    plain = -advantage * ratio
    bounded = -advantage * ratio.clamp(1.0 - clip_range, 1.0 + clip_range)
    loss = (weight * torch.maximum(plain, bounded)).sum()
    return Objective(loss, ratio.detach(), (bounded > plain).detach())


def negative_aware_objective(
    v: Tensor,
    v_old: Tensor,
    target: Tensor,
    sigma: float,
    advantage: Tensor,
    weight: Tensor,
    beta: float,
    advantage_scale: float,
) -> Objective:
    """DiffusionNFT's loss of E noised samples (arXiv 2509.16117, eq. 5 and its public code).

    ``scale/beta * (r*|x0(v+) - x0|^2 + (1-r)*|x0(v-) - x0|^2)`` with
    ``v+ = (1-beta)*v_old + beta*v``, ``v- = (1+beta)*v_old - beta*v`` and
    ``r = (clip(A/scale, -1, 1) + 1) / 2``; each square is divided by the mean absolute error of
    its own prediction, detached (adaptive weighting).

    Args:
        v, v_old, target: [E, ...], velocities of the network, of the weights that sampled, and
            of the straight path from the sample to its noise.
        sigma: flow time of the noised samples; x0 is predicted ``sigma * (target - v)`` apart.
        advantage, weight: [E].
        beta, advantage_scale: the mixing, and the advantage that counts as fully positive.
    """
    v, v_old, target = v.float(), v_old.float(), target.float()
    share = (advantage / advantage_scale).clamp(-1.0, 1.0) / 2.0 + 0.5

    def error(mixed: Tensor) -> Tensor:
        difference = (sigma * (target - mixed)).flatten(1)
        scale = difference.detach().double().abs().mean(1).clamp_min(1e-5)
        return (difference**2).mean(1) / scale.float()

    positive = error((1.0 - beta) * v_old + beta * v)
    negative = error((1.0 + beta) * v_old - beta * v)
    both = share * positive + (1.0 - share) * negative
    loss = advantage_scale / beta * (weight * both).sum()
    return Objective(loss, torch.ones_like(advantage), torch.zeros_like(advantage).bool())


def velocity_distance(v: Tensor, v_ref: Tensor) -> Tensor:
    """``mean((v - v_ref)^2)`` [B] in float32: the KL divergence up to its weighting over time."""
    return ((v.float() - v_ref.float()) ** 2).flatten(1).mean(1)
