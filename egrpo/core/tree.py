"""Rollout trees: a method is a function that returns one of these, and nothing else.

A node is a latent at a grid index. The edge that leads to it is a transition over
[parent.index, index). Leaves lie at sigma = 0 and are decoded and rewarded. A trained edge gets
the mean reward of its leaves, normalized within its group of comparable edges. Forward-process
methods train *noising* edges, which lead from a leaf back to an earlier index.
Needs no torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from egrpo.core.noise import DETERMINISTIC, NOISING, STD

ROOT = -1


@dataclass(frozen=True, slots=True)
class Node:
    """One latent and the edge that makes it.

    Attributes:
        parent: position of the parent in ``Tree.nodes``; ``ROOT`` for initial noise.
        index: grid index of this latent.
        dynamics: of the edge from the parent, a key of ``noise.STD`` or ``NOISING``; "" for a root.
        sample: which noise to draw: seeds are functions of (step, sample), so that two edges
            with the same start and sample share their noise.
        trained: whether the edge's log-probability enters the loss.
        group: trained edges of one prompt with equal group are compared with each other; those
            that share their leaves count once.
        weight: factor of the edge's loss.
        label: of a leaf: rewards are normalized among leaves of one label, and an edge's
            advantages are summed over the labels below it.
    """

    parent: int
    index: int
    dynamics: str = ""
    sample: int = 0
    trained: bool = False
    group: int = 0
    weight: float = 1.0
    label: int = 0


class Cost(NamedTuple):
    """Network evaluations of a tree: ``forward`` while sampling, ``train`` forward+backward."""

    forward: int
    train: int


@dataclass(frozen=True)
class Tree:
    """The rollout of one prompt over a grid of ``steps`` intervals.

    Attributes:
        steps: T.
        nodes: parents before their children.
        by_edge: edges out of one latent may train in different optimizer steps of an iteration,
            each with a forward/backward of its own; otherwise they stay together.

    Raises:
        ValueError: if a parent comes after its child, an edge does not go forward on the grid,
            a trained edge is deterministic, a branch ends before sigma = 0, or a noising edge
            does not start at a leaf.
    """

    steps: int
    nodes: tuple[Node, ...]
    by_edge: bool = False

    def __post_init__(self) -> None:
        for k, node in enumerate(self.nodes):
            if node.parent == ROOT:
                if node.index != 0 or node.trained:
                    raise ValueError(f"node {k}: a root is untrained noise at index 0")
                continue
            if not ROOT < node.parent < k:
                raise ValueError(f"node {k}: parent {node.parent} must come before it")
            start = self.nodes[node.parent].index
            if node.dynamics == NOISING:
                if start != self.steps or not 0 <= node.index < start or not node.trained:
                    raise ValueError(
                        f"node {k}: a noising edge is trained and leads from a leaf to an index "
                        f"before it, not {start} -> {node.index}"
                    )
                continue
            if not start < node.index <= self.steps:
                raise ValueError(f"node {k}: edge {start} -> {node.index} must go forward")
            if node.dynamics not in STD:
                raise ValueError(f"node {k}: unknown dynamics {node.dynamics!r}")
            if node.trained and node.dynamics in DETERMINISTIC:
                raise ValueError(f"node {k}: an ODE edge has no log-probability to train")
        for k, node in enumerate(self.nodes):
            ends = node.index == self.steps or node.dynamics == NOISING
            if not self.children[k] and not ends:
                raise ValueError(f"node {k}: the branch ends at index {node.index}, not at sigma 0")
            if self.children[k] and node.dynamics == NOISING:
                raise ValueError(f"node {k}: nothing follows a noising edge")

    @cached_property
    def children(self) -> tuple[tuple[int, ...], ...]:
        """For each node the positions of its children."""
        lists: list[list[int]] = [[] for _ in self.nodes]
        for k, node in enumerate(self.nodes):
            if node.parent != ROOT:
                lists[node.parent].append(k)
        return tuple(tuple(c) for c in lists)

    @cached_property
    def leaves(self) -> tuple[int, ...]:
        """Positions of the nodes at sigma = 0."""
        return tuple(k for k, node in enumerate(self.nodes) if node.index == self.steps)

    @cached_property
    def trained(self) -> tuple[int, ...]:
        """Positions of the nodes whose edge is trained."""
        return tuple(k for k, node in enumerate(self.nodes) if node.trained)

    def source(self, k: int) -> int:
        """The node where the network is evaluated for trained edge ``k``.

        Its parent; for a noising edge the noised latent itself.
        """
        node = self.nodes[k]
        return k if node.dynamics == NOISING else node.parent

    @cached_property
    def sources(self) -> frozenset[int]:
        """Positions of the nodes where the network is evaluated for training."""
        return frozenset(self.source(k) for k in self.trained)

    @cached_property
    def leaves_below(self) -> dict[int, tuple[int, ...]]:
        """For each trained edge the ranks in ``leaves`` of the leaves that its reward comes from.

        Those that descend from it; for a noising edge the leaf that it starts from.
        """
        below: list[list[int]] = [[] for _ in self.nodes]
        rank = {leaf: r for r, leaf in enumerate(self.leaves)}
        for k in reversed(range(len(self.nodes))):
            node = self.nodes[k]
            if node.dynamics == NOISING:
                below[k].append(rank[node.parent])
                continue
            if k in rank:
                below[k].append(rank[k])
            if node.parent != ROOT:
                below[node.parent].extend(below[k])
        return {k: tuple(sorted(below[k])) for k in self.trained}

    def parts(self, count: int) -> dict[int, int]:
        """Part 0..count-1 of each trained edge: the optimizer step of an iteration that it is in.

        A source goes with the first leaf below its trained edges (an edge with its own first leaf
        where ``by_edge``); those of one first leaf stay together, and these sets, in order of
        leaf, are cut into ``count`` parts of equal number. So independent trajectories are cut by
        sample, the branches of an anchor by step.
        """
        unit = {k: k if self.by_edge else self.source(k) for k in self.trained}
        first: dict[int, int] = {}
        for k in self.trained:
            leaf = self.leaves_below[k][0]
            first[unit[k]] = min(leaf, first.get(unit[k], leaf))
        order = {leaf: n for n, leaf in enumerate(sorted(set(first.values())))}
        return {k: order[first[unit[k]]] * count // len(order) for k in self.trained}

    def passes(self, updates: int) -> int:
        """Forward/backward passes of an iteration of ``updates`` optimizer steps.

        One per source; of edges that train in several steps one per source and step.
        """
        if not self.by_edge:
            return len(self.sources)
        return len({(self.source(k), part) for k, part in self.parts(updates).items()})

    @cached_property
    def cost(self) -> Cost:
        """Predicted evaluations: ``forward`` one per node that something follows, and one per
        noised latent, for its behaviour policy; ``train`` one per source (see :meth:`passes`)."""
        noised = sum(1 for node in self.nodes if node.dynamics == NOISING)
        follows = sum(
            1 for k, node in enumerate(self.nodes) if self.children[k] and node.index < self.steps
        )
        return Cost(follows + noised, len(self.sources))


class TreeBuilder:
    """Grows a tree node by node; positions are returned and used as parents."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.nodes: list[Node] = []

    def root(self, sample: int = 0) -> int:
        """Add initial noise."""
        self.nodes.append(Node(ROOT, 0, sample=sample))
        return len(self.nodes) - 1

    def edge(
        self,
        parent: int,
        index: int,
        dynamics: str,
        *,
        sample: int = 0,
        trained: bool = False,
        group: int = 0,
        weight: float = 1.0,
        label: int = 0,
    ) -> int:
        """Add one transition from ``parent`` to grid ``index``."""
        self.nodes.append(Node(parent, index, dynamics, sample, trained, group, weight, label))
        return len(self.nodes) - 1

    def through(
        self, parent: int, stops: Iterable[int], dynamics: str = "ode", *, label: int = 0
    ) -> int:
        """Add a chain of deterministic steps through the indices ``stops``; returns its end."""
        for stop in stops:
            parent = self.edge(parent, stop, dynamics, label=label)
        return parent

    def finish(self, parent: int) -> int:
        """ODE, one interval at a time, from ``parent`` to sigma = 0."""
        return self.through(parent, range(self.nodes[parent].index + 1, self.steps + 1))

    def build(self, *, by_edge: bool = False) -> Tree:
        """The finished, checked tree."""
        return Tree(self.steps, tuple(self.nodes), by_edge)
