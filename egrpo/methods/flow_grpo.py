"""Flow-GRPO (arXiv 2505.05470), SDE on all steps, and Flow-GRPO-Fast, in a random window."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from egrpo.core.tree import Tree
from egrpo.methods.base import BATCH_STD, COMMON, FLOW, FLOW_AVERAGE, Context, Entry, rates
from egrpo.methods.shared import Chained, Windowed
from egrpo.settings import setting


class FlowGrpo(Chained):
    """Flow-GRPO: SDE on all steps of independent trajectories."""

    stock_grid = True
    source = FLOW
    recipe = {
        **rates(lora=3e-4),
        **COMMON,
        "train.kl_weight": 0.04,
        "train.kl": "transition",
        **FLOW_AVERAGE,
        "train.updates": 2,
        **BATCH_STD,
    }
    defaults = {"steps": 10}
    entry = Entry(
        "Flow-GRPO",
        "all steps of every sample at once",
        "Independent samples, each from its own noise, stochastic at every step. The reward of the "
        "image is credited to all trained steps of its sample alike; the last step is stochastic "
        "too and does not train. Every evaluation of a trained step is repeated with a backward "
        "pass, so an iteration has few evaluations, most of which train.",
        "Departs from the public code: weights are averaged once at every eighth optimizer step, "
        "where the code does so again with every batch until the next; groups of equal rewards "
        "have zero advantage but stay in the penalty.",
    )

    name: Literal["flow_grpo"] = setting("flow_grpo")
    """Name of the method."""
    trained_fraction: float = setting(0.99, source=FLOW, unit="1", gt=0.0, le=1.0)
    """First part of the steps that trains."""

    def tree(self, context: Context) -> Tree:
        """SDE on all steps; the first ``trained_fraction`` train.

        As in its public code, each sample starts from its own noise, and the last step adds noise
        like every other one but does not train (fraction 0.99).
        """
        first = tuple(range(max(1, int(self.steps * self.trained_fraction))))
        return self.chains((first,) * self.group_size)


class FlowGrpoFast(Windowed):
    """Flow-GRPO-Fast: a shared ODE prefix, a random window of SDE steps, ODE."""

    stock_grid = True
    source = FLOW
    recipe = {**FlowGrpo.recipe, "train.clip_range": 1e-5, "train.kl_weight": 0.0}
    defaults = {
        "steps": 10,
        "dynamics": "cps",
        "noise_level": 0.8,
        "group_size": 24,
        "window_size": 3,
        "initial_noise": "shared",
    }
    entry = Entry(
        "Flow-GRPO-Fast",
        "a random window of steps in the first half",
        "The samples of a prompt share their beginning, which is evaluated once; then come some "
        "stochastic steps, in a window drawn for each iteration and prompt, and the rest is "
        "deterministic.",
        "Departs from the public code: the window is drawn per prompt, not per batch; the prefix "
        "is shared, as its description and first version have it, the current one does not; "
        "weights are averaged as for Flow-GRPO.",
    )

    name: Literal["flow_grpo_fast"] = setting("flow_grpo_fast")
    """Name of the method."""
    window_part: float = setting(0.5, source=FLOW, unit="1", gt=0.0, le=1.0)
    """The window lies in this first part of the schedule."""

    @property
    def window_starts(self) -> range:
        """Grid indices at which the window may start."""
        part = min(int(self.steps * self.window_part), self.steps - 2)
        return range(part - self.window_size + 1)

    def tree(self, context: Context) -> Tree:
        """A window at a random place, drawn per iteration and prompt."""
        (start,) = context.choose(self.window_starts, 1, "window")
        return self.window(start)

    def _faults(self) -> Iterator[str]:
        yield from super()._faults()
        if not self.window_starts:
            part = f"{self.window_part} of {self.steps} steps"
            yield f"window_part: {part} has no room for a window of {self.window_size}"
