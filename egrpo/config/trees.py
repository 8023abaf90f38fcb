"""From a run's settings to its grid, plan, tree and cost. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from egrpo.config.models import Egrpo, FlowGrpo, RunConfig
from egrpo.core import methods
from egrpo.core.plan import Plan, make_plan
from egrpo.core.schedule import Sigmas, shifted_sigmas
from egrpo.core.tree import Tree
from egrpo.errors import UserError


def training_sigmas(run: RunConfig) -> Sigmas:
    """The grid that a run samples on."""
    return shifted_sigmas(run.method.steps, run.schedule.shift)


def learning_rate(run: RunConfig) -> float:
    """The rate the optimizer gets."""
    lora = run.model.tuning == "lora"
    rate = run.train.learning_rate_lora if lora else run.train.learning_rate_full
    return rate * run.train.learning_rate_scale


def needs_plan(run: RunConfig) -> bool:
    """Whether the run's method merges steps."""
    return isinstance(run.method, Egrpo)


def plan_of(run: RunConfig, sigmas: Sigmas) -> Plan:
    """The merge plan of an E-GRPO run.

    Raises:
        UserError: if the threshold is out of reach and ``on_unreachable`` says error.
    """
    method = run.method
    assert isinstance(method, Egrpo)
    try:
        return make_plan(
            sigmas,
            method.active_steps,
            threshold=None if method.span else method.threshold,
            span=method.span,
            noise_level=method.noise_level,
            dynamics=method.dynamics,
            measure=method.measure,
            on_unreachable=method.on_unreachable,
        )
    except ValueError as error:
        raise UserError(f"run {run.run}: method.threshold, method.active: {error}") from None


def _egrpo(method: Any, plan: Plan | None) -> Tree:
    assert plan is not None
    return methods.egrpo(plan, method.group_size)


def _flow_grpo(method: Any, plan: Plan | None) -> Tree:
    return methods.flow_grpo(
        method.steps, method.group_size, method.dynamics, method.trained_fraction
    )


TREES: dict[type[Any], Callable[[Any, Plan | None], Tree]] = {
    Egrpo: _egrpo,
    FlowGrpo: _flow_grpo,
}
"""How each method's settings become its tree."""


def tree_of(run: RunConfig, plan: Plan | None) -> Tree:
    """The rollout tree of one prompt."""
    return TREES[type(run.method)](run.method, plan)


@dataclass(frozen=True)
class RunCost:
    """Network evaluations, factor of guidance included.

    Attributes:
        forward_per_prompt, train_per_prompt: of one prompt in one iteration; ``train`` counts
            forward+backward passes.
        reference_per_prompt: forwards of the KL reference.
        forward, train, reference: of the whole run.
    """

    forward_per_prompt: int
    train_per_prompt: int
    reference_per_prompt: int
    forward: int
    train: int
    reference: int


def cost_of(run: RunConfig, tree: Tree) -> RunCost:
    """What a run will execute, predicted from its tree."""
    factor = 2 if run.model.guidance_scale > 1 else 1
    forward, train = (factor * n for n in tree.cost)
    reference = train if run.train.kl_weight > 0 else 0
    prompts = run.train.iterations * run.train.prompts_per_iteration
    return RunCost(
        forward, train, reference, forward * prompts, train * prompts, reference * prompts
    )
