"""Settings of the methods, one class each; their trees are made in ``egrpo.planning.trees``.

``recipe`` holds what a method's own paper or code sets outside of the section ``method``.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import Field, model_validator

from egrpo.core.noise import SQUARED_ERROR, Matching
from egrpo.settings import CHOICE, PAPER, Settings, setting

DANCE = "DanceGRPO, arXiv 2505.07818 and its public code"
FLOW = "Flow-GRPO, arXiv 2505.05470 and its public code"
MIX = "MixGRPO, arXiv 2507.21802 and its public code"
GRANULAR = "Granular-GRPO, arXiv 2510.01982 and its public code"
BRANCH = "BranchGRPO, arXiv 2509.06040 and its public code"
TEMPFLOW = "TempFlow-GRPO, arXiv 2508.04324 and its public code"
NFT = "DiffusionNFT, arXiv 2509.16117 and its public code"
AWM = "AWM, arXiv 2509.25050 and its public code"
GUARD = "GRPO-Guard, arXiv 2510.22319 and its public code"
MEASURED = "measured here, not the paper's: docs/results.md, equal cost"

Dynamics = Literal["flow_sde", "dance_sde", "cps"]
Solver = Literal["ode", "dpm2"]
InitialNoise = Literal["own", "same", "shared"]
Loss = Literal["clipped", "guarded", "negative_aware"]

NOISE_TEXT = (
    "Initial noise of a prompt's samples: own; same, evaluated apart; shared: the same, evaluated "
    "once while the samples agree."
)
SUFFIX_TEXT = "Solver of the deterministic suffix: Euler, or second-order DPM-Solver++."


COMMON = {"train.weight_decay": 1e-4, "train.clip_range": 1e-4, "train.max_grad_norm": 1.0}
"""What the public codes of all these methods set alike."""


def rates(*, full: float = 0.0, lora: float = 0.0) -> dict[str, float]:
    """Learning rates; the one that a method does not give is 1/30, or 30 times, of the other.

    30 is the ratio of DanceGRPO's two recipes (1e-5 for all weights, 3e-4 for LoRA).
    """
    return {
        "train.learning_rate_full": full or round(lora / 30, 12),
        "train.learning_rate_lora": lora or round(full * 30, 12),
    }


BATCH_STD = {"advantage.std": "batch", "advantage.ddof": 0, "advantage.eps": 1e-4}
"""Flow-GRPO's advantages: the prompt's mean, the population std of the whole batch."""


FLOW_AVERAGE = {"train.ema_decay": 0.9, "train.ema_ramp": "warm_up", "train.ema_every": 8}
"""Flow-GRPO's average of the weights, on which it is evaluated."""


class Method(Settings):
    """What every method has."""

    recipe: ClassVar[dict[str, Any]] = {}
    source: ClassVar[str] = CHOICE
    """Where the recipe comes from."""
    losses: ClassVar[tuple[Loss, ...]] = ("clipped", "guarded")
    """Values of ``train.loss`` that the method's edges allow."""
    stock_grid: ClassVar[bool] = False
    """Whether its public code samples on the grid of the stock pipeline (``schedule.end``)."""

    steps: int = setting(
        16, "Sampling steps T in training.", f"{PAPER}, experiments", unit="steps", ge=3, le=1000
    )
    group_size: int = setting(
        12, "Samples G that share a group.", f"{PAPER}, experiments", unit="samples", ge=2, le=1024
    )

    @property
    def matching(self) -> Matching:
        """The log-probability of noising edges."""
        return SQUARED_ERROR


class Stochastic(Method):
    """What the methods with stochastic steps share."""

    dynamics: Dynamics = setting("flow_sde", "Transition of the stochastic steps.", PAPER)
    noise_level: float = setting(
        0.7, "Noise level a (flow_sde, cps) or eta (dance_sde).", PAPER, unit="1", gt=0.0, le=5.0
    )

    @model_validator(mode="after")
    def _cps_level(self) -> Self:
        if self.dynamics == "cps" and self.noise_level > 1:
            raise ValueError("noise_level: cps needs a value in (0, 1]")
        return self


