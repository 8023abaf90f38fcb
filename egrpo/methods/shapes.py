"""The shapes of rollout trees: four serve all methods. Needs no torch.

:func:`branches` from an anchor, :func:`chains` of independent samples, :func:`split_tree`, and
:func:`noised` samples. Arguments are data (grid, sizes, drawn choices); equal arguments give the
very same :class:`~egrpo.core.tree.Tree`.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from egrpo.core.noise import NOISING
from egrpo.core.plan import Plan
from egrpo.core.tree import Node, Tree, TreeBuilder

Steps = tuple[int, ...]


def thinned(start: int, steps: int, ratio: float) -> Steps:
    """Stops of a suffix from ``start`` to T over ``ratio`` of the grid, at least one.

    As many as MixGRPO-Flash keeps of the points from the last stochastic step to T (public code of
    arXiv 2507.21802); evenly over grid indices, which is evenly in unshifted time.
    """
    length = steps - start
    if ratio == 1.0:
        return tuple(range(start + 1, steps + 1))
    count = max(1, int((length + 1) * ratio) - 1)
    return tuple(start + round(length * n / count) for n in range(1, count + 1))


@lru_cache(maxsize=256)
def branches(
    steps: int,
    spans: tuple[tuple[int, int], ...],
    samples: int | Steps,
    dynamics: str,
    *,
    trained: bool,
    anchors: int = 1,
    granularities: Steps = (1,),
    suffix: str = "ode",
    weights: tuple[float, ...] = (),
) -> Tree:
    """Anchor ODE from one noise; at each (start, span) SDE edges, then a deterministic suffix.

    The anchor runs only as far as the last start. Each (start, span) of each anchor is one group,
    numbered in the order given; sample k draws the same noise in every span of one start.

    Args:
        steps: T.
        spans: (start, span) of every branching.
        samples: edges of each group; one number, or one for each of ``spans``.
        dynamics, trained: of the branches.
        anchors: initial noises, each with an anchor of its own.
        granularities: strides of the suffix; each gives every branch a leaf of its own label,
            and common parts are shared.
        suffix: dynamics of the suffix, ``ode`` or ``dpm2``.
        weights: loss weight of each group; empty for 1.
    """
    builder = TreeBuilder(steps)
    sizes = (samples,) * len(spans) if isinstance(samples, int) else samples
    for n in range(anchors):
        anchor = [builder.root(n)]
        for stop in range(1, max((start for start, _ in spans), default=0) + 1):
            anchor.append(builder.add(Node(anchor[-1], stop, "ode")))
        for number, ((start, span), size) in enumerate(zip(spans, sizes, strict=True)):
            how = (trained, n * len(spans) + number, weights[number] if weights else 1.0)
            for k in range(n * size, (n + 1) * size):
                branch = builder.add(Node(anchor[start], start + span, dynamics, k, *how))
                _grow_suffixes(builder, branch, granularities, suffix)
    return builder.build()


def _grow_suffixes(builder: TreeBuilder, branch: int, strides: Steps, dynamics: str) -> None:
    """One suffix for each granularity from ``branch`` to T; equal beginnings are one path.

    GranularGRPO's grid ``sigmas[:k+2] + sigmas[k+2::g]`` (arXiv 2510.01982), with T added where
    the stride would pass over it.
    """
    steps, start = builder.steps, builder.nodes[branch].index
    known: dict[tuple[int, int], int] = {}
    for label, stride in enumerate(strides):
        node = branch
        for stop in range(start + 1, steps, stride):
            if (node, stop) not in known:
                known[node, stop] = builder.add(Node(node, stop, dynamics))
            node = known[node, stop]
        builder.add(Node(node, steps, dynamics, label=label))


def planned_branches(
    plan: Plan, group_size: int, *, active: Iterable[int] | None = None, **how: Any
) -> Tree:
    """:func:`branches` at the steps of a merge plan: i -> i + span, then the suffix.

    A plan that allocates samples overrides ``group_size``; ``active`` takes some of its steps;
    ``how``: ``anchors``, ``granularities`` and ``suffix`` of :func:`branches`.
    """
    wanted = set(plan.active if active is None else active)
    sizes = plan.samples or (group_size,) * len(plan.active)
    rows = zip(plan.active, plan.spans, sizes, strict=True)
    kept = [((i, span), size) for i, span, size in rows if i in wanted]
    spans, samples = map(tuple, zip(*kept, strict=True))
    return branches(plan.steps, spans, samples, plan.dynamics, trained=True, **how)


@lru_cache(maxsize=1024)
def chains(
    steps: int,
    samples: int,
    dynamics: str = "ode",
    trained: tuple[Steps, ...] = (),
    *,
    stochastic: Steps | None = None,
    noise: str = "own",
    suffix: tuple[str, Steps] | None = None,
) -> Tree:
    """``samples`` trajectories, stochastic in a part of the steps, with all, some or none trained.

    All edges are one group: a sample is compared with all samples of its prompt, whichever of its
    steps train.

    Args:
        steps, samples: T and G.
        dynamics: of the stochastic steps.
        trained: for each sample the steps that train; empty for none.
        stochastic: consecutive grid indices of stochastic steps; None for all.
        noise: initial noise: ``own`` for each sample; ``same`` for all, evaluated apart as public
            code does; ``shared``: the same, evaluated once while the samples agree. Optimizer
            steps are cut by sample all the same.
        suffix: (dynamics, stops) after the last stochastic step; None for Euler at every index.
    """
    builder = TreeBuilder(steps)
    window = tuple(range(steps)) if stochastic is None else stochastic
    first, last = (window[0], window[-1] + 1) if window else (steps, steps)
    after, stops = suffix or ("ode", tuple(range(last + 1, steps + 1)))
    begun = 0
    for sample, chosen in enumerate(trained or ((),) * samples):
        if sample == 0 or noise != "shared":
            root = builder.root(sample if noise == "own" else 0)
            begun = builder.through(root, range(1, first + 1))
        node = begun
        for i in window:
            node = builder.add(Node(node, i + 1, dynamics, sample, i in chosen))
        builder.through(node, stops, after)
    return builder.build(by_edge=noise == "shared")


@lru_cache(maxsize=256)
def split_tree(steps: int, splits: Steps, dynamics: str, trained: Steps) -> Tree:
    """One noise; every latent at an index in ``splits`` has two successors, all others one.

    All edges are stochastic but the last of each branch, which is Euler's and leaves no noise in
    the image; those that start at an index in ``trained`` train. Group = start, so that the edges
    of one depth are compared.
    """
    builder = TreeBuilder(steps)
    level = [builder.root()]
    for i in range(steps):
        parents = [p for p in level for _ in range(2 if i in splits else 1)]
        last = i == steps - 1
        how, trains = ("ode", False) if last else (dynamics, i in trained)
        level = [
            builder.add(Node(p, i + 1, how, sample=n, trained=trains, group=i))
            for n, p in enumerate(parents)
        ]
    return builder.build()


@lru_cache(maxsize=1024)
def noised(steps: int, times: tuple[Steps, ...], suffix: str = "ode", weight: float = 1.0) -> Tree:
    """Deterministic samples from own noise; sample k is noised to the indices ``times[k]``.

    The noising edges are what trains; group 0, since all of a prompt's samples are compared.
    """
    builder = TreeBuilder(steps)
    for sample, indices in enumerate(times):
        leaf = builder.through(builder.root(sample), range(1, steps + 1), suffix)
        for index in indices:
            builder.add(Node(leaf, index, NOISING, sample, trained=True, weight=weight))
    return builder.build()
