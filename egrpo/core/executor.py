"""The one executor: runs any forest of rollout trees, all live nodes of a grid index together.

Per grid index i the latents that have children are evaluated once each: first the sources of
trained edges, in chunks that the training pass repeats exactly (so that the on-policy ratio is
exactly 1), then the rest in micro-batches. Every edge out of a latent shares its velocity.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from egrpo.core.schedule import Sigmas
from egrpo.core.transitions import log_prob, transition, transition_distance
from egrpo.core.tree import ROOT, Node, Tree

VelocityFn = Callable[[Tensor, float, Tensor], Tensor]
"""``velocity(x [B, ...], sigma, tree [B] int64) -> v [B, ...]``; ``tree`` selects the prompt."""

NoiseFn = Callable[[int, int, int], Tensor]
"""``noise(tree, start, sample)``: standard normal of one latent's shape; start -1 is the root."""


@dataclass(frozen=True)
class Segment:
    """Trained edges of one batch that share dynamics and end.

    Attributes:
        dynamics, stop: of these edges.
        rows: [E] int64, the source of each edge in the batch.
        x_next: [E, ...], where each edge arrived, in storage dtype.
    """

    dynamics: str
    stop: int
    rows: Tensor
    x_next: Tensor


@dataclass(frozen=True)
class TrainBatch:
    """Branch points of one grid index and the trained edges that leave them.

    Attributes:
        start: grid index of the sources.
        x: [B, ...] source latents; one forward/backward serves all their edges.
        tree: [B] int64, prompt of each source.
        segments: the edges; concatenated in order they number E.
        edges: E positions in ``Rollout.edges``.
        log_prob: [E] float32, under the weights that sampled.
    """

    start: int
    x: Tensor
    tree: Tensor
    segments: tuple[Segment, ...]
    edges: tuple[int, ...]
    log_prob: Tensor

    def log_probs(self, v: Tensor, sigmas: Sigmas, noise_level: float) -> Tensor:
        """Log-probabilities [E] of the edges given velocities ``v`` [B, ...] at the sources."""
        parts = []
        for seg in self.segments:
            mean, std = transition(
                self.x[seg.rows],
                v[seg.rows],
                sigmas,
                self.start,
                seg.stop,
                seg.dynamics,
                noise_level,
            )
            parts.append(log_prob(seg.x_next, mean, std, seg.dynamics))
        return torch.cat(parts)

    def distance(self, v: Tensor, v_ref: Tensor, sigmas: Sigmas, noise_level: float) -> Tensor:
        """Distance [E] of each edge's mean from the one under velocities ``v_ref`` [B, ...]."""
        parts = []
        for seg in self.segments:
            of = (sigmas, self.start, seg.stop, seg.dynamics, noise_level)
            mean, std = transition(self.x[seg.rows], v[seg.rows], *of)
            reference, _ = transition(self.x[seg.rows], v_ref[seg.rows], *of)
            length = sigmas[self.start] - sigmas[seg.stop]
            parts.append(transition_distance(mean, reference, std, length))
        return torch.cat(parts)


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
    edges: list[tuple[int, int]] = field(default_factory=list)
    batches: list[TrainBatch] = field(default_factory=list)
    forward: int = 0


Key = tuple[int, int]  # (tree, node)


