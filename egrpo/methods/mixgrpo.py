"""MixGRPO (arXiv 2507.21802): SDE in a sliding window; Flash, with fewer steps after it."""

from __future__ import annotations

from typing import Literal

from egrpo.core.tree import Tree
from egrpo.methods.base import COMMON, MIX, Context, Entry, Solver, rates
from egrpo.methods.shared import Windowed
from egrpo.settings import setting


class MixGrpo(Windowed):
    """MixGRPO: SDE in a window that slides over the schedule, ODE elsewhere."""

    source = MIX
    recipe = {**rates(full=1e-5), **COMMON, "train.updates": 4}
    defaults = {"steps": 25}
    entry = Entry(
        "MixGRPO",
        "a window of steps that slides from noise to image over the iterations",
        "Stochastic and trained within a window, deterministic before and after it. The window "
        "moves on by one step every 25 iterations; iteration 51 is drawn.",
        "Departs from the public code: the window does not shrink at its end but returns to 0; "
        "weights of several rewards are those of the settings, not of sum 1.",
        iteration=51,
    )

    name: Literal["mixgrpo"] = setting("mixgrpo")
    """Name of the method."""
    window_every: int = setting(25, source=MIX, unit="iterations", ge=1)
    """Iterations between two moves of the window."""
    window_stride: int = setting(1, source=MIX, unit="grid intervals", ge=0)
    """Steps of one move; 0 keeps the window at 0."""

    def window_start(self, iteration: int) -> int:
        """Grid index of the window in an iteration counted from 1; back to 0 from the end."""
        moves = (iteration - 1) // self.window_every
        if self.window_stride == 0:
            return 0
        last = self.steps - 2 - self.window_size
        return moves % (last // self.window_stride + 1) * self.window_stride

    def tree(self, context: Context) -> Tree:
        """The window where it is in this iteration; every sample starts from the same noise."""
        return self.window(self.window_start(context.iteration))


class MixGrpoFlash(MixGrpo):
    """MixGRPO-Flash: MixGRPO with fewer, second-order steps after the window."""

    defaults = {"window_every": 20}
    entry = Entry(
        "MixGRPO-Flash",
        "the same window, with fewer second-order steps after it",
        "MixGRPO whose suffix keeps a part of the steps and takes them by second-order "
        "DPM-Solver++. Iteration 41 is drawn.",
        "Departs from the public code: the steps after the window are indices of the training "
        "grid, and the first of them is Euler's, since noise came before it.",
        {"steps": 16},
        41,
    )

    name: Literal["mixgrpo_flash"] = setting("mixgrpo_flash")  # type: ignore[assignment]
    """Name of the method."""
    suffix: Solver = setting("dpm2", source=MIX)
    """Solver of the deterministic suffix: Euler, or second-order DPM-Solver++."""
    suffix_ratio: float = setting(0.4, source=MIX, unit="1", gt=0.0, le=1.0)
    """Part of the steps after the window that is kept."""

    def tree(self, context: Context) -> Tree:
        """MixGRPO's, whose suffix goes over ``suffix_ratio`` of the grid."""
        return self.window(self.window_start(context.iteration), self.suffix, self.suffix_ratio)
