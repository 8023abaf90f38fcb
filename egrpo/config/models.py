"""Every setting, with its unit, bounds, default and the default's source.

Frozen, and unknown keys are refused. The commented reference YAML, the JSON schema and the
settings page are generated from these classes (``egrpo.config.docs``).
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

PAPER = "E-GRPO, arXiv 2601.00423"
FLOW_GRPO = "Flow-GRPO, arXiv 2505.05470 and its public code"
CHOICE = "this project's choice"


def setting(default: Any, text: str, source: str = CHOICE, **bounds: Any) -> Any:
    """A field with its sentence (unit included), the source of its default, and its bounds."""
    return Field(default, description=text, json_schema_extra={"source": source}, **bounds)


class Settings(BaseModel):
    """Base of all settings: frozen, no unknown keys, no silent conversion of types."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)


class Lora(Settings):
    """Low-rank adapters (peft)."""

    rank: int = setting(32, "Rank of the adapters.", FLOW_GRPO, ge=1)
    alpha: int = setting(64, "Scale: adapters are multiplied by alpha / rank.", FLOW_GRPO, ge=1)
    targets: list[str] | None = setting(
        None, "Names of the adapted linear layers; null takes the family's own list.", FLOW_GRPO
    )


class Model(Settings):
    """The base model: a local path or a hub id, in diffusers' format."""

    family: Literal["sd3"] = setting("sd3", "Model family; chooses the adapter.")
    path: str = setting(..., "Folder with the pipeline, or a hub id.")
    revision: str | None = setting(None, "Revision of a hub id.")
    dtype: Literal["float32", "bfloat16", "float16"] = setting(
        "bfloat16", "Type of weights and stored latents.", f"{PAPER}, experiments"
    )
    device: str = setting("auto", "torch device; auto takes CUDA where there is one.")
    height: int = setting(
        720, "Image height in pixels, in training.", "DanceGRPO's FLUX recipe", ge=8
    )
    width: int = setting(
        720, "Image width in pixels, in training.", "DanceGRPO's FLUX recipe", ge=8
    )
    guidance_scale: float = setting(
        1.0,
        "Classifier-free guidance; 1 means one evaluation per velocity, more means two.",
        ge=1.0,
    )
    max_sequence_length: int = setting(
        256, "T5 tokens appended to the CLIP tokens.", "diffusers' SD3 pipeline", ge=0, le=512
    )
    tuning: Literal["lora", "full"] = setting("lora", "What is trained.")
    lora: Lora = Lora()
    merge_lora_for_sampling: bool = setting(
        False,
        "Keep a second copy of the transformer with the LoRA merged, for evaluations whose "
        "log-probability nobody needs: faster, but costs one copy of the weights in memory, and in "
        "bfloat16 the merged weights round small updates away.",
    )
    channels_last: bool = setting(True, "Memory format of the VAE's convolutions.")

    @model_validator(mode="after")
    def _full_tuning_in_float32(self) -> Self:
        if self.tuning == "full" and self.dtype != "float32":
            raise ValueError(
                f"dtype: {self.dtype} rounds the updates of tuning: full away; set float32, or "
                "tuning: lora"
            )
        return self


class Prompts(Settings):
    """Prompt files: .txt (one a line) or .jsonl (`prompt`, optional `negative_prompt`)."""

    train: str = setting(..., "Prompts to train on.")
    heldout: str = setting(..., "Prompts to evaluate and monitor on.")


class Schedule(Settings):
    """The sigma grid shared by training and evaluation."""

    shift: float = setting(
        3.0, "Timestep shift s of s*t/(1+(s-1)*t).", f"{PAPER}, experiments", gt=0.0
    )


Dynamics = Literal["flow_sde", "dance_sde", "cps"]


