"""From rewards of leaves to advantages of trained edges. numpy, float64.

Group hygiene: a NaN reward leaves its sample out of mean and std; a group with fewer than two
valid samples or with equal rewards has zero advantage and is counted.
Source: E-GRPO (arXiv 2601.00423); unbiased std as in its and DanceGRPO's code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from egrpo.core.tree import Tree

Array = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


class Advantages(NamedTuple):
    """Advantages of the trained edges and what hygiene removed.

    Attributes:
        values: [E] float64, clamped; 0 where an edge or its group has nothing to say.
        groups: number of groups, summed over the rewards that were normalised.
        groups_masked: those with fewer than two valid samples or equal rewards.
        samples_invalid: leaves with a NaN or an infinity in any reward.
    """

    values: Array
    groups: int
    groups_masked: int
    samples_invalid: int


def edge_values(rewards: Array, trees: Sequence[Tree], edges: Sequence[tuple[int, int]]) -> Array:
    """Mean reward [E] over the valid leaves below each edge; NaN where none is valid.

    ``rewards`` [L] is ordered by (tree, leaf), as ``Rollout.leaves``.
    """
    offsets = np.cumsum([0, *(len(tree.leaves) for tree in trees)])
    out = np.full(len(edges), np.nan)
    for e, (t, node) in enumerate(edges):
        below = rewards[offsets[t] + np.array(trees[t].leaves_below[node], dtype=np.int64)]
        valid = below[~np.isnan(below)]
        if valid.size:
            out[e] = valid.mean()
    return out


def normalise(
    values: Array, groups: Ints, *, std: str = "group", ddof: int = 1, eps: float = 1e-8
) -> tuple[Array, int, int]:
    """``(value - group mean) / (std + eps)``.

    Args:
        values: [E] float64; NaN marks an invalid sample.
        groups: [E] group number of each value.
        std: over the ``group``, or over the whole ``batch`` (Flow-GRPO).
        ddof: 1 for the unbiased std, 0 for the population's.
        eps: added to the std.

    Returns:
        Advantages [E] (0 where masked or invalid), number of groups, number of masked groups.
    """
    out = np.zeros_like(values)
    valid = ~np.isnan(values)
    spread = np.std(values[valid], ddof=ddof) if valid.sum() > ddof else 0.0
    numbers = np.unique(groups)
    masked = 0
    for g in numbers:
        members = (groups == g) & valid
        x = values[members]
        if x.size < 2 or np.ptp(x) == 0.0:
            masked += 1
            continue
        scale = np.std(x, ddof=ddof) if std == "group" else spread
        out[members] = (x - x.mean()) / (scale + eps)
    return out, len(numbers), masked


def advantages(
    rewards: Mapping[str, Array],
    weights: Mapping[str, float],
    trees: Sequence[Tree],
    edges: Sequence[tuple[int, int]],
    *,
    combine: str = "advantages",
    std: str = "group",
    ddof: int = 1,
    eps: float = 1e-8,
    clamp: float = 5.0,
) -> Advantages:
    """Advantages of the trained edges from the rewards of the leaves.

    Args:
        rewards: name -> [L] values of all leaves, ordered by (tree, leaf); NaN = scoring failed.
        weights: name -> weight of each trained reward.
        trees, edges: the forest and its trained edges, as in ``Rollout``.
        combine: ``advantages`` (normalise each reward, then weighted sum) or ``rewards``
            (weighted raw sum, then normalise).
        std, ddof, eps: see :func:`normalise`.
        clamp: bound of the absolute advantage.
    """
    keys = [(t, trees[t].nodes[node].group) for t, node in edges]
    numbering = {key: n for n, key in enumerate(dict.fromkeys(keys))}
    groups = np.array([numbering[key] for key in keys], dtype=np.int64)
    raw = {name: np.array(rewards[name], dtype=np.float64) for name in weights}
    for reward in raw.values():
        reward[~np.isfinite(reward)] = np.nan  # an infinite score is a failure too
    invalid = int(np.any([np.isnan(r) for r in raw.values()], axis=0).sum())
    if combine == "rewards":
        raw = {"sum": np.sum([weights[name] * r for name, r in raw.items()], axis=0)}
        weights = {"sum": 1.0}
    total = np.zeros(len(edges))
    count = masked = 0
    for name, reward in raw.items():
        values = edge_values(reward, trees, edges)
        normal, n, m = normalise(values, groups, std=std, ddof=ddof, eps=eps)
        total += weights[name] * normal
        count, masked = count + n, masked + m
    return Advantages(np.clip(total, -clamp, clamp), count, masked, invalid)
