"""Rollout trees: a method is a function that returns one of these, and nothing else.

A node is a latent at a grid index. The edge that leads to it is a transition over
[parent.index, index). Leaves lie at sigma = 0 and are decoded and rewarded. A trained edge gets
the mean reward of its leaves, normalized within its group of comparable edges. Forward-process
methods train *noising* edges, which lead from a leaf back to an earlier index. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
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
        sample: which noise to draw; edges of equal start and sample share theirs.
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
        for k, fault in self._faults():
            raise ValueError(f"node {k}: {fault}")

    def _faults(self) -> Iterator[tuple[int, str]]:
        """Nodes that cannot be and why; what follows the first presumes that it was none."""
        for k, node in enumerate(self.nodes):
            if node.parent == ROOT:
                if node.index != 0 or node.trained:
                    yield k, "a root is untrained noise at index 0"
                continue
            if not ROOT < node.parent < k:
                yield k, f"parent {node.parent} must come before it"
            start = self.nodes[node.parent].index
            if node.dynamics == NOISING:
                if start != self.steps or not 0 <= node.index < start or not node.trained:
                    leads = "a noising edge is trained and leads from a leaf to an index before it"
                    yield k, f"{leads}, not {start} -> {node.index}"
            elif not start < node.index <= self.steps:
                yield k, f"edge {start} -> {node.index} must go forward"
            elif node.dynamics not in STD:
                yield k, f"unknown dynamics {node.dynamics!r}"
            elif node.trained and node.dynamics in DETERMINISTIC:
                yield k, "an ODE edge has no log-probability to train"
        for k, node in enumerate(self.nodes):
            if node.dynamics == NOISING:
                if self.children[k]:
                    yield k, "nothing follows a noising edge"
            elif not self.children[k] and node.index != self.steps:
                yield k, f"the branch ends at index {node.index}, not at sigma 0"

    @cached_property
    def children(self) -> tuple[tuple[int, ...], ...]:
        """For each node the positions of its children."""
        lists: list[list[int]] = [[] for _ in self.nodes]
        for k, node in enumerate(self.nodes):
            if node.parent != ROOT:
                lists[node.parent].append(k)
        return tuple(tuple(c) for c in lists)

    @cached_property
    def paths(self) -> tuple[int, ...]:
        """For each node the first one of its path: of deterministic steps without a branch."""
        first = list(range(len(self.nodes)))
        for k, node in enumerate(self.nodes):
            if node.dynamics in DETERMINISTIC and len(self.children[node.parent]) == 1:
                first[k] = first[node.parent]
        return tuple(first)

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
        for k, node in reversed([*enumerate(self.nodes)]):
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
            return self.cost.train
        return len({(self.source(k), part) for k, part in self.parts(updates).items()})

    @cached_property
    def cost(self) -> Cost:
        """Predicted evaluations: ``forward`` one per node that something follows, and one per
        noised latent, for its behavior policy; ``train`` one per source (see :meth:`passes`)."""
        forward = sum(
            node.dynamics == NOISING or (bool(after) and node.index < self.steps)
            for node, after in zip(self.nodes, self.children, strict=True)
        )
        return Cost(forward, len(self.sources))


class TreeBuilder:
    """Grows a tree node by node; positions are returned and used as parents."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.nodes: list[Node] = []

    def add(self, node: Node) -> int:
        """Add a latent and the transition that leads to it."""
        self.nodes.append(node)
        return len(self.nodes) - 1

    def root(self, sample: int = 0) -> int:
        """Add initial noise."""
        return self.add(Node(ROOT, 0, sample=sample))

    def through(self, parent: int, stops: Iterable[int], dynamics: str = "ode") -> int:
        """Add a chain of deterministic steps through the indices ``stops``; returns its end."""
        for stop in stops:
            parent = self.add(Node(parent, stop, dynamics))
        return parent

    def build(self, *, by_edge: bool = False) -> Tree:
        """The finished, checked tree."""
        return Tree(self.steps, tuple(self.nodes), by_edge)