class Branching(Stochastic):
    """What the methods that branch from one anchor share."""

    active: int | list[int] = setting(
        8,
        "Number of first steps that branch, or the list of their grid indices.",
        f"{PAPER}, Table 3",
        unit="steps, or grid indices",
    )
    active_per_iteration: int | None = setting(
        None,
        "Random number of these that branch in one iteration and prompt; null for all.",
        unit="steps",
        ge=1,
    )
    anchors: int = setting(
        1,
        "Initial noises per prompt; each has its anchor and its groups.",
        PAPER,
        unit="anchors",
        ge=1,
        le=1024,
    )
    granularities: list[int] = setting(
        [1],
        "Strides of the suffix after a branch; several give a leaf each.",
        PAPER,
        unit="grid intervals",
    )
    suffix: Solver = setting("ode", SUFFIX_TEXT, PAPER)

    @property
    def active_steps(self) -> list[int]:
        """Grid indices that branch."""
        if isinstance(self.active, int):
            return list(range(min(self.active, self.steps)))  # one beyond the grid is refused
        return list(self.active)

    @model_validator(mode="after")
    def _active_on_grid(self) -> Self:
        steps = self.active_steps
        if not steps:
            raise ValueError("active: no step branches; give at least 1")
        if steps != sorted(set(steps)) or steps[0] < 0:
            raise ValueError("active: grid indices must be distinct, ascending and not negative")
        if steps[-1] > self.steps - 2:
            raise ValueError(
                f"active: step {steps[-1]} lies beyond the schedule; "
                f"steps: {self.steps} allows 0..{self.steps - 2}"
            )
        if self.active_per_iteration and self.active_per_iteration > len(steps):
            raise ValueError(
                f"active_per_iteration: {self.active_per_iteration} of {len(steps)} active steps"
            )
        return self

    @model_validator(mode="after")
    def _granularities_on_grid(self) -> Self:
        if not self.granularities or min(self.granularities) < 1:
            raise ValueError("granularities: strides of at least 1 are needed")
        if len(set(self.granularities)) != len(self.granularities):
            raise ValueError("granularities: a stride is named twice")
        room = self.steps - 2 - self.active_steps[-1]  # what is left after branch and first stop
        longest = max(self.granularities)
        if longest > max(1, room):
            raise ValueError(
                f"granularities: stride {longest} skips sigma 0: after step "
                f"{self.active_steps[-1]} of {self.steps} it may be {max(1, room)} at most"
            )
        return self


class Merging(Branching):
    """What the methods that merge steps share."""

    source: ClassVar[str] = PAPER
    recipe: ClassVar[dict[str, Any]] = {
        **rates(full=2e-6),
        **COMMON,
    }

    threshold: float | Literal["auto"] = setting(
        2.2,
        "Entropy threshold tau in `measure`; 0 merges nothing; auto takes the least entropy at "
        "which the profile shows enough spread of the trained rewards (`spread_factor`).",
        f"{PAPER}, Table 4",
        unit="of `measure`",
    )
    spread_factor: float = setting(
        1.0,
        "threshold auto: spread of rewards in a group, over that of the noisy yardstick, which is "
        "enough.",
        f"{PAPER}, Fig. 1a",
        unit="1",
        gt=0.0,
    )
    span: int | None = setting(
        None,
        "Fixed number of steps merged at every active step, in the place of the threshold.",
        f"{PAPER}, Table 2",
        unit="grid intervals",
        ge=1,
    )
    measure: Literal["exp_per_dim", "nats_per_dim", "variance"] = setting(
        "exp_per_dim", "Unit of entropy and threshold."
    )
    on_unreachable: Literal["cap", "drop", "error"] = setting(
        "cap", "A step that cannot reach the threshold: longest span, left out, or refused."
    )
    allocation: Literal["uniform", "profile"] = setting(
        "uniform",
        "Samples of the active steps: group_size each, or as many in all, shared out in "
        "proportion to the profile's spread of the trained rewards (at least 2 each).",
        PAPER,
    )

    @property
    def reads_profile(self) -> bool:
        """Whether the plan depends on measured spread and not on the closed form alone."""
        automatic = self.threshold == "auto" and self.span is None
        return automatic or self.allocation == "profile"

    @model_validator(mode="after")
    def _entropy_grows_with_span(self) -> Self:
        if self.dynamics == "cps" and self.threshold != 0 and self.span is None:
            raise ValueError(
                "threshold: must be 0 with dynamics: cps, whose entropy falls as a step gets longer"
            )
        return self


class Egrpo(Merging):
    """E-GRPO: consecutive low-entropy steps merged into one SDE step by a threshold."""

    name: Literal["egrpo"] = setting("egrpo", "Name of the method.")