class Method(Settings):
    """What every method has."""

    recipe: ClassVar[dict[str, Any]] = {}
    """Settings outside ``method`` that the method's own paper sets, by dotted key."""

    steps: int = setting(
        16, "Sampling steps T in training.", f"{PAPER}, experiments", ge=3, le=1000
    )
    dynamics: Dynamics = setting("flow_sde", "Transition of the stochastic steps.", PAPER)
    noise_level: float = setting(
        0.7, "Noise level a (flow_sde, cps) or eta (dance_sde).", PAPER, gt=0.0, le=5.0
    )
    group_size: int = setting(
        12, "Samples G that share a group.", f"{PAPER}, experiments", ge=2, le=1024
    )


class Egrpo(Method):
    """E-GRPO: consecutive low-entropy steps merged into one SDE step by a threshold."""

    recipe: ClassVar[dict[str, Any]] = {
        "train.learning_rate_full": 2e-6,
        "train.learning_rate_lora": 6e-5,
        "train.weight_decay": 1e-4,
        "train.clip_range": 1e-4,
        "train.max_grad_norm": 1.0,
    }

    name: Literal["egrpo"] = setting("egrpo", "Name of the method.")
    active: int | list[int] = setting(
        8,
        "Number of first steps that branch, or the list of their grid indices.",
        f"{PAPER}, Table 3",
    )
    threshold: float = setting(
        2.2, "Entropy threshold tau in `measure`; 0 merges nothing.", f"{PAPER}, Table 4"
    )
    span: int | None = setting(
        None,
        "Fixed number of steps merged at every active step, in the place of the threshold.",
        f"{PAPER}, Table 2",
        ge=1,
    )
    measure: Literal["exp_per_dim", "nats_per_dim", "variance"] = setting(
        "exp_per_dim", "Unit of entropy and threshold."
    )
    on_unreachable: Literal["cap", "drop", "error"] = setting(
        "cap", "A step that cannot reach the threshold: longest span, left out, or refused."
    )

    @model_validator(mode="after")
    def _entropy_grows_with_span(self) -> Self:
        if self.dynamics == "cps" and self.threshold != 0 and self.span is None:
            raise ValueError(
                "threshold: must be 0 with dynamics: cps, whose entropy falls as a step gets longer"
            )
        return self

    @property
    def active_steps(self) -> list[int]:
        """Grid indices that branch."""
        return list(range(self.active)) if isinstance(self.active, int) else list(self.active)

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
        return self


class FlowGrpo(Method):
    """Flow-GRPO: SDE on all steps of independent trajectories."""

    recipe: ClassVar[dict[str, Any]] = {
        "train.learning_rate_full": 1e-5,  # 1/30 of its LoRA rate, the ratio of DanceGRPO's recipes
        "train.learning_rate_lora": 3e-4,
        "train.weight_decay": 1e-4,
        "train.clip_range": 1e-4,
        "train.max_grad_norm": 1.0,
        "train.kl_weight": 0.04,
        "train.kl": "transition",
        "train.ema_decay": 0.9,
        "advantage.std": "batch",
        "advantage.ddof": 0,
        "advantage.eps": 1e-4,
    }

    name: Literal["flow_grpo"] = setting("flow_grpo", "Name of the method.")
    steps: int = setting(10, "Sampling steps T in training.", FLOW_GRPO, ge=3, le=1000)
    group_size: int = setting(24, "Samples G per prompt.", FLOW_GRPO, ge=2, le=1024)
    trained_fraction: float = setting(
        0.99, "First part of the steps that trains.", FLOW_GRPO, gt=0.0, le=1.0
    )


AnyMethod = Annotated[Egrpo | FlowGrpo, Field(discriminator="name")]


class Reward(Settings):
    """One reward model."""

    kind: Literal["verifier", "verifier_exact", "clip", "preference", "jpeg_compressibility"] = (
        setting(..., "Which reward.")
    )
    path: str | None = setting(None, "File with its weights, where it has any.")

    @model_validator(mode="after")
    def _path_where_needed(self) -> Self:
        weighted = self.kind in ("clip", "preference")
        if weighted and self.path is None:
            raise ValueError(f"path: a {self.kind} reward needs the file of its weights")
        if not weighted and self.path is not None:
            raise ValueError(f"path: a {self.kind} reward has no weights; leave it out")
        return self


