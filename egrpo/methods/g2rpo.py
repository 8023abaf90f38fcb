"""Granular-GRPO (G2RPO, arXiv 2510.01982): single SDE steps, leaves at several granularities.

Each branch has a leaf per granularity; advantages are normalized per granularity and summed.
"""

from __future__ import annotations

from typing import Literal

from egrpo.methods.base import COMMON, Changed, Entry, rates
from egrpo.methods.shared import Branching
from egrpo.settings import setting


class G2rpo(Branching):
    """Granular-GRPO: single SDE steps from an anchor, rewards at several granularities."""

    source = "Granular-GRPO, arXiv 2510.01982 and its public code"
    recipe = {**rates(full=2e-6), **COMMON}
    defaults = {
        "steps": 16,
        "group_size": Changed(12, "Samples G of each step."),
        "active": 8,
        "granularities": [1, 2],
    }
    entry = Entry(
        "Granular-GRPO",
        "the first half of the steps, one at a time; images at several granularities",
        "E-GRPO's tree without merging. Each branch is finished at several granularities (every "
        "step, every second step), which share their beginning; each gives an image of its own "
        "shape here. Rewards are normalized within images of one granularity, and a branch's "
        "advantages are summed.",
        "Departs from the public code: the beginning that the suffixes of one branch share is "
        "evaluated once; a stride that would pass over sigma = 0 ends there, where the code jumps "
        "there from the last step it took; one optimizer step an iteration (of its two scripts "
        "one takes eight).",
        {"active": 3, "group_size": 2},
    )

    name: Literal["g2rpo"] = setting("g2rpo")
    """Name of the method."""
