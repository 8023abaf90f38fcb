"""TempFlow-GRPO (arXiv 2508.04324): single SDE steps from anchors, loss weighted by their noise."""

from __future__ import annotations

from typing import Literal

from egrpo.core.noise import STD
from egrpo.core.tree import Tree
from egrpo.methods.base import COMMON, FLOW_AVERAGE, Changed, Context, Entry, rates
from egrpo.methods.shared import Branching
from egrpo.settings import setting


class TempflowGrpo(Branching):
    """TempFlow-GRPO: single SDE steps from anchors, loss weighted by their noise."""

    stock_grid = True
    source = "TempFlow-GRPO, arXiv 2508.04324 and its public code"
    recipe = {
        **rates(lora=3e-4),
        **COMMON,
        "train.kl_weight": 0.004,
        "train.kl": "divergence",
        **FLOW_AVERAGE,
        "train.updates": 2,
        "advantage.ddof": 0,
        "advantage.eps": 1e-4,
    }
    defaults = {
        "steps": 10,
        "group_size": Changed(6, "Successors K of each step and anchor."),
        "anchors": 4,
        "active": 9,
    }
    entry = Entry(
        "TempFlow-GRPO",
        "every step but the last, one at a time; the loss weighted by a step's noise",
        "Branches from an anchor at every step but the last; four anchors a prompt, of which one "
        "is drawn. A step's loss is weighted by the standard deviation of its noise (the thickness "
        "of its line), so that early steps count more.",
        "Departs from the public code: a random part of the steps (`active`) keeps the weights' "
        "mean at 1; the network's weights are averaged once at every eighth optimizer step, not "
        "again with every batch until the next.",
        {"group_size": 2, "anchors": 1},
    )

    name: Literal["tempflow_grpo"] = setting("tempflow_grpo")
    """Name of the method."""

    def tree(self, context: Context) -> Tree:
        """Branches whose loss weight is a step's standard deviation over the mean of all.

        Groups are the successors of one step, prompt and initial noise.
        """
        starts = self.some(self.active_steps, context)
        std = [STD[self.dynamics](context.sigmas, i, i + 1, self.noise_level) for i in starts]
        mean = sum(std) / len(std)
        return self.branches(starts, tuple(s / mean for s in std))