class EgrpoEfficient(Merging):
    """E-GRPO with rollouts of a tenth of the cost, so that there are ten times as many updates."""

    name: Literal["egrpo_efficient"] = setting("egrpo_efficient", "Name of the method.")
    active_per_iteration: int | None = setting(
        2,
        "Random number of these that branch in one iteration and prompt; null for all.",
        MEASURED,
        unit="steps",
        ge=1,
    )
    granularities: list[int] = setting(
        [4],
        "Strides of the suffix after a branch; several give a leaf each.",
        MEASURED,
        unit="grid intervals",
    )
    suffix: Solver = setting("dpm2", SUFFIX_TEXT, MEASURED)


class G2rpo(Branching):
    """Granular-GRPO: single SDE steps from an anchor, rewards at several granularities."""

    source: ClassVar[str] = GRANULAR
    recipe: ClassVar[dict[str, Any]] = {
        **rates(full=2e-6),
        **COMMON,
    }

    name: Literal["g2rpo"] = setting("g2rpo", "Name of the method.")
    steps: int = setting(16, "Sampling steps T in training.", GRANULAR, unit="steps", ge=3, le=1000)
    group_size: int = setting(
        12, "Samples G of each step.", GRANULAR, unit="samples", ge=2, le=1024
    )
    active: int | list[int] = setting(
        8,
        "Number of first steps that branch, or the list of their grid indices.",
        GRANULAR,
        unit="steps, or grid indices",
    )
    granularities: list[int] = setting(
        [1, 2],
        "Strides of the suffix after a branch; several give a leaf each.",
        GRANULAR,
        unit="grid intervals",
    )


class TempflowGrpo(Branching):
    """TempFlow-GRPO: single SDE steps from anchors, loss weighted by their noise."""

    stock_grid: ClassVar[bool] = True
    source: ClassVar[str] = TEMPFLOW
    recipe: ClassVar[dict[str, Any]] = {
        **rates(lora=3e-4),
        **COMMON,
        "train.kl_weight": 0.004,
        "train.kl": "divergence",
        **FLOW_AVERAGE,
        "train.updates": 2,
        "advantage.ddof": 0,
        "advantage.eps": 1e-4,
    }

    name: Literal["tempflow_grpo"] = setting("tempflow_grpo", "Name of the method.")
    steps: int = setting(10, "Sampling steps T in training.", TEMPFLOW, unit="steps", ge=3, le=1000)
    group_size: int = setting(
        6, "Successors K of each step and anchor.", TEMPFLOW, unit="samples", ge=2, le=1024
    )
    anchors: int = setting(
        4,
        "Initial noises per prompt; each has its anchor and its groups.",
        TEMPFLOW,
        unit="anchors",
        ge=1,
        le=1024,
    )
    active: int | list[int] = setting(
        9,
        "Number of first steps that branch, or the list of their grid indices.",
        TEMPFLOW,
        unit="steps, or grid indices",
    )


class FlowGrpo(Stochastic):
    """Flow-GRPO: SDE on all steps of independent trajectories."""

    stock_grid: ClassVar[bool] = True
    source: ClassVar[str] = FLOW
    recipe: ClassVar[dict[str, Any]] = {
        **rates(lora=3e-4),
        **COMMON,
        "train.kl_weight": 0.04,
        "train.kl": "transition",
        **FLOW_AVERAGE,
        "train.updates": 2,
        **BATCH_STD,
    }

    name: Literal["flow_grpo"] = setting("flow_grpo", "Name of the method.")
    steps: int = setting(10, "Sampling steps T in training.", FLOW, unit="steps", ge=3, le=1000)
    group_size: int = setting(24, "Samples G per prompt.", FLOW, unit="samples", ge=2, le=1024)
    trained_fraction: float = setting(
        0.99, "First part of the steps that trains.", FLOW, unit="1", gt=0.0, le=1.0
    )
    initial_noise: InitialNoise = setting("own", NOISE_TEXT, FLOW)


class Windowed(Stochastic):
    """What the methods with a window of stochastic steps share."""

    window_size: int = setting(4, "Stochastic steps, all of them trained.", MIX, unit="steps", ge=1)
    initial_noise: InitialNoise = setting("same", NOISE_TEXT, MIX)

    @model_validator(mode="after")
    def _window_fits(self) -> Self:
        if self.window_size > self.steps - 2:
            raise ValueError(
                f"window_size: {self.window_size} steps do not fit a schedule of {self.steps}, "
                f"whose last two are deterministic; {self.steps - 2} at most"
            )
        return self


