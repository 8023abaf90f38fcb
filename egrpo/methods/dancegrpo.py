"""DanceGRPO (arXiv 2505.07818): SDE of constant noise; of each sample a random part trains."""

from __future__ import annotations

from typing import Literal

from egrpo.core.tree import Tree
from egrpo.methods.base import COMMON, Context, Entry, rates
from egrpo.methods.shared import Chained
from egrpo.settings import setting

DANCE = "DanceGRPO, arXiv 2505.07818 and its public code"


class DanceGrpo(Chained):
    """DanceGRPO: SDE of constant noise on all steps, a random part of each sample's trains."""

    source = DANCE
    recipe = {**rates(full=1e-5, lora=3e-4), **COMMON, "train.updates": 3}
    defaults = {
        "steps": 16,
        "dynamics": "dance_sde",
        "noise_level": 0.3,
        "group_size": 12,
        "initial_noise": "same",
    }
    entry = Entry(
        "DanceGRPO",
        "all steps but the last; a random 60% of each sample's steps trains",
        "Stochastic at every step but the last, with noise of constant strength (Dance-SDE). All "
        "samples start from the same noise, evaluated apart as in the public code. Of each sample "
        "a random part of the steps trains.",
        "Departs from the public code: initial noise is shared within a prompt, not by all prompts "
        "of a process.",
    )

    name: Literal["dancegrpo"] = setting("dancegrpo")
    """Name of the method."""
    trained_fraction: float = setting(0.6, source=DANCE, unit="1", gt=0.0, le=1.0)
    """Part of all steps but the last that trains, drawn per sample."""

    def tree(self, context: Context) -> Tree:
        """SDE on all steps but the last, of which each sample trains some of its own.

        The last step is Euler's: the public code decodes its prediction of the data, which no
        noise reaches.
        """
        stochastic = tuple(range(self.steps - 1))
        count = max(1, int(len(stochastic) * self.trained_fraction))
        every = range(self.group_size)
        trained = (context.choose(stochastic, count, "trained", k) for k in every)
        return self.chains(trained, stochastic=stochastic)