class Advantage(Settings):
    """From rewards to advantages."""

    combine: Literal["advantages", "rewards"] = setting(
        "advantages", "Several rewards: normalise each and sum, or sum and normalise.", PAPER
    )
    std: Literal["group", "batch"] = setting(
        "group", "Divide by the std of the group or of the whole batch.", f"{PAPER}, method"
    )
    ddof: Literal[0, 1] = setting(1, "1 for the unbiased std, 0 for the population's.", PAPER)
    eps: float = setting(1e-8, "Added to the std.", PAPER, gt=0.0)
    clamp: float = setting(5.0, "Bound of the absolute advantage.", PAPER, gt=0.0)


class Train(Settings):
    """The optimisation."""

    rewards: dict[str, float] = setting(..., "Trained rewards: name -> weight.")
    iterations: int = setting(
        300, "Iterations: rollout, advantages, optimizer step(s).", f"{PAPER}, experiments", ge=1
    )
    prompts_per_iteration: int = setting(
        8,
        "Prompts of one iteration.",
        f"{PAPER}, experiments: 1 per GPU on 8 GPUs",
        ge=1,
    )
    learning_rate_full: float = setting(
        2e-6, "Learning rate of full fine-tuning.", f"{PAPER}, experiments", gt=0.0
    )
    learning_rate_lora: float = setting(
        6e-5,
        "Learning rate of LoRA.",
        "30 times the full one, the ratio of DanceGRPO's two recipes (1e-5, 3e-4)",
        gt=0.0,
    )
    learning_rate_scale: float = setting(
        1.0, "Factor on the method's learning rate; the same for all methods of a study.", gt=0.0
    )
    weight_decay: float = setting(1e-4, "AdamW weight decay.", f"{PAPER}, experiments", ge=0.0)
    adam_beta1: float = setting(0.9, "AdamW beta 1.", "torch's default", ge=0.0, lt=1.0)
    adam_beta2: float = setting(0.999, "AdamW beta 2.", "torch's default", ge=0.0, lt=1.0)
    adam_eps: float = setting(1e-8, "AdamW epsilon.", "torch's default", gt=0.0)
    clip_range: float = setting(1e-4, "Clip range of the ratio.", f"{PAPER}, method", gt=0.0)
    max_grad_norm: float = setting(
        1.0, "Gradients are clipped to this norm.", f"{PAPER}, experiments", gt=0.0
    )
    kl_weight: float = setting(
        0.0, "Weight of the distance to the base model in the loss.", f"{PAPER}: no KL", ge=0.0
    )
    kl: Literal["velocity", "transition"] = setting(
        "velocity",
        "That distance: mean((v - v_ref)^2), or Flow-GRPO's of the transition, "
        "(mean - mean_ref)^2 / (2 s^2) with s = std / sqrt(|dt|).",
    )
    optimizer_cadence: Literal["per_iteration", "per_step"] = setting(
        "per_iteration",
        "One optimizer step after all trained steps, or one after each (as the "
        "authors' code does).",
    )
    ema_decay: float | None = setting(
        None, "Decay of the averaged weights; null for none.", PAPER, gt=0.0, lt=1.0
    )
    micro_batch: int = setting(96, "Most latents in one evaluation while sampling.", ge=1)
    train_micro_batch: int = setting(16, "Most branch points in one forward/backward.", ge=1)
    decode_batch: int = setting(96, "Most latents decoded at once.", ge=1)
    gradient_checkpointing: bool = setting(False, "Recompute activations in the backward pass.")
    checkpoint_every: int = setting(10, "Iterations between checkpoints.", ge=1)
    monitor_every: int = setting(
        10, "Iterations between measurements on fixed held-out prompts; 0 for none.", ge=0
    )
    monitor_prompts: int = setting(8, "Held-out prompts that are monitored.", ge=1)
    monitor_samples: int = setting(2, "Samples of each monitored prompt.", ge=1)


