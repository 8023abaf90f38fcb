"""The methods: each a function that returns a rollout tree. Needs no torch.

A method takes keyword arguments that are data (grid, plan, sizes) and returns a
:class:`~egrpo.core.tree.Tree`. The executor, the advantage, the loss and the trainer are shared.
"""

from __future__ import annotations

from collections.abc import Iterable

from egrpo.core.plan import Plan
from egrpo.core.tree import Tree, TreeBuilder


def branches(
    steps: int, spans: Iterable[tuple[int, int]], samples: int, dynamics: str, *, trained: bool
) -> Tree:
    """Anchor ODE from one noise; at each (start, span) ``samples`` SDE edges, then ODE to the end.

    The anchor runs only as far as the last start. Each (start, span) is one group, numbered in
    the order given; sample k draws the same noise in every span of one start.
    """
    builder = TreeBuilder(steps)
    wanted = list(spans)
    anchor = [builder.root()]
    for stop in range(1, max((start for start, _ in wanted), default=0) + 1):
        anchor.append(builder.edge(anchor[-1], stop, "ode"))
    for group, (start, span) in enumerate(wanted):
        for sample in range(samples):
            branch = builder.edge(
                anchor[start], start + span, dynamics, sample=sample, trained=trained, group=group
            )
            builder.finish(branch)
    return builder.build()


def chains(steps: int, samples: int, dynamics: str = "ode", *, trained: Iterable[int] = ()) -> Tree:
    """``samples`` independent trajectories with one dynamics; the steps in ``trained`` train.

    Every trajectory has its own initial noise. Group = step, so that a step's edges are compared
    over the samples of the prompt.
    """
    builder = TreeBuilder(steps)
    chosen = set(trained)
    for sample in range(samples):
        node = builder.root(sample)
        for i in range(steps):
            node = builder.edge(node, i + 1, dynamics, sample=sample, trained=i in chosen, group=i)
    return builder.build()


def egrpo(plan: Plan, group_size: int) -> Tree:
    """E-GRPO (arXiv 2601.00423): one merged SDE step per active step, then ODE.

    For each active step i, ``group_size`` samples branch from the same anchor latent by one
    transition i -> i + span; the ODE goes on from i + span. Groups are the samples of one step.

    Departs from the authors' public code, where it departs from their paper: every sample of a
    group is drawn, and the ODE restarts at the end of the merged step, not at i + 1.
    """
    spans = zip(plan.active, plan.spans, strict=True)
    return branches(plan.steps, spans, group_size, plan.dynamics, trained=True)


def flow_grpo(steps: int, group_size: int, dynamics: str, trained_fraction: float) -> Tree:
    """Flow-GRPO (arXiv 2505.05470): SDE on all steps, the first ``trained_fraction`` train.

    As in its public code, each sample starts from its own noise, and the last step adds noise
    like every other one but does not train (fraction 0.99).
    """
    return chains(steps, group_size, dynamics, trained=range(max(1, int(steps * trained_fraction))))