class FlowGrpoFast(Windowed):
    """Flow-GRPO-Fast: a shared ODE prefix, a random window of SDE steps, ODE."""

    stock_grid: ClassVar[bool] = True
    source: ClassVar[str] = FLOW
    recipe: ClassVar[dict[str, Any]] = {
        **FlowGrpo.recipe,
        "train.clip_range": 1e-5,
        "train.kl_weight": 0.0,
    }

    name: Literal["flow_grpo_fast"] = setting("flow_grpo_fast", "Name of the method.")
    steps: int = setting(10, "Sampling steps T in training.", FLOW, unit="steps", ge=3, le=1000)
    dynamics: Dynamics = setting("cps", "Transition of the stochastic steps.", FLOW)
    noise_level: float = setting(
        0.8, "Noise level a (flow_sde, cps) or eta (dance_sde).", FLOW, unit="1", gt=0.0, le=5.0
    )
    group_size: int = setting(24, "Samples G per prompt.", FLOW, unit="samples", ge=2, le=1024)
    window_size: int = setting(
        3, "Stochastic steps, all of them trained.", FLOW, unit="steps", ge=1
    )
    window_part: float = setting(
        0.5, "The window lies in this first part of the schedule.", FLOW, unit="1", gt=0.0, le=1.0
    )
    initial_noise: InitialNoise = setting("shared", NOISE_TEXT, FLOW)

    @property
    def window_starts(self) -> range:
        """Grid indices at which the window may start."""
        part = min(int(self.steps * self.window_part), self.steps - 2)
        return range(part - self.window_size + 1)

    @model_validator(mode="after")
    def _window_in_its_part(self) -> Self:
        if not self.window_starts:
            raise ValueError(
                f"window_part: {self.window_part} of {self.steps} steps has no room for a window "
                f"of {self.window_size}"
            )
        return self


class DanceGrpo(Stochastic):
    """DanceGRPO: SDE of constant noise on all steps, a random part of each sample's trains."""

    source: ClassVar[str] = DANCE
    recipe: ClassVar[dict[str, Any]] = {
        **rates(full=1e-5, lora=3e-4),
        **COMMON,
        "train.updates": 3,
    }

    name: Literal["dancegrpo"] = setting("dancegrpo", "Name of the method.")
    steps: int = setting(16, "Sampling steps T in training.", DANCE, unit="steps", ge=3, le=1000)
    dynamics: Dynamics = setting("dance_sde", "Transition of the stochastic steps.", DANCE)
    noise_level: float = setting(
        0.3, "Noise level eta (dance_sde) or a (flow_sde, cps).", DANCE, unit="1", gt=0.0, le=5.0
    )
    group_size: int = setting(12, "Samples G per prompt.", DANCE, unit="samples", ge=2, le=1024)
    trained_fraction: float = setting(
        0.6,
        "Part of all steps but the last that trains, drawn per sample.",
        DANCE,
        unit="1",
        gt=0.0,
        le=1.0,
    )
    initial_noise: InitialNoise = setting("same", NOISE_TEXT, DANCE)


