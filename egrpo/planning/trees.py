"""From a run's settings to its grid, plan, trees and cost. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Protocol

from egrpo.config.models import RunConfig
from egrpo.core.plan import Plan, make_plan
from egrpo.core.schedule import Sigmas
from egrpo.core.seeds import shuffled
from egrpo.core.spread import Spread, allocate, choose_threshold
from egrpo.core.tree import Tree
from egrpo.errors import UserError
from egrpo.methods import shapes as methods
from egrpo.methods.settings import (
    Awm,
    BranchGrpo,
    Branching,
    DanceGrpo,
    DiffusionNft,
    Egrpo,
    EgrpoEfficient,
    FlowGrpo,
    FlowGrpoFast,
    ForwardProcess,
    G2rpo,
    Merging,
    MixGrpo,
    MixGrpoFlash,
    TempflowGrpo,
)


def training_sigmas(run: RunConfig) -> Sigmas:
    """The grid that a run samples on."""
    return run.schedule.sigmas(run.model, run.method.steps, stock=run.method.stock_grid)


def monitor_sigmas(run: RunConfig) -> Sigmas:
    """The grid of the monitors: evaluation's steps at training's size."""
    return run.schedule.sigmas(run.model, run.evaluate.steps, stock=True)


def evaluation_sigmas(run: RunConfig) -> Sigmas:
    """The grid of the evaluation, which is the same for all methods."""
    return run.schedule.sigmas(run.evaluation_model, run.evaluate.steps, stock=True)


def learning_rate(run: RunConfig) -> float:
    """The rate the optimizer gets."""
    lora = run.model.tuning == "lora"
    rate = run.train.learning_rate_lora if lora else run.train.learning_rate_full
    return rate * run.train.learning_rate_scale


def needs_plan(run: RunConfig) -> bool:
    """Whether the run's method merges steps."""
    return isinstance(run.method, Merging)


def plan_of(run: RunConfig, sigmas: Sigmas, spreads: Sequence[Spread] = ()) -> Plan:
    """The merge plan of an E-GRPO run.

    Args:
        run: settings.
        sigmas: the grid.
        spreads: measured spread of the trained rewards, where the plan depends on it.

    Raises:
        UserError: if the threshold is out of reach and ``on_unreachable`` says error, or the plan
            depends on spread and none is given or enough.
    """
    method = run.method
    assert isinstance(method, Merging)
    if method.reads_profile and not spreads:
        raise UserError(
            f"run {run.run}: method.threshold: auto and method.allocation: profile need the "
            "measured profile; `snakemake --cores all plans` makes it, without training anything"
        )
    try:
        tau = method.threshold
        if tau == "auto" and method.span is None:
            tau = choose_threshold(spreads, method.measure, method.spread_factor).threshold
        made = make_plan(
            sigmas,
            method.active_steps,
            threshold=None if method.span else float(tau),
            span=method.span,
            noise_level=method.noise_level,
            dynamics=method.dynamics,
            measure=method.measure,
            on_unreachable=method.on_unreachable,
        )
        if method.allocation == "profile":
            made = replace(made, samples=allocate(made, spreads, method.group_size))
    except ValueError as error:
        raise UserError(f"run {run.run}: method.threshold, method.active: {error}") from None
    return made


def reads_profile(run: RunConfig) -> bool:
    """Whether the run's plan depends on measured spread."""
    return isinstance(run.method, Merging) and run.method.reads_profile


def closed_form_plan(run: RunConfig) -> Plan | None:
    """The plan of a run that does not read its profile; None for a method without plans."""
    return plan_of(run, training_sigmas(run)) if needs_plan(run) else None


# -- one tree ----------------------------------------------------------------------------------


class Choose(Protocol):
    """Draws ``count`` of ``items``, ascending; a function of what it is for and nothing else."""

    def __call__(self, items: Iterable[int], count: int, *what: int | str) -> tuple[int, ...]:
        """The items drawn."""
        ...


def draw(*parts: int | str) -> Choose:
    """A :class:`Choose` for one run, iteration and prompt."""

    def choose(items: Iterable[int], count: int, *what: int | str) -> tuple[int, ...]:
        return tuple(sorted(shuffled(items, *parts, *what)[:count]))

    return choose


@dataclass(frozen=True)
class Occasion:
    """What a tree may depend on beside its method's settings."""

    plan: Plan | None
    sigmas: Sigmas
    iteration: int
    choose: Choose


def _branching(m: Branching, at: Occasion) -> dict[str, Any]:
    """Arguments that the methods share which branch from an anchor."""
    steps = m.active_steps if at.plan is None else at.plan.active
    count = m.active_per_iteration or len(steps)
    return {
        "active": steps if count >= len(steps) else at.choose(steps, count, "active"),
        "anchors": m.anchors,
        "granularities": m.granularities,
        "suffix": m.suffix,
    }


def _egrpo(m: Merging, at: Occasion) -> Tree:
    assert at.plan is not None
    return methods.egrpo(at.plan, m.group_size, **_branching(m, at))


def _g2rpo(m: G2rpo, at: Occasion) -> Tree:
    return methods.g2rpo(m.steps, m.group_size, m.dynamics, **_branching(m, at))


def _tempflow_grpo(m: TempflowGrpo, at: Occasion) -> Tree:
    return methods.tempflow_grpo(
        at.sigmas, m.group_size, m.dynamics, m.noise_level, **_branching(m, at)
    )


