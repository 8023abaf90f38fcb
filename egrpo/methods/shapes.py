"""The methods: each a function that returns a rollout tree. Needs no torch.

A method takes keyword arguments that are data (grid, plan, sizes, drawn choices) and returns a
:class:`~egrpo.core.tree.Tree`. The executor, the advantage, the loss and the trainer are shared.
Four shapes serve all: :func:`branches` from an anchor, :func:`chains` of independent samples,
:func:`split_tree`, and :func:`noised` samples. Equal arguments give the very same tree.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache

from egrpo.core.noise import NOISING, STD
from egrpo.core.plan import Plan
from egrpo.core.schedule import Sigmas
from egrpo.core.tree import Tree, TreeBuilder

Steps = tuple[int, ...]

# -- what follows a stochastic step ------------------------------------------------------------


def strided(start: int, steps: int, granularity: int) -> Steps:
    """Stops of a deterministic suffix from ``start``: one interval, then every g-th index, and T.

    GranularGRPO's grid ``sigmas[:k+2] + sigmas[k+2::g]`` (arXiv 2510.01982), with T added where
    the stride would pass over it.
    """
    return (*range(start + 1, steps, granularity), steps)


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


# -- shapes ------------------------------------------------------------------------------------


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
        dynamics: of the branches.
        trained: whether they train.
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
            anchor.append(builder.edge(anchor[-1], stop, "ode"))
        for number, ((start, span), size) in enumerate(zip(spans, sizes, strict=True)):
            for sample in range(size):
                branch = builder.edge(
                    anchor[start],
                    start + span,
                    dynamics,
                    sample=n * size + sample,
                    trained=trained,
                    group=n * len(spans) + number,
                    weight=weights[number] if weights else 1.0,
                )
                grow_suffixes(builder, branch, granularities, suffix)
    return builder.build()


def grow_suffixes(builder: TreeBuilder, branch: int, granularities: Steps, dynamics: str) -> None:
    """One suffix for each granularity from ``branch`` to T; equal beginnings are one path."""
    steps, start = builder.steps, builder.nodes[branch].index
    known: dict[tuple[int, int], int] = {}
    for label, granularity in enumerate(granularities):
        node = branch
        *inner, end = strided(start, steps, granularity)
        for stop in inner:
            if (node, stop) not in known:
                known[node, stop] = builder.edge(node, stop, dynamics)
            node = known[node, stop]
        builder.edge(node, end, dynamics, label=label)


@lru_cache(maxsize=1024)
def chains(
    steps: int,
    samples: int,
    dynamics: str = "ode",
    *,
    stochastic: Steps | None = None,
    trained: tuple[Steps, ...] = (),
    noise: str = "own",
    suffix: tuple[str, Steps] | None = None,
) -> Tree:
    """``samples`` trajectories, stochastic in a part of the steps, with all, some or none trained.

    All edges are one group: a sample is compared with all samples of its prompt, whichever of its
    steps train.

    Args:
        steps: T.
        samples: G.
        dynamics: of the stochastic steps.
        stochastic: consecutive grid indices of stochastic steps; None for all.
        trained: for each sample the steps that train; empty for none.
        noise: initial noise: ``own`` for each sample; ``same`` for all, evaluated apart as public
            code does; ``shared``: the same, evaluated once while the samples agree. Optimizer
            steps are cut by sample all the same.
        suffix: (dynamics, stops) after the last stochastic step; None for Euler at every index.
    """
    builder = TreeBuilder(steps)
    window = tuple(range(steps)) if stochastic is None else stochastic
    first, last = (window[0], window[-1] + 1) if window else (steps, steps)
    after, stops = suffix or ("ode", tuple(range(last + 1, steps + 1)))
    trunk = builder.through(builder.root(), range(1, first + 1)) if noise == "shared" else None
    for sample in range(samples):
        node = trunk
        if node is None:
            root = builder.root(sample if noise == "own" else 0)
            node = builder.through(root, range(1, first + 1))
        chosen = trained[sample] if trained else ()
        for i in window:
            node = builder.edge(node, i + 1, dynamics, sample=sample, trained=i in chosen)
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
        level = [
            builder.edge(
                p,
                i + 1,
                "ode" if last else dynamics,
                sample=n,
                trained=i in trained and not last,
                group=i,
            )
            for n, p in enumerate(parents)
        ]
    return builder.build()


@lru_cache(maxsize=1024)
def noised(
    steps: int, samples: int, times: tuple[Steps, ...], suffix: str = "ode", weight: float = 1.0
) -> Tree:
    """Deterministic samples from own noise; sample k is noised to the indices ``times[k]``.

    The noising edges are what trains; group 0, since all of a prompt's samples are compared.
    """
    builder = TreeBuilder(steps)
    for sample in range(samples):
        leaf = builder.through(builder.root(sample), range(1, steps + 1), suffix)
        for index in times[sample]:
            builder.edge(leaf, index, NOISING, sample=sample, trained=True, weight=weight)
    return builder.build()


# -- methods -----------------------------------------------------------------------------------


def egrpo(
    plan: Plan,
    group_size: int,
    *,
    active: Iterable[int] | None = None,
    anchors: int = 1,
    granularities: Sequence[int] = (1,),
    suffix: str = "ode",
) -> Tree:
    """E-GRPO (arXiv 2601.00423): one merged SDE step per active step, then ODE.

    For each active step i, ``group_size`` samples branch from the same anchor latent by one
    transition i -> i + span; the ODE goes on from i + span. Groups are the samples of one step.
    ``active`` takes some of the plan's steps, for a random subset per iteration; a plan that
    allocates samples overrides ``group_size``.

    Departs from the authors' public code, where it departs from their paper: every sample of a
    group is drawn, and the ODE restarts at the end of the merged step, not at i + 1. It takes one
    optimizer step an iteration, the code one after each active step (``train.updates``). The code's
    own configuration has leaves of two granularities, ``granular_list [1, 2]``, and learning rate
    1e-5; the paper has one granularity and 2e-6 (``granularities``, ``train.learning_rate_full``).
    """
    wanted = set(plan.active if active is None else active)
    sizes = plan.samples or (group_size,) * len(plan.active)
    rows = zip(plan.active, plan.spans, sizes, strict=True)
    kept = [(i, span, size) for i, span, size in rows if i in wanted]
    return branches(
        plan.steps,
        tuple((i, span) for i, span, _ in kept),
        tuple(size for *_, size in kept),
        plan.dynamics,
        trained=True,
        anchors=anchors,
        granularities=tuple(granularities),
        suffix=suffix,
    )


def g2rpo(
    steps: int,
    group_size: int,
    dynamics: str,
    *,
    active: Iterable[int],
    anchors: int = 1,
    granularities: Sequence[int],
    suffix: str = "ode",
) -> Tree:
    """Granular-GRPO (G2RPO, arXiv 2510.01982): single SDE steps, leaves at several granularities.

    Each branch has a leaf per granularity; advantages are normalised per granularity and summed.

    Departs from the public code: the beginning that the suffixes of one branch share is evaluated
    once; a stride that would pass over sigma = 0 ends there, where the code jumps there from the
    last step it took; one optimizer step an iteration (of its two scripts one takes eight).
    """
    return branches(
        steps,
        tuple((i, 1) for i in active),
        group_size,
        dynamics,
        trained=True,
        anchors=anchors,
        granularities=tuple(granularities),
        suffix=suffix,
    )


def tempflow_grpo(
    sigmas: Sigmas,
    group_size: int,
    dynamics: str,
    noise_level: float,
    *,
    active: Iterable[int],
    anchors: int,
    granularities: Sequence[int] = (1,),
    suffix: str = "ode",
) -> Tree:
    """TempFlow-GRPO (arXiv 2508.04324): single SDE steps, loss weighted by their noise.

    Groups are the successors of one step, prompt and initial noise. The weight of a step is its
    standard deviation over the mean of those that branch.

    Departs from the public code: a random part of the steps (``active``) keeps the weights'
    mean at 1; the network's weights are averaged once at every eighth optimizer step, not again
    with every batch until the next.
    """
    starts = tuple(active)
    std = [STD[dynamics](sigmas, i, i + 1, noise_level) for i in starts]
    mean = sum(std) / len(std)
    return branches(
        len(sigmas) - 1,
        tuple((i, 1) for i in starts),
        group_size,
        dynamics,
        trained=True,
        anchors=anchors,
        granularities=tuple(granularities),
        suffix=suffix,
        weights=tuple(s / mean for s in std),
    )


def flow_grpo(
    steps: int, group_size: int, dynamics: str, trained_fraction: float, noise: str = "own"
) -> Tree:
    """Flow-GRPO (arXiv 2505.05470): SDE on all steps, the first ``trained_fraction`` train.

    As in its public code, each sample starts from its own noise, and the last step adds noise
    like every other one but does not train (fraction 0.99).

    Departs from the public code: weights are averaged once at every eighth optimizer step, where
    the code does so again with every batch until the next; groups of equal rewards have zero
    advantage but stay in the penalty.
    """
    first = tuple(range(max(1, int(steps * trained_fraction))))
    return chains(steps, group_size, dynamics, trained=(first,) * group_size, noise=noise)


def windowed(
    steps: int,
    group_size: int,
    dynamics: str,
    *,
    start: int,
    size: int,
    noise: str,
    suffix: str = "ode",
    suffix_ratio: float = 1.0,
) -> Tree:
    """ODE, a trained window of ``size`` SDE steps from ``start``, a deterministic suffix.

    Flow-GRPO-Fast (public code of arXiv 2505.05470): a random window, the ODE before it shared.
    MixGRPO (arXiv 2507.21802): a window that slides over the iterations; every sample is evaluated
    from the same noise. Its Flash variant goes on by second-order DPM-Solver++ over
    ``suffix_ratio`` of the grid.

    Departs from the public codes. Fast: the window is drawn per prompt, not per batch; the prefix
    is shared, as its description and first version have it, the current one does not; weights are
    averaged as for Flow-GRPO. MixGRPO: the window does not shrink at its end but returns to
    0; weights of several rewards are those of the settings, not of sum 1. Flash: the steps after
    the window are indices of the training grid, and the first of them is Euler's, since noise came
    before it.
    """
    window = tuple(range(start, start + size))
    return chains(
        steps,
        group_size,
        dynamics,
        stochastic=window,
        trained=(window,) * group_size,
        noise=noise,
        suffix=(suffix, thinned(start + size, steps, suffix_ratio)),
    )


def dancegrpo(
    steps: int, group_size: int, dynamics: str, trained: Sequence[Steps], noise: str = "same"
) -> Tree:
    """DanceGRPO (arXiv 2505.07818): SDE on all steps; of each sample a random part trains.

    ``trained`` names the steps of each sample, drawn from all but the last. The last step is
    Euler's: the public code decodes its prediction of the data, which no noise reaches.

    Departs from the public code: initial noise is shared within a prompt, not by all prompts of a
    process.
    """
    return chains(
        steps,
        group_size,
        dynamics,
        stochastic=tuple(range(steps - 1)),
        trained=tuple(trained),
        noise=noise,
    )


def branchgrpo(
    steps: int, splits: Sequence[int], dynamics: str, untrained: Iterable[int] = ()
) -> Tree:
    """BranchGRPO (arXiv 2509.06040): a binary tree of SDE steps; an edge gets its leaves' mean.

    ``untrained`` are the starts that depth pruning takes out of the loss. Width pruning depends
    on rewards and comes after the rollout (:func:`egrpo.core.advantage.prune`).

    Departs from the public code: noise at a split is not scaled (the code's log-probability does
    not know of its factor 4); the last step is Euler's and does not train (the code trains it, but
    decodes the prediction of the data, so that its noise reaches no reward); edges are cut into
    optimizer steps by leaf, 16 at most, not shuffled by twelves; width pruning keeps the best
    leaves of the whole tree.
    """
    out = set(untrained)
    return split_tree(
        steps, tuple(splits), dynamics, tuple(i for i in range(steps) if i not in out)
    )


def forward_process(
    steps: int, group_size: int, times: Sequence[Steps], suffix: str, weight: float = 1.0
) -> Tree:
    """DiffusionNFT (arXiv 2509.16117) and AWM (arXiv 2509.25050): ODE samples, noised to train.

    ``times`` names the grid indices that each sample is noised to.

    Departs from the public codes. NFT: what is evaluated is the average that samples, not a second
    one. AWM: times are drawn without strata, by default from all of the first 12 of 14, as in its
    two recipes for PickScore, whose KL weight is the default too (its four for GenEval and OCR
    never noise to t = 1, and have 1e-3 and 3e-3); Euler's ODE in the place of SA-Solver; what is
    evaluated is the average of the penalty, not a second one (0.99 an epoch there); training starts
    with the first iteration, not the third.
    """
    return noised(steps, group_size, tuple(times), suffix, weight)
