"""What every method is: settings, a rollout tree, what of it trains, and the loss. Needs no torch.

A method is one file of this folder: a class with its settings and their sources, its
:meth:`Method.tree`, and what the documents say of it. What it does not say otherwise is below.
All else knows no class by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple, Self

from pydantic import model_validator

from egrpo.core.advantage import Array
from egrpo.core.noise import SQUARED_ERROR, Matching
from egrpo.core.plan import Plan
from egrpo.core.schedule import Sigmas
from egrpo.core.seeds import shuffled
from egrpo.core.spread import Spread
from egrpo.core.tree import Tree
from egrpo.settings import CHOICE, PAPER, Settings, setting

if TYPE_CHECKING:
    from torch import Tensor

    from egrpo.core.loss import Objective
    from egrpo.core.rollout import TrainBatch

FLOW = "Flow-GRPO, arXiv 2505.05470 and its public code"
MIX = "MixGRPO, arXiv 2507.21802 and its public code"
NFT = "DiffusionNFT, arXiv 2509.16117 and its public code"
GUARD = "GRPO-Guard, arXiv 2510.22319 and its public code"

Dynamics = Literal["flow_sde", "dance_sde", "cps"]
Solver = Literal["ode", "dpm2"]
Loss = Literal["clipped", "guarded", "negative_aware"]
Shape = Literal["branches", "chains", "tree", "noised"]

COMMON = {"train.weight_decay": 1e-4, "train.clip_range": 1e-4, "train.max_grad_norm": 1.0}
"""What the public codes of all these methods set alike."""

BATCH_STD = {"advantage.std": "batch", "advantage.ddof": 0, "advantage.eps": 1e-4}
"""Flow-GRPO's advantages: the prompt's mean, the population std of the whole batch."""

FLOW_AVERAGE = {"train.ema_decay": 0.9, "train.ema_ramp": "warm_up", "train.ema_every": 8}
"""Flow-GRPO's average of the weights, on which it is evaluated."""


def rates(*, full: float = 0.0, lora: float = 0.0) -> dict[str, float]:
    """Learning rates; the one that is not given by the ratio of DanceGRPO's two, 1e-5 and 3e-4."""
    return {
        "train.learning_rate_full": full or round(lora / 30, 12),
        "train.learning_rate_lora": lora or round(full * 30, 12),
    }


@dataclass(frozen=True)
class Context:
    """What a tree may depend on beside its method's settings.

    ``iteration`` is counted from 1; ``seed``, what :meth:`choose` draws by, is of run, iteration
    and prompt.
    """

    plan: Plan | None
    sigmas: Sigmas
    iteration: int
    seed: tuple[int | str, ...]

    def choose(self, items: Iterable[int], count: int, *what: int | str) -> tuple[int, ...]:
        """``count`` of ``items``, ascending: a function of the seed and ``what`` they are for."""
        return tuple(sorted(shuffled(items, *self.seed, *what)[:count]))


@dataclass(frozen=True)
class Entry:
    """A method on the page of methods.

    Attributes:
        title, short, text: its name in the literature; what it explores; the same with its why.
        departures: what departs from its public code.
        settings, iteration: of the drawing, beside T and G.
    """

    title: str
    short: str
    text: str
    departures: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    iteration: int = 1


class Changed(NamedTuple):
    """A default that a class changes, with another sentence or from elsewhere than its paper."""

    value: Any
    text: str = ""
    source: str = ""


class Automatic(NamedTuple):
    """How a threshold is read from a profile: the measure of entropy, and the factor."""

    measure: str
    factor: float