def _flow_grpo(m: FlowGrpo, at: Occasion) -> Tree:
    return methods.flow_grpo(m.steps, m.group_size, m.dynamics, m.trained_fraction, m.initial_noise)


def _flow_grpo_fast(m: FlowGrpoFast, at: Occasion) -> Tree:
    (start,) = at.choose(m.window_starts, 1, "window")
    return methods.windowed(
        m.steps, m.group_size, m.dynamics, start=start, size=m.window_size, noise=m.initial_noise
    )


def _dancegrpo(m: DanceGrpo, at: Occasion) -> Tree:
    eligible = range(m.steps - 1)
    count = max(1, int(len(eligible) * m.trained_fraction))
    trained = [at.choose(eligible, count, "trained", k) for k in range(m.group_size)]
    return methods.dancegrpo(m.steps, m.group_size, m.dynamics, trained, m.initial_noise)


def _mixgrpo(m: MixGrpo, at: Occasion) -> Tree:
    after = (m.suffix, m.suffix_ratio) if isinstance(m, MixGrpoFlash) else ("ode", 1.0)
    return methods.windowed(
        m.steps,
        m.group_size,
        m.dynamics,
        start=m.window_start(at.iteration),
        size=m.window_size,
        noise=m.initial_noise,
        suffix=after[0],
        suffix_ratio=after[1],
    )


def _branchgrpo(m: BranchGrpo, at: Occasion) -> Tree:
    return methods.branchgrpo(m.steps, m.splits, m.dynamics, m.untrained(at.iteration))


def _forward_process(m: ForwardProcess, at: Occasion) -> Tree:
    times = [at.choose(m.times, m.times_per_sample, "times", k) for k in range(m.group_size)]
    weight = m.weight if isinstance(m, Awm) else 1.0
    return methods.forward_process(m.steps, m.group_size, times, m.solver, weight)


TREES: dict[type[Any], Callable[[Any, Occasion], Tree]] = {
    Egrpo: _egrpo,
    EgrpoEfficient: _egrpo,
    G2rpo: _g2rpo,
    TempflowGrpo: _tempflow_grpo,
    FlowGrpo: _flow_grpo,
    FlowGrpoFast: _flow_grpo_fast,
    DanceGrpo: _dancegrpo,
    MixGrpo: _mixgrpo,
    MixGrpoFlash: _mixgrpo,
    BranchGrpo: _branchgrpo,
    DiffusionNft: _forward_process,
    Awm: _forward_process,
}
"""How each method's settings become a tree."""


def tree_of(run: RunConfig, plan: Plan | None, iteration: int = 1, prompt: int = 0) -> Tree:
    """The rollout tree of one prompt (by id) in one iteration (counted from 1)."""
    sigmas = plan.sigmas if plan else training_sigmas(run)
    occasion = Occasion(plan, sigmas, iteration, draw(run.seed, "tree", iteration, prompt))
    return TREES[type(run.method)](run.method, occasion)


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

    Of runs that differ in seed alone the first is looked at; a plan that waits for its profile
    is looked at when it is made.

    Raises:
        UserError: naming run and key.
    """
    seen: set[str] = set()
    for run in runs.values():
        if run.arm not in seen and not reads_profile(run):
            seen.add(run.arm)
            check_parts(run, closed_form_plan(run))


def check_parts(run: RunConfig, plan: Plan | None) -> None:
    """Raise UserError if a run's tree has fewer parts than ``train.updates`` asks for."""
    parts = run.train.updates
    filled = len(set(tree_of(run, plan).parts(parts).values()))
    if filled < parts:
        raise UserError(
            f"run {run.run}: train.updates: the trained steps of method {run.method.name} can be "
            f"cut into {filled} parts only, not {parts}"
        )


# -- cost --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunCost:
    """Network evaluations, factor of guidance included.

    Attributes:
        forward: while sampling.
        train: forward+backward passes; at most this many where leaves are pruned by reward.
        reference: forwards of the base model and of the averaged weights for their penalties.
    """

    forward: int
    train: int
    reference: int

    @property
    def total(self) -> int:
        """All of them, each counted once."""
        return self.forward + self.train + self.reference


def cost_of(run: RunConfig, trees: Iterable[Tree]) -> RunCost:
    """What rolling out and training ``trees`` will execute."""
    factor = 2 if run.model.guidance_scale > 1 else 1
    forward = train = 0
    for tree in trees:
        forward += factor * tree.cost.forward
        train += factor * tree.passes(run.train.updates)
    return RunCost(forward, train, references(run) * train)


def references(run: RunConfig) -> int:
    """Forwards of other weights beside each forward+backward, for the penalties."""
    return (run.train.kl_weight > 0) + (run.train.ema_weight > 0)


def iteration_cost(run: RunConfig, plan: Plan | None, iteration: int, count: int) -> RunCost:
    """Cost of one iteration of a run with ``count`` training prompts."""
    ids = prompt_ids(run, iteration, count)
    return cost_of(run, (tree_of(run, plan, iteration, prompt) for prompt in ids))


def run_cost(run: RunConfig, plan: Plan | None, count: int) -> RunCost:
    """Cost of a run with ``count`` training prompts."""
    each = [iteration_cost(run, plan, n, count) for n in range(1, run.train.iterations + 1)]
    return RunCost(
        sum(c.forward for c in each), sum(c.train for c in each), sum(c.reference for c in each)
    )