class _Executor:
    """State of one run: latents that wait at the grid indices ahead."""

    def __init__(
        self,
        trees: Sequence[Tree],
        sigmas: Sigmas,
        velocity: VelocityFn,
        noise: NoiseFn,
        noise_level: float,
        micro_batch: int,
        train_micro_batch: int,
        dtype: torch.dtype,
        device: torch.device,
        suffix_velocity: VelocityFn,
    ) -> None:
        self.trees, self.sigmas, self.noise = trees, sigmas, noise
        self.velocity, self.suffix_velocity = velocity, suffix_velocity
        self.noise_level = noise_level
        self.micro_batch, self.train_micro_batch = micro_batch, train_micro_batch
        self.dtype, self.device = dtype, device
        self.waiting: dict[int, list[tuple[list[Key], Tensor]]] = defaultdict(list)
        self.edges: list[Key] = []
        self.batches: list[TrainBatch] = []
        self.forward = 0

    def node(self, key: Key) -> Node:
        return self.trees[key[0]].nodes[key[1]]

    def trains(self, key: Key) -> bool:
        """Whether a trained edge leaves this node."""
        tree, k = key
        return k in self.trees[tree].branch_points

    def draw(self, keys: Sequence[tuple[int, int, int]]) -> Tensor:
        """Noise for (tree, start, sample) triples, stacked, on the device."""
        return torch.stack([self.noise(*key) for key in keys]).to(self.device)

    def plant(self) -> None:
        """Put the initial noise of every tree at index 0."""
        keys = [
            (t, k)
            for t, tree in enumerate(self.trees)
            for k, node in enumerate(tree.nodes)
            if node.parent == ROOT
        ]
        x = self.draw([(t, -1, self.trees[t].nodes[k].sample) for t, k in keys])
        self.waiting[0].append((keys, x.to(self.dtype)))

    def arrived(self, index: int) -> tuple[list[Key], Tensor]:
        """Everything that waits at ``index``, ordered by (trained first, tree, node)."""
        chunks = self.waiting.pop(index, [])
        keys = [key for chunk, _ in chunks for key in chunk]
        x = torch.cat([latents for _, latents in chunks])
        order = sorted(range(len(keys)), key=lambda r: (not self.trains(keys[r]), keys[r]))
        return [keys[r] for r in order], x[torch.tensor(order, device=x.device)]

    def chunks(self, keys: list[Key]) -> Iterator[tuple[int, int, bool]]:
        """Ranges (begin, end, trained) over ordered keys; trained sources have their own."""
        trained = sum(1 for key in keys if self.trains(key))
        for begin in range(0, trained, self.train_micro_batch):
            yield begin, min(begin + self.train_micro_batch, trained), True
        for begin in range(trained, len(keys), self.micro_batch):
            yield begin, min(begin + self.micro_batch, len(keys)), False

    def step(self, index: int) -> None:
        """Evaluate the velocity of every latent at ``index`` and send its children on."""
        if index not in self.waiting:
            return
        keys, x = self.arrived(index)
        for begin, end, trained in self.chunks(keys):
            tree = torch.tensor([key[0] for key in keys[begin:end]], device=self.device)
            evaluate = self.velocity if trained else self.suffix_velocity
            v = evaluate(x[begin:end], self.sigmas[index], tree)
            self.forward += end - begin
            self.branch(index, keys[begin:end], x[begin:end], v, tree)

    def branch(self, index: int, keys: list[Key], x: Tensor, v: Tensor, tree: Tensor) -> None:
        """Follow all edges out of ``keys``, those of equal end and dynamics together."""
        bundles: dict[tuple[str, int, bool], list[tuple[int, Key]]] = defaultdict(list)
        for row, (t, k) in enumerate(keys):
            for child in self.trees[t].children[k]:
                node = self.trees[t].nodes[child]
                bundles[node.dynamics, node.index, node.trained].append((row, (t, child)))
        segments: list[Segment] = []
        edges: list[Key] = []
        for (dynamics, stop, trained), bundle in bundles.items():
            rows = torch.tensor([row for row, _ in bundle], device=self.device)
            children = [child for _, child in bundle]
            mean, std = transition(
                x[rows], v[rows], self.sigmas, index, stop, dynamics, self.noise_level
            )
            if std > 0:
                eps = self.draw([(t, index, self.node((t, c)).sample) for t, c in children])
                mean = mean + std * eps
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
        """Keep what the training pass needs: sources, arrivals, behaviour log-probabilities."""
        numbers = tuple(range(len(self.edges), len(self.edges) + len(edges)))
        batch = TrainBatch(index, x, tree, segments, numbers, torch.empty(0))
        old = batch.log_probs(v, self.sigmas, self.noise_level)
        self.batches.append(TrainBatch(index, x, tree, segments, numbers, old))
        self.edges.extend(edges)


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
    suffix_velocity: VelocityFn | None = None,
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
            the weights), for nodes whose log-probability nobody needs.

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
        suffix_velocity or velocity,
    )
    run.plant()
    for index in range(len(sigmas) - 1):
        run.step(index)
    keys, leaves = run.arrived(len(sigmas) - 1)
    predicted = sum(tree.cost.forward for tree in trees)
    if run.forward != predicted:
        raise RuntimeError(f"executed {run.forward} network evaluations, predicted {predicted}")
    return Rollout(leaves, tuple(t for t, _ in keys), run.edges, run.batches, run.forward)
