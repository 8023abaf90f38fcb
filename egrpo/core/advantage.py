"""From rewards of leaves to advantages of trained edges. numpy, float64.

Leaves with several labels (granularities) are normalized label by label, and summed. A NaN reward
leaves its sample out of mean and std; a group with fewer than two valid samples or with equal
rewards has zero advantage and is counted. A reward without a valid score among all leaves of a
tree does not apply to that prompt; where one has failed for some leaves only, these are invalid.
Source: E-GRPO (arXiv 2601.00423); unbiased std as in its and DanceGRPO's code.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from egrpo.core.tree import Tree

Array = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


class Advantages(NamedTuple):
    """Advantages of the trained edges and what was left out.

    Attributes:
        values: [E] float64, clamped; 0 where an edge or its group has nothing to say.
        groups: number of groups, summed over the rewards that were normalized.
        groups_masked: those with fewer than two valid samples or equal rewards.
        samples_invalid: leaves that lack a reward which applies to their prompt, or all rewards.
    """

    values: Array
    groups: int
    groups_masked: int
    samples_invalid: int


def leaf_trees(trees: Sequence[Tree]) -> Ints:
    """Number [L] of the tree of every leaf, ordered by (tree, leaf)."""
    return np.repeat(np.arange(len(trees)), [len(tree.leaves) for tree in trees])


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


def best_leaves(
    rewards: Mapping[str, Array], weights: Mapping[str, float], trees: Sequence[Tree], share: float
) -> list[set[int]]:
    """For each tree the ranks of its best leaves, a ``share`` of them and at least one.

    Best by the weighted sum of the rewards that apply, each normalized among the tree's leaves; a
    leaf that lacks one of these comes last.
    """
    owner = leaf_trees(trees)
    among = {}
    for name in weights:
        raw = finite(rewards[name])
        among[name] = np.where(np.isnan(raw), np.nan, np.nan_to_num(normalize(raw, owner)[0]))
    total = np.nan_to_num(weighted_sum(among, weights, owner), nan=-np.inf)
    each = [total[owner == t] for t in range(len(trees))]
    counts = [max(1, round(share * len(mine))) for mine in each]
    order = [np.argsort(-mine, kind="stable").tolist() for mine in each]
    return [set(ranks[:count]) for ranks, count in zip(order, counts, strict=True)]


def weighted_sum(rewards: Mapping[str, Array], weights: Mapping[str, float], owner: Ints) -> Array:
    """Weighted sum [L] of the rewards (name -> [L], NaN: invalid) that apply to a leaf's prompt.

    A reward applies where any leaf of the tree, ``owner`` [L], has a valid score, so that all its
    leaves are compared by the same rewards. NaN for a leaf that lacks one or to which none applies.
    """
    total = np.zeros(len(owner))
    lacking, any_applies = np.zeros((2, len(owner)), dtype=bool)
    for name, weight in weights.items():
        valid = ~np.isnan(rewards[name])
        applies = np.isin(owner, owner[valid])
        total += weight * np.nan_to_num(rewards[name])
        lacking |= applies & ~valid
        any_applies |= applies
    return np.where(any_applies & ~lacking, total, np.nan)


def finite(rewards: npt.ArrayLike) -> Array:
    """A float64 copy with NaN for what is not finite: an infinite score is a failure too."""
    values = np.array(rewards, dtype=np.float64)
    values[~np.isfinite(values)] = np.nan
    return values


def normalize(
    values: Array, groups: Ints, *, std: str = "group", ddof: int = 1, eps: float = 1e-8
) -> tuple[Array, int, int]:
    """``(value - group mean) / (std + eps)``.

    Args:
        values, groups: [E], and the number of each value's group; NaN marks an invalid sample.
        std: over the ``group``, or over the whole ``batch`` (Flow-GRPO).
        ddof: 1 for the unbiased std, 0 for the population's.

    Returns:
        Advantages [E] (NaN where masked or invalid), number of groups, number of masked groups.
    """
    out = np.full_like(values, np.nan)
    valid = ~np.isnan(values)
    spread = np.std(values[valid], ddof=ddof) if valid.sum() > ddof else 0.0
    numbers = np.unique(groups)
    masked = len(numbers)
    for g in numbers:
        members = (groups == g) & valid
        x = values[members]
        if x.size > 1 and np.ptp(x) > 0.0:
            masked -= 1
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
        combine: ``advantages`` (normalize each reward in its group, then weighted sum: a reward
            that is NaN adds nothing), ``rewards`` (weighted raw sum of those that apply, see
            :func:`weighted_sum`, then normalize), or ``gdpo`` (as ``advantages``, then normalized
            over the batch; arXiv 2601.05242). As in its code a group without spread counts as zeros
            in the batch's std; what has no valid reward does not count.
        std, ddof, eps: see :func:`normalize`.
        clamp: bound of the absolute advantage.
    """
    units, unit = comparison_units(trees, edges)
    groups = _numbered((t, trees[t].nodes[node].group) for t, node in units)
    raw = {name: finite(rewards[name]) for name in weights}
    summed = weighted_sum(raw, weights, leaf_trees(trees))
    invalid = int(np.isnan(summed).sum())
    if combine == "rewards":
        raw, weights = {"sum": summed}, {"sum": 1.0}
    labels = np.array([tree.nodes[leaf].label for tree in trees for leaf in tree.leaves])
    total = np.zeros(len(units))
    said, counted = np.zeros((2, len(units)), dtype=bool)
    count = masked = 0
    for name, reward in raw.items():
        for label in np.unique(labels):
            values = edge_values(np.where(labels == label, reward, np.nan), trees, units)
            normal, n, m = normalize(values, groups, std=std, ddof=ddof, eps=eps)
            total += weights[name] * np.nan_to_num(normal)
            said |= ~np.isnan(normal)
            counted |= ~np.isnan(values)
            count, masked = count + n, masked + m
    if combine == "gdpo" and counted.sum() > ddof:
        batch = total[counted]
        total = np.where(said, (total - batch.mean()) / (batch.std(ddof=ddof) + eps), 0.0)
    return Advantages(np.clip(total, -clamp, clamp)[unit], count, masked, invalid)


def comparison_units(
    trees: Sequence[Tree], edges: Sequence[tuple[int, int]]
) -> tuple[list[tuple[int, int]], Ints]:
    """The first edge of each (tree, group, leaves), and for each edge [E] its place among them.

    The trained steps of one trajectory share its reward; as one they enter mean and std once,
    however many of them there are.
    """
    place = _numbered((t, trees[t].nodes[k].group, trees[t].leaves_below[k]) for t, k in edges)
    _, first = np.unique(place, return_index=True)
    return [edges[e] for e in first], place


def _numbered(keys: Iterable[Hashable]) -> Ints:
    """Each key's number, in the order in which they first occur."""
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)
