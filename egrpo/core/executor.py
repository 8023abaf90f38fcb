"""The one executor: runs any forest of rollout trees, all live nodes of a grid index together.

Per grid index the latents that have children are evaluated once each: first the sources of trained
edges, in chunks that the training pass repeats exactly (so that the on-policy ratio is exactly 1),
then the rest in micro-batches. Every edge out of a latent shares its velocity. Noising edges come
last.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from itertools import groupby

import torch
from torch import Tensor

from egrpo.core.noise import NOISING, SQUARED_ERROR, Matching
from egrpo.core.rollout import Edge, Rollout, Segment, TrainBatch
from egrpo.core.schedule import Sigmas
from egrpo.core.transitions import data_prediction, dpm2_mean, transition, working
from egrpo.core.tree import ROOT, Node, Tree

VelocityFn = Callable[[Tensor, float, Tensor], Tensor]
"""``velocity(x [B, ...], sigma, tree [B] int64) -> v [B, ...]``; ``tree`` selects the prompt."""

SuffixFn = Callable[[Tensor, float, Tensor, tuple[Edge, ...]], Tensor]
"""The same with the path [B] that each latent is on, named by its tree and its first node there
(:attr:`Tree.paths`): what was computed for a batch a step ago belongs to that of equal paths."""

NoiseFn = Callable[[int, int, int], Tensor]
"""``noise(tree, start, sample)``: standard normal of one latent's shape. ``start`` is the grid
index that an edge leaves; -1 for a root, ``-2 - i`` for a noising edge to index i."""


@dataclass
class Executor:
    """A forest and how it is run; :meth:`rollout` runs it, once.

    Attributes:
        trees: one per prompt, all over the grid ``sigmas``.
        sigmas: T + 1 floats from 1 to 0.
        velocity: the model; called once for every node that has children.
        noise: standard normal of one latent's shape for (tree, start, sample).
        noise_level: a or eta of the stochastic edges.
        micro_batch: most latents in one call.
        train_micro_batch: most branch points in one call, here and in the training pass; None: as
            many.
        dtype: storage type of latents; every latent is rounded to it before it is used.
        device: where latents live.
        suffix_velocity: the same model in a form that is cheaper to evaluate (LoRA merged into
            the weights, features kept from the step before), for nodes whose log-probability
            nobody needs.
        parts: optimizer steps that the training pass is cut into (``Tree.parts``).
        matching: log-probability of noising edges.

    Raises:
        ValueError: if a tree does not fit the grid.
    """

    trees: Sequence[Tree]
    sigmas: Sigmas
    velocity: VelocityFn
    noise: NoiseFn
    _: KW_ONLY
    noise_level: float
    micro_batch: int
    train_micro_batch: int | None = None
    dtype: torch.dtype = torch.float32
    device: torch.device | str = "cpu"
    suffix_velocity: SuffixFn | None = None
    parts: int = 1
    matching: Matching = SQUARED_ERROR

    def __post_init__(self) -> None:
        for t, tree in enumerate(self.trees):
            if tree.steps != len(self.sigmas) - 1:
                raise ValueError(
                    f"tree {t} has {tree.steps} steps, the schedule {len(self.sigmas) - 1}"
                )
        self.part_of = [tree.parts(self.parts) for tree in self.trees]  # by edge
        self.first: dict[Edge, int] = {}  # of sources: the first part of an edge that leaves
        for t, of_edges in enumerate(self.part_of):
            for k, part in of_edges.items():
                source = t, self.trees[t].source(k)
                self.first[source] = min(part, self.first.get(source, part))
        self.waiting: dict[int, dict[Edge, Tensor]] = defaultdict(dict)  # latents, by index
        self.memory: dict[Edge, tuple[int, Tensor]] = {}  # index and data prediction of a parent
        self.edges: list[Edge] = []
        self.batches: list[TrainBatch] = []
        self.forward = 0

    @torch.no_grad()
    def rollout(self) -> Rollout:
        """All of it, from the initial noise to the noising edges, without gradients.

        Raises:
            RuntimeError: if the count executed differs from the count predicted from the trees.
        """
        end = len(self.sigmas) - 1
        roots = [
            (t, k)
            for t, tree in enumerate(self.trees)
            for k, node in enumerate(tree.nodes)
            if node.parent == ROOT
        ]
        noise = self._draw(roots, -1).to(self.dtype)
        self.waiting[0].update(zip(roots, noise, strict=True))
        for index in range(end):
            self._step(index)
        keys, leaves = self._arrived(end)
        self._noise_leaves(keys, leaves)
        predicted = sum(tree.cost.forward for tree in self.trees)
        if self.forward != predicted:
            raise RuntimeError(
                f"executed {self.forward} network evaluations, predicted {predicted}"
            )
        return Rollout(leaves, tuple(t for t, _ in keys), self.edges, self.batches, self.forward)

    def _node(self, key: Edge) -> Node:
        return self.trees[key[0]].nodes[key[1]]

    def _draw(self, keys: Sequence[Edge], start: int) -> Tensor:
        """Noise of nodes whose edges leave from ``start``, stacked, on the device."""
        drawn = [self.noise(key[0], start, self._node(key).sample) for key in keys]
        return torch.stack(drawn).to(self.device)

    def _index(self, numbers: Iterable[int]) -> Tensor:
        return torch.tensor([*numbers], dtype=torch.int64, device=self.device)

    def _arrived(self, index: int) -> tuple[list[Edge], Tensor]:
        """Everything that waits at ``index``: sources by optimizer step, then the rest, each in
        order of (tree, node)."""
        latents = self.waiting.pop(index)
        keys = sorted(latents, key=lambda key: (self.first.get(key, math.inf), key))
        return keys, torch.stack([latents[key] for key in keys])

    def _chunks(self, keys: list[Edge]) -> Iterator[tuple[slice, bool]]:
        """Slices of ordered keys, and whether of sources; those of each part have their own."""
        begin = 0
        for part, members in groupby(keys, key=self.first.get):
            stop = begin + len(list(members))
            limit = self.micro_batch
            if part is not None:
                limit = self.train_micro_batch or limit
            for first in range(begin, stop, limit):
                yield slice(first, min(first + limit, stop)), part is not None
            begin = stop

    def _step(self, index: int) -> None:
        """Evaluate the velocity of every latent at ``index`` and send its children on."""
        if index not in self.waiting:
            return
        keys, latents = self._arrived(index)
        for chunk, source in self._chunks(keys):
            here, x = keys[chunk], latents[chunk]
            tree = self._index(t for t, _ in here)
            if source or self.suffix_velocity is None:
                v = self.velocity(x, self.sigmas[index], tree)
            else:
                paths = tuple((t, self.trees[t].paths[k]) for t, k in here)
                v = self.suffix_velocity(x, self.sigmas[index], tree, paths)
            self.forward += len(here)
            self._branch(index, here, x, v, tree)

    def _branch(self, index: int, keys: list[Edge], x: Tensor, v: Tensor, tree: Tensor) -> None:
        """Follow all edges out of ``keys``, those of equal end and dynamics together."""
        bundles: dict[tuple[str, int, bool, int], list[tuple[int, Edge]]] = defaultdict(list)
        behind = {key: self.memory.pop(key) for key in keys if key in self.memory}
        for row, key in enumerate(keys):
            for child in self.trees[key[0]].children[key[1]]:
                node = self._node((key[0], child))
                before = behind[key][0] if node.dynamics == "dpm2" and key in behind else -1
                kind = node.dynamics, node.index, node.trained, before
                bundles[kind].append((row, (key[0], child)))
        segments: list[Segment] = []
        edges: list[Edge] = []
        for (dynamics, stop, trained, before), bundle in bundles.items():
            numbers, arriving = map(list, zip(*bundle, strict=True))
            rows = self._index(numbers)
            of = (x[rows], v[rows], self.sigmas, index, stop)
            if before >= 0:
                data = torch.stack([behind[keys[row]][1] for row in numbers])
                mean, std = dpm2_mean(*of, before, data), 0.0
            else:
                mean, std = transition(*of, dynamics, self.noise_level)
            if std > 0:
                mean = mean + std * self._draw(arriving, index)
            if dynamics == "dpm2":
                data = data_prediction(*of[:2], self.sigmas[index])
                self.memory |= {c: (index, d) for c, d in zip(arriving, data, strict=True)}
            x_next = mean.to(self.dtype)  # rounded BEFORE any log-probability is taken
            self.waiting[stop].update(zip(arriving, x_next, strict=True))
            if trained:
                segments.append(Segment(dynamics, stop, rows, x_next))
                edges.extend(arriving)
        if segments:
            self._record(index, x, v, tree, segments, edges)

    def _record(
        self,
        index: int,
        x: Tensor,
        v: Tensor,
        tree: Tensor,
        segments: Sequence[Segment],
        edges: Sequence[Edge],
    ) -> None:
        """Keep what the training pass needs, a batch for each optimizer step; number its edges."""
        numbers = range(len(self.edges), len(self.edges) + len(edges))
        at = (index, 0, x, v, tree, tuple(segments), tuple(numbers))
        batch = TrainBatch(*at, torch.empty(0), self.matching)
        batch = replace(batch, log_prob=batch.log_probs(v, self.sigmas, self.noise_level))
        self.edges.extend(edges)
        members: dict[int, set[int]] = defaultdict(set)
        for number, (t, k) in zip(numbers, edges, strict=True):
            members[self.part_of[t][k]].add(number)
        for part, own in sorted(members.items()):
            of_part = batch if len(members) == 1 else batch.only(own)
            assert of_part is not None
            self.batches.append(replace(of_part, part=part))

    def _noise_leaves(self, keys: list[Edge], leaves: Tensor) -> None:
        """Follow the noising edges out of the leaves, one grid index after another."""
        for (t, k), leaf in zip(keys, leaves, strict=True):
            for child in self.trees[t].children[k]:
                self.waiting[self.trees[t].nodes[child].index][t, child] = leaf
        for index in sorted(self.waiting):
            nodes, begun = self._arrived(index)
            sigma, data = self.sigmas[index], working(begun)
            eps = self._draw(nodes, -2 - index).to(data.dtype)
            x = ((1.0 - sigma) * data + sigma * eps).to(self.dtype)
            target = eps - data
            for chunk, _ in self._chunks(nodes):
                here = nodes[chunk]
                tree = self._index(t for t, _ in here)
                v = self.velocity(x[chunk], sigma, tree)
                self.forward += len(here)
                own = Segment(NOISING, index, self._index(range(len(here))), target[chunk])
                self._record(index, x[chunk], v, tree, [own], here)
