"""The one executor: runs any forest of rollout trees, all live nodes of a grid index together.

Per grid index i the latents that have children are evaluated once each: first the sources of
trained edges, in chunks that the training pass repeats exactly (so that the on-policy ratio is
exactly 1), then the rest in micro-batches. Every edge out of a latent shares its velocity. Noising
edges come last.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count, groupby

import torch
from torch import Tensor

from egrpo.core.noise import NOISING, SQUARED_ERROR, Matching
from egrpo.core.rollout import Rollout, Segment, TrainBatch
from egrpo.core.schedule import Sigmas
from egrpo.core.transitions import data_prediction, dpm2_mean, transition, working
from egrpo.core.tree import ROOT, Node, Tree

VelocityFn = Callable[[Tensor, float, Tensor], Tensor]
"""``velocity(x [B, ...], sigma, tree [B] int64) -> v [B, ...]``; ``tree`` selects the prompt."""

SuffixFn = Callable[[Tensor, float, Tensor, tuple[int, ...]], Tensor]
"""The same with the path [B] that each latent is on: along deterministic steps it stays the same,
so that what was computed for a batch a step ago belongs to the batch with the same paths."""

NoiseFn = Callable[[int, int, int], Tensor]
"""``noise(tree, start, sample)``: standard normal of one latent's shape. ``start`` is the grid
index that an edge leaves; -1 for a root, ``-2 - i`` for a noising edge to index i."""


Key = tuple[int, int]  # (tree, node)


@dataclass
class _Executor:
    """One run: what :func:`execute` is given, and latents that wait at the grid indices ahead."""

    trees: Sequence[Tree]
    sigmas: Sigmas
    velocity: VelocityFn
    noise: NoiseFn
    noise_level: float
    micro_batch: int
    train_micro_batch: int
    dtype: torch.dtype
    device: torch.device
    suffix_velocity: SuffixFn | None
    steps: int  # of the optimizer
    matching: Matching

    def __post_init__(self) -> None:
        self.parts = [tree.parts(self.steps) for tree in self.trees]  # of edges
        self.first: list[dict[int, int]] = [{} for _ in self.trees]  # of sources: their first part
        for tree, of_edges, of_sources in zip(self.trees, self.parts, self.first, strict=True):
            for k, part in of_edges.items():
                source = tree.source(k)
                of_sources[source] = min(part, of_sources.get(source, part))
        self.paths: dict[Key, int] = {}
        self.new_path = count()
        self.waiting: dict[int, list[tuple[list[Key], Tensor]]] = defaultdict(list)
        self.memory: dict[Key, tuple[int, Tensor]] = {}  # index and data prediction of a parent
        self.edges: list[Key] = []
        self.batches: list[TrainBatch] = []
        self.forward = 0

    def node(self, key: Key) -> Node:
        return self.trees[key[0]].nodes[key[1]]

    def part(self, key: Key) -> int | None:
        """The first optimizer step of a source; None where no trained edge leaves."""
        return self.first[key[0]].get(key[1])

    def draw(self, keys: Sequence[tuple[int, int, int]]) -> Tensor:
        """Noise for (tree, start, sample) triples, stacked, on the device."""
        return torch.stack([self.noise(*key) for key in keys]).to(self.device)

    def start(self) -> None:
        """Put the initial noise of every tree at index 0."""
        keys = [
            (t, k)
            for t, tree in enumerate(self.trees)
            for k, node in enumerate(tree.nodes)
            if node.parent == ROOT
        ]
        self.paths |= {key: next(self.new_path) for key in keys}
        x = self.draw([(t, -1, self.trees[t].nodes[k].sample) for t, k in keys])
        self.waiting[0].append((keys, x.to(self.dtype)))

    def arrived(self, index: int) -> tuple[list[Key], Tensor]:
        """Everything that waits at ``index``: sources by optimizer step, then the rest, each in
        order of (tree, node)."""
        chunks = self.waiting.pop(index, [])
        keys = [key for chunk, _ in chunks for key in chunk]
        x = torch.cat([latents for _, latents in chunks])

        def rank(row: int) -> tuple[bool, int, Key]:
            part = self.part(keys[row])
            return part is None, part or 0, keys[row]

        order = sorted(range(len(keys)), key=rank)
        return [keys[r] for r in order], x[torch.tensor(order, device=x.device)]

    def chunks(self, keys: list[Key]) -> Iterator[tuple[int, int, int | None]]:
        """Ranges (begin, end, part) over ordered keys; sources of one part have their own."""
        begin = 0
        for part, members in groupby(keys, key=self.part):
            limit = self.micro_batch if part is None else self.train_micro_batch
            stop = begin + len(list(members))
            while begin < stop:
                end = min(begin + limit, stop)
                yield begin, end, part
                begin = end

    def step(self, index: int) -> None:
        """Evaluate the velocity of every latent at ``index`` and send its children on."""
        if index not in self.waiting:
            return
        keys, x = self.arrived(index)
        for begin, end, part in self.chunks(keys):
            tree = torch.tensor([key[0] for key in keys[begin:end]], device=self.device)
            of = x[begin:end], self.sigmas[index], tree
            if part is None and self.suffix_velocity is not None:
                v = self.suffix_velocity(*of, tuple(self.paths[key] for key in keys[begin:end]))
            else:
                v = self.velocity(*of)
            self.forward += end - begin
            self.branch(index, keys[begin:end], x[begin:end], v, tree)

    def branch(self, index: int, keys: list[Key], x: Tensor, v: Tensor, tree: Tensor) -> None:
        """Follow all edges out of ``keys``, those of equal end and dynamics together."""
        bundles: dict[tuple[str, int, bool, int], list[tuple[int, Key]]] = defaultdict(list)
        behind = {key: self.memory.pop(key) for key in keys if key in self.memory}
        for row, key in enumerate(keys):
            path = self.paths.pop(key)
            children_of = self.trees[key[0]].children[key[1]]
            for child in children_of:
                node = self.node((key[0], child))
                alone = len(children_of) == 1 and node.dynamics in ("ode", "dpm2")
                self.paths[key[0], child] = path if alone else next(self.new_path)
                before = behind[key][0] if node.dynamics == "dpm2" and key in behind else -1
                bundle = bundles[node.dynamics, node.index, node.trained, before]
                bundle.append((row, (key[0], child)))
        segments: list[Segment] = []
        edges: list[Key] = []
        for (dynamics, stop, trained, before), bundle in bundles.items():
            rows = torch.tensor([row for row, _ in bundle], device=self.device)
            children = [child for _, child in bundle]
            of = (x[rows], v[rows], self.sigmas, index, stop)
            if before >= 0:
                data = torch.stack([behind[keys[row]][1] for row, _ in bundle])
                mean, std = dpm2_mean(*of, before, data), 0.0
            else:
                mean, std = transition(*of, dynamics, self.noise_level)
            if std > 0:
                eps = self.draw([(t, index, self.node((t, c)).sample) for t, c in children])
                mean = mean + std * eps
            if dynamics == "dpm2":
                data = data_prediction(*of[:2], self.sigmas[index])
                self.memory |= {c: (index, d) for c, d in zip(children, data, strict=True)}
            x_next = mean.to(self.dtype)  # rounded BEFORE any log-probability is taken
            self.waiting[stop].append((children, x_next))
            if trained:
                segments.append(Segment(dynamics, stop, rows, x_next))
                edges.extend(children)
        if segments:
            self.record(index, x, v, tree, tuple(segments), edges)

    def record(
        self,
        index: int,
        x: Tensor,
        v: Tensor,
        tree: Tensor,
        segments: tuple[Segment, ...],
        edges: list[Key],
    ) -> None:
        """Keep what the training pass needs, a batch for each optimizer step; number its edges."""
        numbers = tuple(range(len(self.edges), len(self.edges) + len(edges)))
        none = torch.empty(0)
        batch = TrainBatch(index, 0, x, v, tree, segments, numbers, none, self.matching)
        batch = replace(batch, log_prob=batch.log_probs(v, self.sigmas, self.noise_level))
        self.edges.extend(edges)
        members: dict[int, set[int]] = defaultdict(set)
        for number, (t, k) in zip(numbers, edges, strict=True):
            members[self.parts[t][k]].add(number)
        for part, own in sorted(members.items()):
            of_part = batch if len(members) == 1 else batch.only(own)
            assert of_part is not None
            self.batches.append(replace(of_part, part=part))

    def noise_leaves(self, keys: list[Key], leaves: Tensor) -> None:
        """Follow the noising edges out of the leaves, one grid index after another."""
        rows: dict[Key, int] = {}
        arriving: dict[int, list[Key]] = defaultdict(list)
        for row, (t, k) in enumerate(keys):
            for child in self.trees[t].children[k]:
                rows[t, child] = row
                arriving[self.node((t, child)).index].append((t, child))
        for index, nodes in sorted(arriving.items()):
            sigma = self.sigmas[index]
            nodes.sort(key=lambda key: (self.part(key), key))
            data = working(leaves[torch.tensor([rows[n] for n in nodes], device=self.device)])
            eps = self.draw([(t, -2 - index, self.node((t, c)).sample) for t, c in nodes])
            eps = eps.to(data.dtype)
            x = ((1.0 - sigma) * data + sigma * eps).to(self.dtype)
            for begin, end, _ in self.chunks(nodes):
                tree = torch.tensor([t for t, _ in nodes[begin:end]], device=self.device)
                v = self.velocity(x[begin:end], sigma, tree)
                self.forward += end - begin
                own = torch.arange(end - begin, device=self.device)
                target = Segment(NOISING, index, own, (eps - data)[begin:end])
                here = nodes[begin:end]
                self.record(index, x[begin:end], v, tree, (target,), here)

    def rollout(self) -> Rollout:
        """All of it, from the initial noise to the noising edges."""
        self.start()
        for index in range(len(self.sigmas) - 1):
            self.step(index)
        keys, leaves = self.arrived(len(self.sigmas) - 1)
        self.noise_leaves(keys, leaves)
        predicted = sum(tree.cost.forward for tree in self.trees)
        if self.forward != predicted:
            raise RuntimeError(
                f"executed {self.forward} network evaluations, predicted {predicted}"
            )
        return Rollout(leaves, tuple(t for t, _ in keys), self.edges, self.batches, self.forward)


@torch.no_grad()
def execute(
    trees: Sequence[Tree],
    sigmas: Sigmas,
    velocity: VelocityFn,
    noise: NoiseFn,
    *,
    noise_level: float,
    micro_batch: int,
    train_micro_batch: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    suffix_velocity: SuffixFn | None = None,
    parts: int = 1,
    matching: Matching = SQUARED_ERROR,
) -> Rollout:
    """Run a forest, one tree per prompt, without gradients.

    Args:
        trees: one per prompt, all over the grid ``sigmas``.
        sigmas: T + 1 floats from 1 to 0.
        velocity: the model; called once for every node that has children.
        noise: standard normal of one latent's shape for (tree, start, sample).
        noise_level: a or eta of the stochastic edges.
        micro_batch: most latents in one call.
        train_micro_batch: most branch points in one call, here and in the training pass.
        dtype: storage type of latents; every latent is rounded to it before it is used.
        device: where latents live.
        suffix_velocity: the same model in a form that is cheaper to evaluate (LoRA merged into
            the weights, features kept from the step before), for nodes whose log-probability
            nobody needs.
        parts: optimizer steps that the training pass is cut into (``Tree.parts``).
        matching: log-probability of noising edges.

    Raises:
        ValueError: if a tree does not fit the grid.
        RuntimeError: if the count executed differs from the count predicted from the trees.
    """
    for t, tree in enumerate(trees):
        if tree.steps != len(sigmas) - 1:
            raise ValueError(f"tree {t} has {tree.steps} steps, the schedule {len(sigmas) - 1}")
    run = _Executor(
        trees,
        sigmas,
        velocity,
        noise,
        noise_level,
        micro_batch,
        train_micro_batch or micro_batch,
        dtype,
        torch.device(device),
        suffix_velocity,
        parts,
        matching,
    )
    return run.rollout()
