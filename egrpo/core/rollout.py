"""What a rollout leaves behind: final latents, and the batches of the training pass."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from egrpo.core.noise import NOISING, SQUARED_ERROR, Matching
from egrpo.core.schedule import Sigmas
from egrpo.core.transitions import log_prob, matching_log_prob, transition
from egrpo.core.tree import Tree

Edge = tuple[int, int]
"""(tree, node)."""


@dataclass(frozen=True)
class Segment:
    """Trained edges of one batch that share dynamics and end.

    ``rows``: [E] int64, the source of each edge in the batch; ``x_next``: [E, ...], where it
    arrived, in storage dtype; of a noising edge the velocity ``noise - data`` that the network is
    matched with.
    """

    dynamics: str
    stop: int
    rows: Tensor
    x_next: Tensor


@dataclass(frozen=True)
class TrainBatch:
    """Sources of one grid index and the trained edges that leave them.

    Attributes:
        start: grid index of the sources.
        part: optimizer step of the iteration that the edges belong to.
        x: [B, ...] source latents; one forward/backward serves all their edges.
        v: [B, ...] velocities there under the weights that sampled.
        tree: [B] int64, prompt of each source.
        segments: the edges; concatenated in order they number E.
        edges: E positions in ``Rollout.edges``.
        log_prob: [E] float32, under the weights that sampled.
        matching: log-probability of noising edges.
    """

    start: int
    part: int
    x: Tensor
    v: Tensor
    tree: Tensor
    segments: tuple[Segment, ...]
    edges: tuple[int, ...]
    log_prob: Tensor
    matching: Matching = SQUARED_ERROR

    @property
    def rows(self) -> Tensor:
        """[E] int64, the source of each edge."""
        return torch.cat([segment.rows for segment in self.segments])

    def log_probs(self, v: Tensor, sigmas: Sigmas, noise_level: float) -> Tensor:
        """Log-probabilities [E] of the edges (of noising ones the surrogate ``matching``).

        ``v``: [B, ...] velocities at the sources.
        """
        parts = []
        for seg in self.segments:
            if seg.dynamics == NOISING:
                sigma = sigmas[self.start]
                parts.append(matching_log_prob(v[seg.rows], seg.x_next, sigma, self.matching))
            else:
                mean, std = self._moments(seg, v, sigmas, noise_level)
                parts.append(log_prob(seg.x_next, mean, std, seg.dynamics))
        return torch.cat(parts)

    def log_ratio(self, v: Tensor, sigmas: Sigmas, noise_level: float) -> Tensor:
        """Log-probability under ``v`` minus that under the weights that sampled, [E]."""
        return self.log_probs(v, sigmas, noise_level) - self.log_prob

    def guarded_log_ratio(self, v: Tensor, sigmas: Sigmas, noise_level: float) -> Tensor:
        """GRPO-Guard's ratio normalization (arXiv 2510.22319), [E].

        ``S * dlogp + mean((mu - mu_old)^2) / (2*S)`` with S = std of the transition: centered at 0
        and of one scale at all steps.
        """
        distances = self._distances(v, self.v, sigmas, noise_level)
        scale = self._each([std for _, std in distances])
        shift = torch.cat([d / (2.0 * std) for d, std in distances])
        return scale * self.log_ratio(v, sigmas, noise_level) + shift

    def divergence(self, v: Tensor, v_ref: Tensor, sigmas: Sigmas, noise_level: float) -> Tensor:
        """KL divergence [E] of each edge from the one under velocities ``v_ref`` [B, ...].

        Mean over the non-batch dimensions, ``(mean - mean_ref)^2 / (2 std^2)``.
        """
        distances = self._distances(v, v_ref, sigmas, noise_level)
        return torch.cat([d / (2.0 * std**2) for d, std in distances])

    def transition_distance(
        self, v: Tensor, v_ref: Tensor, sigmas: Sigmas, noise_level: float
    ) -> Tensor:
        """Flow-GRPO's penalty [E], as its public code has it: ``(mean - mean_ref)^2 / (2 s^2)``.

        s is what the code calls the standard deviation: of an SDE its diffusion coefficient,
        std / sqrt(|dt|), so that this is |dt| times the KL divergence; of CPS the whole std.
        """
        start = sigmas[self.start]
        factors = [1.0 if s.dynamics == "cps" else start - sigmas[s.stop] for s in self.segments]
        return self._each(factors) * self.divergence(v, v_ref, sigmas, noise_level)

    def lengths(self, sigmas: Sigmas) -> Tensor:
        """Flow time |dt| that each edge covers, [E]."""
        return self._each([sigmas[self.start] - sigmas[seg.stop] for seg in self.segments])

    def targets(self) -> Tensor:
        """Velocities [E, ...] that noising edges are matched with."""
        return torch.cat([segment.x_next for segment in self.segments])

    def only(self, kept: Collection[int]) -> TrainBatch | None:
        """The batch without edges outside of ``kept`` and sources without any; None if empty."""
        keep = torch.tensor([number in kept for number in self.edges], device=self.x.device)
        if not keep.any():
            return None
        rows, moved = torch.unique(self.rows[keep], return_inverse=True)  # sorted
        masks = keep.split([len(seg.rows) for seg in self.segments])
        own = moved.split([int(mask.sum()) for mask in masks])
        segments = [
            replace(seg, rows=r, x_next=seg.x_next[mask])
            for seg, mask, r in zip(self.segments, masks, own, strict=True)
        ]
        return replace(
            self,
            x=self.x[rows],
            v=self.v[rows],
            tree=self.tree[rows],
            segments=tuple(segments),
            edges=tuple(number for number in self.edges if number in kept),
            log_prob=self.log_prob[keep],
        )

    def _each(self, numbers: Sequence[float]) -> Tensor:
        """[E] float32 of one number a segment."""
        pairs = zip(self.segments, numbers, strict=True)
        return torch.cat([torch.full_like(s.rows, n, dtype=torch.float32) for s, n in pairs])

    def _moments(
        self, seg: Segment, v: Tensor, sigmas: Sigmas, noise_level: float
    ) -> tuple[Tensor, float]:
        edge = (sigmas, self.start, seg.stop, seg.dynamics, noise_level)
        return transition(self.x[seg.rows], v[seg.rows], *edge)

    def _distances(
        self, v: Tensor, v_ref: Tensor, sigmas: Sigmas, noise_level: float
    ) -> list[tuple[Tensor, float]]:
        """For each segment ``mean((mu - mu_ref)^2)`` [E] and the std of its transition."""
        out = []
        for seg in self.segments:
            mean, std = self._moments(seg, v, sigmas, noise_level)
            apart = mean - self._moments(seg, v_ref, sigmas, noise_level)[0]
            out.append(((apart**2).flatten(1).mean(1), std))
        return out


@dataclass
class Rollout:
    """What came out of a forest.

    Attributes:
        leaves: [L, ...] latents at sigma = 0, ordered by (tree, node).
        leaf_tree: the tree of each leaf.
        edges: (tree, node) of every trained edge, in the order the batches number them.
        batches: the training pass, in order of grid index.
        forward: network evaluations executed (one per latent, without the factor of CFG).
    """

    leaves: Tensor
    leaf_tree: tuple[int, ...]
    edges: list[Edge] = field(default_factory=list)
    batches: list[TrainBatch] = field(default_factory=list)
    forward: int = 0

    def batches_of(self, part: int, kept: Collection[int] | None = None) -> list[TrainBatch]:
        """Batches of one optimizer step, those edges only that are ``kept`` (None: all)."""
        batches = [batch for batch in self.batches if batch.part == part]
        if kept is None:
            return batches
        return [b for b in (batch.only(kept) for batch in batches) if b is not None]

    def log_probs(self) -> npt.NDArray[np.float64]:
        """Log-probabilities of the edges in these batches, in order of their numbers."""
        numbers = [e for batch in self.batches for e in batch.edges]
        found = [p for batch in self.batches for p in batch.log_prob.tolist()]
        return np.array(found, dtype=np.float64)[np.argsort(numbers)]

    def placed(self, first_tree: int, shares: Sequence[Sequence[Edge]], rank: int) -> Rollout:
        """This rollout as one process's share of a larger one, whose edges the batches number.

        Args:
            first_tree: number, among the trees of all processes, of the first one here.
            shares: trained edges of every process, trees numbered in the same way.
            rank: the share that is this rollout's.
        """
        before = sum(map(len, shares[:rank]))
        return replace(
            self,
            leaf_tree=tuple(first_tree + t for t in self.leaf_tree),
            edges=[edge for share in shares for edge in share],
            batches=[replace(b, edges=tuple(before + e for e in b.edges)) for b in self.batches],
        )


def joined(parts: Sequence[Rollout], sizes: Sequence[int]) -> Rollout:
    """One rollout of consecutive groups of trees, ``sizes`` of them each."""
    if len(parts) == 1:
        return parts[0]
    out = Rollout(torch.cat([p.leaves for p in parts]) if parts else torch.empty(0), ())
    for part, first in zip(parts, np.cumsum([0, *sizes])[:-1].tolist(), strict=True):
        before = len(out.edges)
        out.leaf_tree += tuple(first + t for t in part.leaf_tree)
        out.edges += [(first + t, k) for t, k in part.edges]
        out.batches += [
            replace(b, tree=b.tree + first, edges=tuple(before + e for e in b.edges))
            for b in part.batches
        ]
        out.forward += part.forward
    return out


class UpdateSize(NamedTuple):
    """What one optimizer step averages over, in all processes."""

    edges: int
    sources: int


def update_sizes(
    trees: Sequence[Tree], edges: Sequence[Edge], updates: int, kept: Collection[int] | None
) -> dict[int, UpdateSize]:
    """The size of each optimizer step of an iteration, by its part."""
    parts = [tree.parts(updates) for tree in trees]
    found: dict[int, list[Edge]] = defaultdict(list)
    for e in range(len(edges)) if kept is None else kept:
        t, k = edges[e]
        found[parts[t][k]].append((t, trees[t].source(k)))
    return {part: UpdateSize(len(s), len(set(s))) for part, s in sorted(found.items())}