class MixGrpo(Windowed):
    """MixGRPO: SDE in a window that slides over the schedule, ODE elsewhere."""

    source: ClassVar[str] = MIX
    recipe: ClassVar[dict[str, Any]] = {
        **rates(full=1e-5),
        **COMMON,
        "train.updates": 4,
    }

    name: Literal["mixgrpo"] = setting("mixgrpo", "Name of the method.")
    steps: int = setting(25, "Sampling steps T in training.", MIX, unit="steps", ge=3, le=1000)
    group_size: int = setting(12, "Samples G per prompt.", MIX, unit="samples", ge=2, le=1024)
    window_every: int = setting(
        25, "Iterations between two moves of the window.", MIX, unit="iterations", ge=1
    )
    window_stride: int = setting(
        1, "Steps of one move; 0 keeps the window at 0.", MIX, unit="grid intervals", ge=0
    )

    def window_start(self, iteration: int) -> int:
        """Grid index of the window in an iteration counted from 1; back to 0 from the end."""
        moves = (iteration - 1) // self.window_every
        if self.window_stride == 0:
            return 0
        last = self.steps - 2 - self.window_size
        return moves % (last // self.window_stride + 1) * self.window_stride


class MixGrpoFlash(MixGrpo):
    """MixGRPO-Flash: MixGRPO with fewer, second-order steps after the window."""

    name: Literal["mixgrpo_flash"] = setting("mixgrpo_flash", "Name of the method.")  # type: ignore[assignment]
    window_every: int = setting(
        20, "Iterations between two moves of the window.", MIX, unit="iterations", ge=1
    )
    suffix: Solver = setting("dpm2", SUFFIX_TEXT, MIX)
    suffix_ratio: float = setting(
        0.4, "Part of the steps after the window that is kept.", MIX, unit="1", gt=0.0, le=1.0
    )


class BranchGrpo(Stochastic):
    """BranchGRPO: a binary tree of SDE steps; an edge is worth the mean of its leaves."""

    source: ClassVar[str] = BRANCH
    recipe: ClassVar[dict[str, Any]] = {
        **rates(full=1e-5),
        **COMMON,
        "train.clip_range": 1e-3,
        "train.updates": 16,  # its code: one step every 12 edges, 37 of two trees
    }

    name: Literal["branchgrpo"] = setting("branchgrpo", "Name of the method.")
    steps: int = setting(20, "Sampling steps T in training.", BRANCH, unit="steps", ge=3, le=1000)
    dynamics: Dynamics = setting("dance_sde", "Transition of the stochastic steps.", BRANCH)
    noise_level: float = setting(
        0.3, "Noise level eta (dance_sde) or a (flow_sde, cps).", BRANCH, unit="1", gt=0.0, le=5.0
    )
    group_size: int = setting(
        16, "Leaves: 2 to the number of splits.", BRANCH, unit="samples", ge=2, le=1024
    )
    splits: list[int] = setting(
        [0, 3, 6, 9], "Grid indices at which latents split.", BRANCH, unit="grid index"
    )
    width_share: float = setting(
        1.0,
        "Width pruning: after the last split only this best part of the leaves trains; 1 prunes "
        "nothing.",
        BRANCH,
        unit="1",
        gt=0.0,
        le=1.0,
    )
    depth_pruning: list[int] = setting(
        [],
        "Depth pruning: consecutive grid indices; edges that arrive there do not train.",
        BRANCH,
        unit="grid index",
    )
    depth_every: int = setting(
        30, "Iterations until those indices move forward by one.", BRANCH, unit="iterations", ge=1
    )
    depth_stop: int = setting(
        9, "Index at which the first of them stops.", BRANCH, unit="grid index", ge=1
    )

    def untrained(self, iteration: int) -> tuple[int, ...]:
        """Starts of the edges that depth pruning takes out, in an iteration counted from 1.

        The first move is in iteration ``depth_every``: its code has ``step // 30``, from step 1.
        """
        if not self.depth_pruning:
            return ()
        moves = iteration // self.depth_every
        shift = min(moves, max(0, self.depth_pruning[0] - self.depth_stop))
        return tuple(depth - 1 - shift for depth in self.depth_pruning)

    @model_validator(mode="after")
    def _splits_on_grid(self) -> Self:
        if not self.splits or self.splits != sorted(set(self.splits)) or self.splits[0] < 0:
            raise ValueError("splits: grid indices must be distinct, ascending and not negative")
        if self.splits[-1] > self.steps - 2:
            raise ValueError(
                f"splits: {self.splits[-1]} lies beyond the last stochastic step; steps: "
                f"{self.steps} allows 0..{self.steps - 2}"
            )
        if self.group_size != 2 ** len(self.splits):
            raise ValueError(
                f"group_size: {len(self.splits)} splits make {2 ** len(self.splits)} leaves, "
                f"not {self.group_size}"
            )
        return self

    @model_validator(mode="after")
    def _depths_on_grid(self) -> Self:
        depths = self.depth_pruning
        ascending = depths == sorted(set(depths))
        if depths and not (ascending and depths[0] >= 1 and depths[-1] <= self.steps):
            raise ValueError(
                f"depth_pruning: distinct, ascending indices of 1..{self.steps} are needed"
            )
        if len(depths) >= self.steps:
            raise ValueError("depth_pruning: no depth is left to train")
        return self


class ForwardProcess(Method):
    """What the methods that train on noised samples share: their samples are deterministic."""

    stock_grid: ClassVar[bool] = True
    dynamics: ClassVar[str] = "ode"
    noise_level: ClassVar[float] = 0.0

    group_size: int = setting(24, "Samples G per prompt.", NFT, unit="samples", ge=2, le=1024)
    times_per_sample: int = setting(
        9,
        "Grid indices that each sample is noised to, drawn per sample.",
        NFT,
        unit="grid indices",
        ge=1,
    )
    times_part: float = setting(
        1.0, "They are drawn from this first part of the schedule.", NFT, unit="1", gt=0.0, le=1.0
    )
    solver: Solver = setting("dpm2", "Solver of the samples: Euler, or DPM-Solver++.", NFT)

    @property
    def times(self) -> range:
        """Grid indices that samples may be noised to."""
        return range(int(self.steps * self.times_part))

    @model_validator(mode="after")
    def _times_on_grid(self) -> Self:
        if self.times_per_sample > len(self.times):
            raise ValueError(
                f"times_per_sample: {self.times_per_sample}, but times_part leaves "
                f"{len(self.times)} of {self.steps} grid indices"
            )
        return self


class DiffusionNft(ForwardProcess):
    """DiffusionNFT: forward-process objective with positive and negative velocity mixtures."""

    losses: ClassVar[tuple[Loss, ...]] = ("negative_aware",)
    source: ClassVar[str] = NFT
    recipe: ClassVar[dict[str, Any]] = {
        **rates(lora=3e-4),
        **COMMON,
        "train.loss": "negative_aware",
        "train.kl_weight": 1e-4,
        "train.ema_decay": 0.5,
        "train.ema_ramp": 0.001,
        "train.sample_average": True,
        **BATCH_STD,
    }

    name: Literal["diffusion_nft"] = setting("diffusion_nft", "Name of the method.")
    steps: int = setting(10, "Sampling steps T in training.", NFT, unit="steps", ge=3, le=1000)
    beta: float = setting(1.0, "Mixing of the implicit policies.", NFT, unit="1", gt=0.0)


class Awm(ForwardProcess):
    """AWM: clipped policy gradient whose log-probability is a function of the matching error."""

    losses: ClassVar[tuple[Loss, ...]] = ("clipped",)
    source: ClassVar[str] = AWM
    recipe: ClassVar[dict[str, Any]] = {
        **rates(lora=3e-4),
        **COMMON,
        "train.clip_range": 1.0,
        "train.kl_weight": 1e-4,  # its recipe for PickScore; GenEval 1e-3, OCR 3e-3
        "train.ema_decay": 0.3,
        "train.ema_ramp": 0.001,
        "train.ema_weight": 1.0,
        **BATCH_STD,
    }

    name: Literal["awm"] = setting("awm", "Name of the method.")
    steps: int = setting(14, "Sampling steps T in training.", AWM, unit="steps", ge=3, le=1000)
    times_per_sample: int = setting(
        6,
        "Grid indices that each sample is noised to, drawn per sample.",
        AWM,
        unit="grid indices",
        ge=1,
    )
    times_part: float = setting(
        0.9, "They are drawn from this first part of the schedule.", AWM, unit="1", gt=0.0, le=1.0
    )
    solver: Solver = setting("ode", "Solver of the samples: Euler, or DPM-Solver++.", AWM)
    weight: float = setting(
        0.2, "Factor of the loss: advantages, clamped at 5, count within 1.", AWM, unit="1", gt=0.0
    )
    power: float = setting(
        0.25,
        "Power p of the matching error e in the log-probability -(e^p - c) / p (generalised "
        "Huber); 1: the error itself.",
        AWM,
        unit="1",
        gt=0.0,
        le=1.0,
    )
    time_weight: bool = setting(
        True, "Multiply the log-probability by the flow time of the noised sample.", AWM
    )

    @property
    def matching(self) -> Matching:
        """See :class:`Method`."""
        return Matching(self.power, self.time_weight)


AnyMethod = Annotated[
    Egrpo
    | EgrpoEfficient
    | FlowGrpo
    | FlowGrpoFast
    | DanceGrpo
    | MixGrpo
    | MixGrpoFlash
    | G2rpo
    | BranchGrpo
    | TempflowGrpo
    | DiffusionNft
    | Awm,
    Field(discriminator="name"),
]


METHOD_MODELS: dict[str, type[Method]] = {
    model.model_fields["name"].default: model for model in get_args(get_args(AnyMethod)[0])
}
"""Settings model of each method, by name."""
