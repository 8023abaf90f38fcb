"""The clipped objective over trained edges.

Source: E-GRPO (arXiv 2601.00423): mean over active steps and samples of
``max(-A*r, -A*clip(r, 1-eps, 1+eps))``, ``r = exp(logp_new - logp_old)``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Objective(NamedTuple):
    """Sum of the loss over edges and what to watch. All but ``loss`` are detached.

    Attributes:
        loss: scalar, the weighted **sum** over edges; divide by the edges of an optimizer step.
        ratio: [E] probability ratios.
        clipped: [E] bool, edges whose gradient the clip removed.
    """

    loss: Tensor
    ratio: Tensor
    clipped: Tensor


def clipped_objective(
    log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor, weight: Tensor, clip_range: float
) -> Objective:
    """PPO's clipped loss of E edges (all arguments [E], float32)."""
    ratio = torch.exp(log_prob - old_log_prob)
    plain = -advantage * ratio
    bounded = -advantage * ratio.clamp(1.0 - clip_range, 1.0 + clip_range)
    loss = (weight * torch.maximum(plain, bounded)).sum()
    return Objective(loss, ratio.detach(), (bounded > plain).detach())


def velocity_distance(v: Tensor, v_ref: Tensor) -> Tensor:
    """``mean((v - v_ref)^2)`` [B] over the non-batch dimensions, in float32.

    The KL divergence from the base model up to its weighting over time.
    """
    return ((v.float() - v_ref.float()) ** 2).flatten(1).mean(1)
