"""From a run's settings to its grid, plan, trees and cost. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

from egrpo.config.models import RunConfig
from egrpo.core.plan import Plan
from egrpo.core.schedule import Sigmas
from egrpo.core.seeds import shuffled
from egrpo.core.spread import Spread
from egrpo.core.tree import Tree
from egrpo.errors import UserError
from egrpo.methods.base import Context
from egrpo.planning.grids import training_sigmas


def needs_plan(run: RunConfig) -> bool:
    """Whether the run's method merges steps."""
    return run.method.needs_plan


def reads_profile(run: RunConfig) -> bool:
    """Whether the run's plan depends on measured spread."""
    return run.method.reads_profile


def plan_of(run: RunConfig, sigmas: Sigmas, spreads: Sequence[Spread] = ()) -> Plan:
    """The merge plan, over a grid, of a run whose method needs one.

    Raises UserError if the threshold is out of reach and ``on_unreachable`` says error, or the
    plan depends on the measured spread of the trained rewards and none is given or enough.
    """
    if reads_profile(run) and not spreads:
        raise UserError(
            f"run {run.run}: method.threshold: auto and method.allocation: profile need the "
            "measured profile; `snakemake --cores all plans` makes it, without training anything"
        )
    try:
        return run.method.plan(sigmas, spreads)
    except ValueError as error:
        raise UserError(f"run {run.run}: method.threshold, method.active: {error}") from None


def closed_form_plan(run: RunConfig) -> Plan | None:
    """The plan of a run that does not read its profile; None for a method without plans."""
    return plan_of(run, training_sigmas(run)) if needs_plan(run) else None


def tree_of(run: RunConfig, plan: Plan | None, iteration: int = 1, prompt: int = 0) -> Tree:
    """The rollout tree of one prompt (by id) in one iteration (counted from 1)."""
    sigmas = plan.sigmas if plan else training_sigmas(run)
    seed = (run.seed, "tree", iteration, prompt)
    return run.method.tree(Context(plan, sigmas, iteration, seed))


def prompt_ids(run: RunConfig, iteration: int, count: int) -> tuple[int, ...]:
    """Prompts of an iteration, of ``count``: a permutation per epoch, none twice in one."""
    size = run.train.prompts_per_iteration
    epoch, place = divmod(iteration - 1, count // size)
    order = _epoch(run.seed, epoch, count)
    return order[place * size : (place + 1) * size]


@lru_cache(maxsize=64)
def _epoch(seed: int, epoch: int, count: int) -> tuple[int, ...]:
    return shuffled(range(count), seed, "prompts", epoch)


def check_trees(runs: Mapping[str, RunConfig]) -> None:
    """Refuse runs whose trees cannot be grown or cut into optimizer steps, before any training.

    Of runs that differ in seed alone the first is looked at; a plan that waits for its profile is
    looked at when it is made. Raises UserError naming run and key.
    """
    seen: set[str] = set()
    for run in runs.values():
        if run.arm not in seen and not reads_profile(run):
            seen.add(run.arm)
            check_parts(run, closed_form_plan(run))


def check_parts(run: RunConfig, plan: Plan | None) -> None:
    """Refuse a tree with too few parts for ``train.updates``, or a trained step without noise.

    Raises UserError naming run and key.
    """
    parts, tree, sigmas = run.train.updates, tree_of(run, plan), training_sigmas(run)
    if any(n.trained and n.dynamics == "cps" and sigmas[n.index] == 0.0 for n in tree.nodes):
        raise UserError(
            f"run {run.run}: method.dynamics: cps adds no noise at the last step, which method "
            f"{run.method.name} trains here: nothing could be learned; let it train fewer steps"
        )
    filled = len(set(tree.parts(parts).values()))
    if filled < parts:
        raise UserError(
            f"run {run.run}: train.updates: the trained steps of method {run.method.name} can be "
            f"cut into {filled} parts only, not {parts}"
        )


class RunCost(NamedTuple):
    """Network evaluations, factor of guidance included.

    ``forward`` while sampling; ``train``, forward+backward passes, at most so many where leaves are
    pruned by reward; ``reference``: of the base model and the averaged weights, for penalties.
    """

    forward: int
    train: int
    reference: int

    @property
    def total(self) -> int:
        """All of them, each counted once."""
        return sum(self)


def cost_of(run: RunConfig, trees: Iterable[Tree]) -> RunCost:
    """What rolling out and training ``trees`` will execute."""
    factor = run.model.evaluations_per_velocity
    each = list(trees)
    forward = factor * sum(tree.cost.forward for tree in each)
    train = factor * sum(tree.passes(run.train.updates) for tree in each)
    return RunCost(forward, train, references(run) * train)


def references(run: RunConfig) -> int:
    """Forwards of other weights beside each forward+backward, for the penalties."""
    return (run.train.kl_weight > 0) + (run.train.ema_weight > 0)


def trees_of(
    run: RunConfig, plan: Plan | None, iteration: int, count: int
) -> tuple[list[int], list[Tree]]:
    """Prompt ids of an iteration of a run with ``count`` training prompts, and their trees."""
    ids = prompt_ids(run, iteration, count)
    return list(ids), [tree_of(run, plan, iteration, prompt) for prompt in ids]


def iteration_cost(run: RunConfig, plan: Plan | None, iteration: int, count: int) -> RunCost:
    """Cost of one iteration of a run with ``count`` training prompts."""
    return cost_of(run, trees_of(run, plan, iteration, count)[1])


def run_cost(run: RunConfig, plan: Plan | None, count: int) -> tuple[RunCost, int]:
    """Cost of a run with ``count`` training prompts, and the images that its rollouts decode."""
    costs, images = [], 0
    for iteration in range(1, run.train.iterations + 1):
        _, trees = trees_of(run, plan, iteration, count)
        costs.append(cost_of(run, trees))
        images += sum(len(tree.leaves) for tree in trees)
    return RunCost(*map(sum, zip(*costs, strict=True))), images


def monitor_images(run: RunConfig) -> int:
    """Images of all monitors: of the untrained model, every so often, and after the end."""
    t = run.train
    looks = 1 + math.ceil(t.iterations / t.monitor_every) if t.monitor_every else 0
    return looks * t.monitor_prompts * t.monitor_samples