class Method(Settings):
    """What every method has."""

    entry: ClassVar[Entry]
    recipe: ClassVar[Mapping[str, Any]] = {}
    """What its paper or code sets outside of the section ``method``, by dotted key."""
    source: ClassVar[str] = CHOICE
    """Where the recipe and the changed defaults come from."""
    defaults: ClassVar[Mapping[str, Any]] = {}
    """Inherited settings with another default: key to value, or to :class:`Changed`. Text, unit
    and bounds stay."""
    shape: ClassVar[Shape] = "chains"
    losses: ClassVar[tuple[Loss, ...]] = ("clipped", "guarded")
    """Values of ``train.loss`` that the method's edges allow."""
    stock_grid: ClassVar[bool] = False
    """Whether its public code samples on the grid of the stock pipeline (``schedule.end``)."""
    needs_plan: ClassVar[bool] = False
    """Whether its tree is grown from a merge plan."""

    if TYPE_CHECKING:  # each method has them, as settings or as constants

        @property
        def name(self) -> str:
            """By which a runs table asks for it."""

        @property
        def dynamics(self) -> str:
            """Transition of the sampled steps that are not deterministic; else ``ode``."""

        @property
        def noise_level(self) -> float:
            """Noise level a or eta."""

    steps: int = setting(16, source=f"{PAPER}, experiments", unit="steps", ge=3, le=1000)
    """Sampling steps T in training."""
    group_size: int = setting(12, source=f"{PAPER}, experiments", unit="samples", ge=2, le=1024)
    """Samples G that share a group."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Declare the fields that :attr:`defaults` names, as if the class body had them in full."""
        super().__init_subclass__(**kwargs)
        parent = cls.__mro__[1]
        assert issubclass(parent, Method)
        for key, given in vars(cls).get("defaults", {}).items():
            changed = given if isinstance(given, Changed) else Changed(given)
            old = parent.model_fields[key]
            noted: Any = old.json_schema_extra
            text, source = changed.text or old.description or "", changed.source or cls.source
            bounded = (old.annotation, *old.metadata)
            cls.__annotations__[key] = Annotated[bounded] if old.metadata else old.annotation
            unit = noted.get("unit", "")
            setattr(cls, key, setting(changed.value, source, unit=unit, description=text))

    @model_validator(mode="after")
    def _can_be(self) -> Self:
        for fault in self._faults():
            raise ValueError(fault)
        return self

    def _faults(self) -> Iterator[str]:
        """``key: why`` of settings that cannot be, in an order in which the first is told."""
        yield from ()

    def tree(self, context: Context) -> Tree:
        """The rollout tree of one prompt in one iteration; equal arguments give equal trees."""
        raise NotImplementedError

    @property
    def reads_profile(self) -> bool:
        """Whether the plan depends on measured spread and not on the closed form alone."""
        return False

    @property
    def automatic(self) -> Automatic | None:
        """How the threshold is read from the profile; None where it is not."""
        return None

    def plan(self, sigmas: Sigmas, spreads: Sequence[Spread] = ()) -> Plan:
        """The merge plan over a grid, of a method that needs one; ``spreads`` are measured.

        Raises:
            ValueError: if the threshold is out of reach, or the spreads do not tell.
        """
        raise NotImplementedError

    @property
    def prunes(self) -> bool:
        """Whether rewards take trained edges out: predicted training is then an upper bound."""
        return False

    def keep(
        self,
        scores: Mapping[str, Array],
        weights: Mapping[str, float],
        trees: Sequence[Tree],
        edges: Sequence[tuple[int, int]],
    ) -> set[int] | None:
        """Positions of the trained edges that stay after scoring; None for all."""
        return None

    @property
    def matching(self) -> Matching:
        """The log-probability of noising edges."""
        return SQUARED_ERROR

    def objective(
        self,
        batch: TrainBatch,
        v: Tensor,
        sigmas: Sigmas,
        advantage: Tensor,
        weight: Tensor,
        *,
        loss: str,
        clip_range: float,
        clamp: float,
    ) -> Objective:
        """The loss, summed over E edges of a batch of B sources.

        Clipped (PPO), or GRPO-Guard's: its centered ratio, and each edge over its length in time
        (arXiv 2510.22319).

        Args:
            batch: sources and edges.
            v: [B, C, h, w] velocities over the grid ``sigmas``, with gradients.
            advantage, weight: [E].
            loss: one of :attr:`losses`.
            clip_range: of the probability ratio.
            clamp: bound of the absolute advantages.
        """
        from egrpo.core.loss import clipped_objective

        if loss == "guarded":
            ratio = batch.guarded_log_ratio(v, sigmas, self.noise_level)
            weight = weight / batch.lengths(sigmas)  # its gradient reweighting
        else:
            ratio = batch.log_ratio(v, sigmas, self.noise_level)
        return clipped_objective(ratio, advantage, weight, clip_range)


class Stochastic(Method):
    """What the methods with stochastic steps share."""

    dynamics: Dynamics = setting("flow_sde", source=PAPER)
    """Transition of the stochastic steps."""
    noise_level: float = setting(0.7, source=PAPER, unit="1", gt=0.0, le=5.0)
    """Noise level a (flow_sde, cps) or eta (dance_sde)."""

    def _faults(self) -> Iterator[str]:
        if self.dynamics == "cps" and self.noise_level > 1:
            yield "noise_level: cps needs a value in (0, 1]"