class Profile(Settings):
    """The empirical entropy profile of the base model."""

    prompts: int = setting(8, "Training prompts that are profiled.", ge=1)
    samples: int = setting(12, "Branches K from each anchor latent.", f"{PAPER}, Fig. 1a", ge=2)
    spans: list[int] = setting([1, 2, 4, 6], "Spans that are measured.", f"{PAPER}, Table 2")
    noise_fraction: float = setting(
        0.1,
        "Yardstick: share of random noise on the final image.",
        f"{PAPER}, Fig. 1a",
        gt=0.0,
        lt=1.0,
    )

    @model_validator(mode="after")
    def _spans(self) -> Self:
        if not self.spans or min(self.spans) < 1 or len(set(self.spans)) != len(self.spans):
            raise ValueError("spans: distinct whole numbers of at least 1 are needed")
        return self


class Evaluate(Settings):
    """Evaluation on the held-out prompts."""

    steps: int = setting(50, "ODE steps.", f"{PAPER}, experiments", ge=1)
    samples: int = setting(1, "Images of each prompt.", f"{PAPER}, experiments", ge=1)
    prompts: int | None = setting(None, "First prompts that are used; null for all.", ge=1)
    micro_batch: int = setting(96, "Most latents in one evaluation.", ge=1)
    grid_prompts: int = setting(8, "Prompts shown in the image grids.", ge=1)
    bootstrap: int = setting(10_000, "Resamples of the confidence intervals.", ge=100)


class Tracking(Settings):
    """MLflow."""

    uri: str | None = setting(
        None, "Tracking server; null takes MLFLOW_TRACKING_URI, else SQLite in the results folder."
    )
    every_seconds: float = setting(
        5.0, "Pause between deliveries of live metrics, seconds.", gt=0.0
    )
    enabled: bool = setting(True, "Deliver live metrics while training.")


class RunConfig(Settings):
    """One training run, fully resolved: what its ``config.yaml`` holds."""

    run: str = setting(..., "Run id.", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=80)
    study: str = setting(
        "laptop",
        "Name of the study: results folder and MLflow experiment.",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        max_length=80,
    )
    seed: int = setting(0, "Run seed.", ge=0, lt=2**31)
    model: Model
    prompts: Prompts
    schedule: Schedule = Schedule()
    method: AnyMethod = Egrpo()
    rewards: dict[str, Reward] = setting(..., "Reward models: name -> settings.")
    advantage: Advantage = Advantage()
    train: Train
    profile: Profile = Profile()
    evaluate: Evaluate = Evaluate()
    tracking: Tracking = Tracking()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.train.rewards:
            raise ValueError("train.rewards: at least one reward must be trained")
        unknown = sorted(set(self.train.rewards) - set(self.rewards))
        if unknown:
            raise ValueError(
                f"train.rewards: {unknown[0]!r} is not defined under rewards "
                f"({', '.join(sorted(self.rewards))})"
            )
        if min(self.profile.spans) >= self.method.steps:  # the profile leaves longer ones out
            raise ValueError(
                f"profile.spans: {min(self.profile.spans)} does not fit {self.method.steps} steps"
            )
        if self.method.dynamics == "cps" and self.method.noise_level > 1:
            raise ValueError("method.noise_level: cps needs a value in (0, 1]")
        return self


class StudyConfig(Settings):
    """What a study's YAML holds beside the settings of :class:`RunConfig`."""

    results: str = setting("results", "Folder of all results.")
    runs: str = setting(..., "Runs table (.tsv): a run id and overrides by dotted key.")
    methods: dict[str, dict[str, Any]] = setting(
        {}, "Settings of `method` by method name, for every run of that method."
    )
