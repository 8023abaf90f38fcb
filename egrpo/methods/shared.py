"""Settings and trees that several methods share: branching, a window, noised samples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, ClassVar, Literal

from egrpo.core.tree import Tree
from egrpo.methods.base import FLOW, MIX, NFT, Changed, Context, Method, Shape, Solver, Stochastic
from egrpo.methods.shapes import Steps, branches, chains, noised, thinned
from egrpo.settings import PAPER, setting

SAMPLES = "Samples G per prompt."


class Branching(Stochastic):
    """What the methods that branch from one anchor share."""

    shape: ClassVar[Shape] = "branches"

    active: int | list[int] = setting(8, source=f"{PAPER}, Table 3", unit="steps, or grid indices")
    """Number of first steps that branch, or the list of their grid indices."""
    active_per_iteration: int | None = setting(None, unit="steps", ge=1)
    """Random number of these that branch in one iteration and prompt; null for all."""
    anchors: int = setting(1, source=PAPER, unit="anchors", ge=1, le=1024)
    """Initial noises per prompt; each has its anchor and its groups."""
    granularities: list[int] = setting([1], source=PAPER, unit="grid intervals")
    """Strides of the suffix after a branch; several give a leaf each."""
    suffix: Solver = setting("ode", source=PAPER)
    """Solver of the deterministic suffix: Euler, or second-order DPM-Solver++."""

    @property
    def active_steps(self) -> list[int]:
        """Grid indices that branch."""
        if isinstance(self.active, int):
            return list(range(min(self.active, self.steps)))  # one beyond the grid is refused
        return list(self.active)

    def some(self, steps: list[int], context: Context) -> list[int]:
        """Those of ``steps`` that branch in this iteration and prompt."""
        count = self.active_per_iteration or len(steps)
        return steps if count >= len(steps) else list(context.choose(steps, count, "active"))

    def tree(self, context: Context) -> Tree:
        """A single stochastic step at each of some active steps, from the anchor."""
        return self.branches(self.some(self.active_steps, context))

    def branches(self, starts: list[int], weights: tuple[float, ...] = ()) -> Tree:
        """Single stochastic steps at ``starts``, with a loss weight each."""
        spans = tuple((i, 1) for i in starts)
        of = (self.steps, spans, self.group_size, self.dynamics)
        return branches(*of, trained=True, weights=weights, **self.finish)

    @property
    def finish(self) -> dict[str, Any]:
        """Anchors and suffixes, as :func:`~egrpo.methods.shapes.branches` takes them."""
        strides = tuple(self.granularities)
        return {"anchors": self.anchors, "granularities": strides, "suffix": self.suffix}

    def _faults(self) -> Iterator[str]:
        yield from super()._faults()
        steps, strides, some = self.active_steps, self.granularities, self.active_per_iteration
        if not steps:
            yield "active: no step branches; give at least 1"
        if steps != sorted(set(steps)) or steps[0] < 0:
            yield "active: grid indices must be distinct, ascending and not negative"
        if steps[-1] > self.steps - 2:
            allowed = f"steps: {self.steps} allows 0..{self.steps - 2}"
            yield f"active: step {steps[-1]} lies beyond the schedule; {allowed}"
        if some and some > len(steps):
            yield f"active_per_iteration: {some} of {len(steps)} active steps"
        if not strides or min(strides) < 1:
            yield "granularities: strides of at least 1 are needed"
        if len(set(strides)) != len(strides):
            yield "granularities: a stride is named twice"
        room = max(1, self.steps - 2 - steps[-1])  # what is left after branch and first stop
        if max(strides) > room:
            after = f"after step {steps[-1]} of {self.steps} it may be {room} at most"
            yield f"granularities: stride {max(strides)} skips sigma 0: {after}"


class Chained(Stochastic):
    """What the methods of whole trajectories share."""

    defaults = {"group_size": Changed(24, SAMPLES, FLOW)}

    initial_noise: Literal["own", "same", "shared"] = setting("own", source=FLOW)
    """Initial noise of a prompt's samples: own; same, evaluated apart; shared: the same, evaluated
    once while the samples agree."""

    def chains(self, trained: Iterable[Steps], **how: Any) -> Tree:
        """Trajectories of whose steps these train; more as :func:`~egrpo.methods.shapes.chains`."""
        of = (self.steps, self.group_size, self.dynamics, tuple(trained))
        return chains(*of, noise=self.initial_noise, **how)


class Windowed(Chained):
    """What the methods with a window of stochastic steps share."""

    source = MIX
    defaults = {"group_size": 12, "initial_noise": "same"}

    window_size: int = setting(4, source=MIX, unit="steps", ge=1)
    """Stochastic steps, all of them trained."""

    def window(self, start: int, suffix: str = "ode", ratio: float = 1.0) -> Tree:
        """ODE, the trained window from ``start``, a suffix over ``ratio`` of the grid."""
        end = start + self.window_size
        window, stops = tuple(range(start, end)), thinned(end, self.steps, ratio)
        trained = (window,) * self.group_size
        return self.chains(trained, stochastic=window, suffix=(suffix, stops))

    def _faults(self) -> Iterator[str]:
        yield from super()._faults()
        if self.window_size > self.steps - 2:
            yield (
                f"window_size: {self.window_size} steps do not fit a schedule of {self.steps}, "
                f"whose last two are deterministic; {self.steps - 2} at most"
            )


class ForwardProcess(Method):
    """What the methods that train on noised samples share: their samples are deterministic."""

    stock_grid: ClassVar[bool] = True
    dynamics: ClassVar[str] = "ode"
    noise_level: ClassVar[float] = 0.0
    defaults = {"group_size": Changed(24, SAMPLES, NFT)}
    shape: ClassVar[Shape] = "noised"

    times_per_sample: int = setting(9, source=NFT, unit="grid indices", ge=1)
    """Grid indices that each sample is noised to, drawn per sample."""
    times_part: float = setting(1.0, source=NFT, unit="1", gt=0.0, le=1.0)
    """They are drawn from this first part of the schedule."""
    solver: Solver = setting("dpm2", source=NFT)
    """Solver of the samples: Euler, or DPM-Solver++."""

    @property
    def times(self) -> range:
        """Grid indices that samples may be noised to."""
        return range(int(self.steps * self.times_part))

    @property
    def edge_weight(self) -> float:
        """Factor of the loss."""
        return 1.0

    def tree(self, context: Context) -> Tree:
        """Deterministic samples, each noised again to some grid indices of its own."""
        count, every = self.times_per_sample, range(self.group_size)
        times = tuple(context.choose(self.times, count, "times", k) for k in every)
        return noised(self.steps, times, self.solver, self.edge_weight)

    def _faults(self) -> Iterator[str]:
        if self.times_per_sample > len(self.times):
            left = f"{len(self.times)} of {self.steps} grid indices"
            yield f"times_per_sample: {self.times_per_sample}, but times_part leaves {left}"
