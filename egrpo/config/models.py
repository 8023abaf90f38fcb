"""Every setting, with its unit, bounds, default and the default's source.

Frozen, and unknown keys are refused. The commented reference YAML, the JSON schema and the
settings page are generated from these classes (``docs.generate``).
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from egrpo.config.rewards import AnyReward
from egrpo.core.noise import DETERMINISTIC
from egrpo.core.schedule import Sigmas, check_sigmas, shifted_sigmas, stock_end
from egrpo.methods import AnyMethod
from egrpo.methods.awm import AWM
from egrpo.methods.base import FLOW, GUARD, NFT, Loss, Solver
from egrpo.methods.egrpo import Egrpo
from egrpo.settings import PAPER, Settings, check_path, setting, without_password

OWN_GRID = ("sd3",)
"""Families whose stock pipeline has its scheduler make the grid, which then ends near 0; those of
the others hand over equally spaced sigmas down to 1/T."""

TOKEN = 16
"""Pixels of an image token's side: a latent has 8, a patch 2 of these."""


class Lora(Settings):
    """Low-rank adapters (peft)."""

    rank: int = setting(32, "Rank of the adapters.", FLOW, unit="1", ge=1)
    alpha: int = setting(
        64,
        "Scale: adapters are multiplied by alpha / rank; saved ones hold it in their weights.",
        FLOW,
        unit="1",
        ge=1,
    )
    targets: list[str] | None = setting(
        None, "Names of the adapted linear layers; null takes the family's own list.", FLOW
    )


class FeatureCache(Settings):
    """TaylorSeer (arXiv 2503.06923): predict some evaluations from those before."""

    interval: int = setting(
        3, "Every so many steps the network is really evaluated.", unit="steps", ge=2
    )
    warm_up: int = setting(
        2,
        "First steps of a suffix on which it always is.",
        "diffusers: 3, for 50 steps",
        unit="steps",
        ge=1,
    )
    order: int = setting(1, "Order of the Taylor series.", "diffusers", unit="1", ge=0, le=3)


class Model(Settings):
    """The base model: a local path or a hub id, in diffusers' format."""

    family: Literal["sd3", "flux", "qwen_image", "z_image"] = setting(
        "sd3",
        "Model family; chooses the adapter: SD3 and SD3.5, FLUX.1, Qwen-Image, Z-Image.",
    )
    path: str = setting(..., "Folder with the pipeline, or a hub id.")
    revision: str | None = setting(
        None, "Revision of a hub id; a file laid over another that changes `path` drops it."
    )
    dtype: Literal["float32", "bfloat16", "float16"] = setting(
        "bfloat16", "Type of weights and stored latents.", f"{PAPER}, experiments"
    )
    device: str = setting("auto", "torch device; auto takes CUDA where there is one.")
    height: int = setting(
        720, "Image height in pixels, in training.", "DanceGRPO's FLUX recipe", unit="pixels", ge=8
    )
    width: int = setting(
        720, "Image width in pixels, in training.", "DanceGRPO's FLUX recipe", unit="pixels", ge=8
    )
    guidance_scale: float = setting(
        1.0,
        "Classifier-free guidance, with `negative_prompt` where a prompt file has one, in sampling "
        "and in training; 1 means one evaluation per velocity, more means two. (Z-Image's pipeline "
        "counts from 0: its 5 is 6 here.)",
        unit="1",
        ge=1.0,
    )
    embedded_guidance: float = setting(
        3.5,
        "Guidance that distilled models (FLUX.1-dev) take as an input; others ignore it.",
        f"{PAPER}, experiments",
        unit="1",
        ge=0.0,
    )
    max_sequence_length: int | None = setting(
        None,
        "Most text tokens (of SD3 and FLUX.1: of T5); null: what the family's pipeline takes, "
        "sd3 256, flux, qwen_image and z_image 512.",
        "diffusers' pipelines",
        unit="tokens",
        ge=0,
        le=1024,
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
    vae_tiling: bool = setting(False, "Decode large images in tiles: less memory, faint seams.")
    vae_slicing: bool = setting(False, "Decode one image at a time inside the VAE: less memory.")
    attention_backend: str = setting(
        "auto",
        "Attention of the transformer: auto, torch's choice without cuDNN's kernel, whose backward "
        "pass fails in FLUX's blocks on Hopper cards; native, torch's choice with it; or "
        "diffusers' name of another (_native_cudnn, _native_flash, flash, sage ...), which sd3's "
        "layers do not take. A training job checks it on one block of each kind first.",
        "diffusers, attention_dispatch",
    )
    compile: bool = setting(
        False, "torch.compile the transformer's blocks: the first evaluations take minutes."
    )
    feature_cache: FeatureCache | None = setting(
        None,
        "Evaluations of training's rollouts whose log-probability nobody needs reuse features of "
        "the steps before: `interval`, `warm_up`, `order`; null: all are exact. Monitors and "
        "evaluation are always exact.",
    )
    fp8_weights: bool = setting(
        False,
        "Store the frozen weights as float8 and compute in `dtype`: half the memory, rounded "
        "weights.",
        "diffusers, layerwise casting",
    )

    @model_validator(mode="after")
    def _path(self) -> Self:
        check_path("path", self.path)
        return self

    @model_validator(mode="after")
    def _cache_is_offered(self) -> Self:
        if self.feature_cache is not None and self.family == "z_image":
            raise ValueError("feature_cache: diffusers offers none for z_image")
        return self

    @model_validator(mode="after")
    def _full_tuning_in_float32(self) -> Self:
        if self.tuning == "full" and self.dtype != "float32":
            raise ValueError(
                f"dtype: {self.dtype} rounds the updates of tuning: full away; set float32, or "
                "tuning: lora"
            )
        return self


class Prompts(Settings):
    """Prompt files: .txt (one a line), .jsonl, .json, .csv or .tsv (`prompt`, optional
    `negative_prompt`); empty prompts are left out."""

    train: str = setting(..., "Prompts to train on.")
    heldout: str = setting(..., "Prompts to evaluate and monitor on.")
    limit: int | None = setting(
        None,
        "So many of the prompts to train on are drawn once and used, in the file's order; null: "
        "all. An embedded prompt takes 4 MiB of disk with FLUX.1.",
        unit="prompts",
        ge=1,
    )
    column: str = setting(
        "prompt",
        "Column or key of the prompts in both files, where they are not .txt; in other capitals it "
        "is found too.",
    )

    @model_validator(mode="after")
    def _paths(self) -> Self:
        check_path("train", self.train)
        check_path("heldout", self.heldout)
        return self


class Schedule(Settings):
    """The sigma grids of training and evaluation."""

    shift: PositiveFloat | Literal["dynamic"] = setting(
        3.0,
        "Timestep shift s of s*t/(1+(s-1)*t); dynamic: exp(mu), where mu grows with the number of "
        "image tokens, by the four settings below.",
        f"{PAPER}, experiments",
        unit="1",
    )
    base_shift: float = setting(0.5, "mu at base_tokens.", "FLUX.1-dev's scheduler", unit="1")
    max_shift: float = setting(
        1.15, "mu at max_tokens.", "FLUX.1-dev's scheduler; Qwen-Image's is 0.9", unit="1"
    )
    base_tokens: int = setting(
        256, "Image tokens of base_shift.", "FLUX.1-dev's scheduler", unit="tokens", ge=1
    )
    max_tokens: int = setting(
        4096,
        "Image tokens of max_shift.",
        "FLUX.1-dev's scheduler; Qwen-Image's is 8192",
        unit="tokens",
        ge=1,
    )
    terminal: float | None = setting(
        None,
        "Stretch the grid so that its last step starts here; null: leave it.",
        "Qwen-Image's scheduler has 0.02 (shift_terminal)",
        unit="flow time",
        gt=0.0,
        lt=1.0,
    )

    end: Literal["uniform", "stock"] | None = setting(
        None,
        "Where the grid ends before 0. uniform: T equal intervals before the shift, the paper's "
        "formula; stock: where the family's stock pipeline ends it, which is uniform but for sd3. "
        "null: stock in evaluation, in monitors and in training by methods whose public code "
        "samples so (flow_grpo, flow_grpo_fast, tempflow_grpo, diffusion_nft, awm); otherwise "
        "uniform.",
        f"{PAPER}; {FLOW}; diffusers' pipelines",
    )

    @model_validator(mode="after")
    def _two_points(self) -> Self:
        if self.shift == "dynamic" and self.base_tokens == self.max_tokens:
            raise ValueError("max_tokens: must differ from base_tokens")
        return self

    def shift_at(self, height: int, width: int) -> float:
        """The shift of images of this size in pixels."""
        if self.shift != "dynamic":
            return float(self.shift)
        tokens = (height // TOKEN) * (width // TOKEN)
        slope = (self.max_shift - self.base_shift) / (self.max_tokens - self.base_tokens)
        return math.exp(self.base_shift + slope * (tokens - self.base_tokens))

    def end_at(self, model: Model, *, stock: bool) -> float | None:
        """Unshifted time of the last evaluation; None where all intervals are equal.

        Args:
            model: the family, and the size of images.
            stock: what `end` is where it is null.
        """
        if model.family not in OWN_GRID or not (stock if self.end is None else self.end == "stock"):
            return None
        return stock_end(self.shift_at(model.height, model.width), dynamic=self.shift == "dynamic")

    def sigmas(self, model: Model, steps: int, *, stock: bool) -> Sigmas:
        """The grid of ``steps`` steps for images of the model's size; see :meth:`end_at`."""
        shift = self.shift_at(model.height, model.width)
        return shifted_sigmas(steps, shift, self.terminal, self.end_at(model, stock=stock))


class Advantage(Settings):
    """From rewards to advantages."""

    combine: Literal["advantages", "rewards", "gdpo"] = setting(
        "advantages",
        "Several rewards: normalise each and sum; sum and normalise; or GDPO (arXiv 2601.05242): "
        "normalise each, sum, normalise over the batch.",
        PAPER,
    )
    std: Literal["group", "batch"] = setting(
        "group", "Divide by the std of the group or of the whole batch.", f"{PAPER}, method"
    )
    ddof: Literal[0, 1] = setting(
        1, "1 for the unbiased std, 0 for the population's.", PAPER, unit="1"
    )
    eps: float = setting(1e-8, "Added to the std.", PAPER, unit="of the reward", gt=0.0)
    clamp: float = setting(5.0, "Bound of the absolute advantage.", PAPER, unit="1", gt=0.0)


class Bound(Settings):
    """Where a monitor on the fixed held-out prompts shows that training goes wrong."""

    least: float | None = setting(
        None, "Least value, in the monitor's unit.", unit="of the monitor"
    )
    most: float | None = setting(
        None, "Largest value, in the monitor's unit.", unit="of the monitor"
    )
    fall: float | None = setting(
        None,
        "Furthest fall below the untrained model's value, in the monitor's unit.",
        unit="of the monitor",
        ge=0.0,
    )
    collapse: float | None = setting(
        None,
        "Furthest fall below the untrained model's value, in standard deviations of the scores of "
        "the monitored images (of diversity: of the prompts), before and after pooled. A fall that "
        "noise explains does not count, so of few images it must be larger; of fewer than 4 none "
        "does.",
        unit="standard deviations",
        ge=0.0,
    )
    action: Literal["warn", "stop"] = setting(
        "warn", "Say so and go on, or end the training there and keep what it made."
    )

    @model_validator(mode="after")
    def _some_bound(self) -> Self:
        if {self.least, self.most, self.fall, self.collapse} == {None}:
            raise ValueError("least, most, fall or collapse: one of them is needed")
        return self


COLLAPSE, DIVERSITY_COLLAPSE = 1.0, 2.0
"""``collapse`` of rewards and of diversity without a bound of their own. Diversity shrinks in
training that succeeds, too."""


class Train(Settings):
    """The optimisation."""

    rewards: dict[str, float] = setting(
        ...,
        "Trained rewards: name -> weight. One choice: where a file is laid over another, or a cell "
        "of the runs table, it replaces what is below; a column `train.rewards.<name>` sets that "
        "one.",
        unit="1",
    )
    iterations: int = setting(
        300,
        "Iterations: rollout, advantages, optimizer step(s).",
        f"{PAPER}, experiments",
        unit="iterations",
        ge=1,
    )
    prompts_per_iteration: int = setting(
        8,
        "Prompts of one iteration.",
        f"{PAPER}, experiments: 1 per GPU on 8 GPUs",
        unit="prompts",
        ge=1,
    )
    learning_rate_full: float = setting(
        2e-6, "Learning rate of full fine-tuning.", f"{PAPER}, experiments", unit="1", gt=0.0
    )
    learning_rate_lora: float = setting(
        6e-5,
        "Learning rate of LoRA.",
        "30 times the full one, the ratio of DanceGRPO's two recipes (1e-5, 3e-4)",
        unit="1",
        gt=0.0,
    )
    learning_rate_scale: float = setting(
        1.0,
        "Factor on the method's learning rate; the same for all methods of a study.",
        unit="1",
        gt=0.0,
    )
    weight_decay: float = setting(
        1e-4, "AdamW weight decay.", f"{PAPER}, experiments", unit="1", ge=0.0
    )
    adam_beta1: float = setting(0.9, "AdamW beta 1.", "torch's default", unit="1", ge=0.0, lt=1.0)
    adam_beta2: float = setting(0.999, "AdamW beta 2.", "torch's default", unit="1", ge=0.0, lt=1.0)
    adam_eps: float = setting(1e-8, "AdamW epsilon.", "torch's default", unit="1", gt=0.0)
    clip_range: float = setting(
        1e-4, "Clip range of the ratio.", f"{PAPER}, method", unit="1", gt=0.0
    )
    max_grad_norm: float = setting(
        1.0, "Gradients are clipped to this norm.", f"{PAPER}, experiments", unit="1", gt=0.0
    )
    kl_weight: float = setting(
        0.0,
        "Weight of the distance to the base model in the loss.",
        f"{PAPER}: no KL",
        unit="1",
        ge=0.0,
    )
    kl: Literal["velocity", "transition", "divergence"] = setting(
        "velocity",
        "That distance: mean((v - v_ref)^2); the KL divergence of the transition, "
        "(mean - mean_ref)^2 / (2 std^2); or Flow-GRPO's `transition`, which is |dt| times that, "
        "and with cps the same.",
    )
    updates: int = setting(
        1,
        "Optimizer steps of an iteration: samples are cut into this many parts. Of a method that "
        "branches at n steps of one anchor, n parts give one optimizer step after each, as in the "
        "code of E-GRPO.",
        unit="optimizer steps",
        ge=1,
        le=1024,
    )
    loss: Loss = setting(
        "clipped",
        "Clipped ratio; GRPO-Guard's normalised ratio, clipped; or DiffusionNFT's negative-aware "
        "objective.",
        f"{PAPER}; {GUARD}; {NFT}",
    )
    ema_decay: float | None = setting(
        None, "Decay of the averaged weights; null for none.", PAPER, unit="1", gt=0.0, lt=1.0
    )
    ema_ramp: PositiveFloat | Literal["warm_up"] | None = setting(
        None,
        "How the decay grows up to ema_decay: by this much an iteration; warm_up: it is "
        "(1 + n) / (10 + n) after n optimizer steps; null: it is constant.",
        f"{NFT}; {FLOW}: warm_up",
        unit="per iteration",
    )
    ema_every: int = setting(
        1,
        "The average moves after optimizer steps n for which n + 1 is a multiple of this.",
        f"{FLOW}: 8",
        unit="optimizer steps",
        ge=1,
    )
    ema_weight: float = setting(
        0.0,
        "Weight of the distance to the averaged weights in the loss, mean((v - v_average)^2).",
        f"{AWM}: 1",
        unit="1",
        ge=0.0,
    )
    sample_average: bool = setting(
        False, "Sample with the averaged weights (DiffusionNFT's slow policy).", NFT
    )
    prompts_at_once: int | None = setting(
        None,
        "Prompts sampled together, of a process; the rewards of one such part are computed while "
        "the next is sampled. null: all.",
        unit="prompts",
        ge=1,
    )
    micro_batch: int = setting(
        96, "Most latents in one evaluation while sampling.", unit="latents", ge=1
    )
    train_micro_batch: int = setting(
        16, "Most branch points in one forward/backward.", unit="latents", ge=1
    )
    decode_batch: int = setting(96, "Most latents decoded at once.", unit="latents", ge=1)
    gradient_checkpointing: bool = setting(False, "Recompute activations in the backward pass.")
    checkpoint_every: int = setting(10, "Iterations between checkpoints.", unit="iterations", ge=1)
    monitor_every: int = setting(
        10,
        "Iterations between measurements on fixed held-out prompts; 0 for none.",
        unit="iterations",
        ge=0,
    )
    monitor_prompts: int = setting(8, "Held-out prompts that are monitored.", unit="prompts", ge=1)
    monitor_samples: int = setting(2, "Samples of each monitored prompt.", unit="images", ge=1)
    bounds: dict[str, Bound] = setting(
        {},
        "Bounds of monitors, against reward hacking: `reward/<name>`, `diversity` or "
        "`distance_to_base` -> settings. Without one, a reward has {collapse: 1.0} and diversity "
        "{collapse: 2.0}, which warn. null takes one of a file below away.",
    )
    snapshots: list[int] = setting(
        [],
        "Network evaluations at which the weights are kept as well, to compare methods at equal "
        "cost; after the last iteration that stays within each.",
        unit="network evaluations",
    )


class Profile(Settings):
    """The empirical entropy profile of the base model."""

    prompts: int = setting(8, "Training prompts that are profiled.", unit="prompts", ge=1)
    samples: int = setting(
        12, "Branches K from each anchor latent.", f"{PAPER}, Fig. 1a", unit="samples", ge=2
    )
    spans: list[int] = setting(
        [1, 2, 4, 6], "Spans that are measured.", f"{PAPER}, Table 2", unit="grid intervals"
    )
    noise_fraction: float = setting(
        0.1,
        "Yardstick: share of random noise on the final image.",
        f"{PAPER}, Fig. 1a",
        unit="1",
        gt=0.0,
        lt=1.0,
    )
    micro_batch: int = setting(96, "Most latents in one evaluation.", unit="latents", ge=1)
    decode_batch: int = setting(96, "Most latents decoded at once.", unit="latents", ge=1)
    shown: list[list[int]] = setting(
        [[2, 1], [6, 1], [6, 4]],
        "Branches whose images are kept: [step, span]; those off the schedule are left out.",
        f"{PAPER}, Fig. 1a",
        unit="grid index, grid intervals",
    )
    strides: list[int] = setting(
        [1, 2, 4],
        "Strides of the suffixes that `snakemake suffixes` compares with the exact one.",
        unit="grid intervals",
    )
    solvers: list[Solver] = setting(["ode", "dpm2"], "Their solvers; each stride with each solver.")
    features: list[int] = setting(
        [2, 3],
        "Intervals of model.feature_cache that `snakemake suffixes` compares as well.",
        unit="steps",
    )
    fp8: bool = setting(True, "Whether it compares float8 weights (model.fp8_weights) as well.")
    shown_prompts: int = setting(2, "First prompts whose images are kept.", unit="prompts", ge=0)

    @model_validator(mode="after")
    def _spans(self) -> Self:
        if not self.spans or min(self.spans) < 1 or len(set(self.spans)) != len(self.spans):
            raise ValueError("spans: distinct whole numbers of at least 1 are needed")
        return self


class Evaluate(Settings):
    """Evaluation on the held-out prompts."""

    steps: int = setting(50, "ODE steps.", f"{PAPER}, experiments", unit="steps", ge=1, le=1000)
    height: int | None = setting(
        None,
        "Image height in pixels; null: as in training. The paper's is 1024.",
        PAPER,
        unit="pixels",
        ge=8,
    )
    width: int | None = setting(
        None,
        "Image width in pixels; null: as in training. The paper's is 1024.",
        PAPER,
        unit="pixels",
        ge=8,
    )
    guidance_scale: float | None = setting(
        None, "Classifier-free guidance; null: as in training.", unit="1", ge=1.0
    )
    samples: int = setting(
        1, "Images of each prompt.", f"{PAPER}, experiments", unit="images", ge=1
    )
    prompts: int | None = setting(
        None, "First prompts that are used; null for all.", unit="prompts", ge=1
    )
    micro_batch: int = setting(96, "Most latents in one evaluation.", unit="latents", ge=1)
    grid_prompts: int = setting(8, "Prompts shown in the image grids.", unit="prompts", ge=1)
    bootstrap: int | None = setting(
        None,
        "Resamples, of versions that resampled; it has no effect: intervals are computed.",
        unit="resamples",
    )


class Tracking(Settings):
    """MLflow."""

    uri: str | None = setting(
        None,
        "Tracking server, without a password; null takes MLFLOW_TRACKING_URI, else SQLite in the "
        "results folder.",
    )
    every_seconds: float = setting(
        5.0, "Pause between deliveries of live metrics, seconds.", unit="s", gt=0.0
    )
    enabled: bool = setting(True, "Deliver live metrics while training.")

    @model_validator(mode="after")
    def _no_password(self) -> Self:
        if self.uri is not None and without_password(self.uri) != self.uri:
            raise ValueError(
                "uri: holds a user or a password, which files of the results would show; leave "
                "them out and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or leave "
                "the key out and set MLFLOW_TRACKING_URI, which is used and never written"
            )
        return self


class RunConfig(Settings):
    """One training run, fully resolved: what its ``config.yaml`` holds."""

    run: str = setting(..., "Run id.", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=80)
    study: str = setting(
        "laptop",
        "Name of the study: results folder and MLflow experiment.",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        max_length=80,
    )
    arm: str = setting("", "Row of the runs table; runs of one arm differ in their seed alone.")
    seed: int = setting(0, "Run seed.", ge=0, lt=2**31)
    model: Model
    prompts: Prompts
    schedule: Schedule = Schedule()
    method: AnyMethod = Egrpo()
    rewards: dict[str, AnyReward] = setting(
        ...,
        "Reward models by name; the name is what train.rewards and the tables use. Files laid over "
        "each other add to them and change single settings, null takes one away; another `kind` "
        "starts anew; the `options` of another `function` do, and the commit of another hub id.",
    )
    advantage: Advantage = Advantage()
    train: Train
    profile: Profile = Profile()
    evaluate: Evaluate = Evaluate()
    tracking: Tracking = Tracking()

    @property
    def bounds(self) -> dict[str, Bound]:
        """Bounds of monitors: those set, and those of rewards and diversity without one."""
        unset = {f"reward/{name}": Bound(collapse=COLLAPSE) for name in self.rewards}
        unset["diversity"] = Bound(collapse=DIVERSITY_COLLAPSE)
        return unset | self.train.bounds

    @property
    def evaluation_model(self) -> Model:
        """The model as evaluation samples from it."""
        e = self.evaluate
        changed = {"height": e.height, "width": e.width, "guidance_scale": e.guidance_scale}
        return self.model.model_copy(update={k: v for k, v in changed.items() if v is not None})

    @property
    def guided(self) -> bool:
        """Whether training or evaluation needs the negative prompts."""
        return max(self.model.guidance_scale, self.evaluation_model.guidance_scale) > 1

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
        return self

    @model_validator(mode="after")
    def _grids(self) -> Self:
        for model, steps, stock in (
            (self.model, self.method.steps, self.method.stock_grid),
            (self.model, self.evaluate.steps, True),
            (self.evaluation_model, self.evaluate.steps, True),
        ):
            s = self.schedule
            try:
                check_sigmas(s.sigmas(model, steps, stock=stock))
            except (ValueError, ArithmeticError):
                raise ValueError(
                    f"schedule: shift {s.shift} and terminal {s.terminal} leave no grid of {steps} "
                    f"steps from 1 to 0, for images of {model.height} x {model.width} pixels"
                ) from None
        return self

    @model_validator(mode="after")
    def _possible(self) -> Self:
        method, t = self.method, self.train
        if t.loss not in method.losses:
            raise ValueError(
                f"train.loss: {t.loss} is not for method {method.name}, whose trained edges allow "
                f"{' or '.join(method.losses)}"
            )
        if t.loss == "guarded" and method.dynamics == "cps":
            raise ValueError("train.loss: guarded needs a Gaussian log-probability; cps has none")
        if t.kl_weight > 0 and t.kl != "velocity" and method.dynamics in DETERMINISTIC:
            raise ValueError(
                f"train.kl: {t.kl} compares stochastic transitions, method {method.name} has none; "
                "set it to velocity"
            )
        for key in ("sample_average", "ema_ramp", "ema_weight"):
            if t.ema_decay is None and getattr(t, key):
                raise ValueError(f"train.{key}: needs train.ema_decay")
        known = {"diversity", "distance_to_base", *(f"reward/{name}" for name in self.rewards)}
        unknown = sorted(set(t.bounds) - known)
        if unknown:
            raise ValueError(
                f"train.bounds: no monitor {unknown[0]!r}; there are {', '.join(sorted(known))}"
            )
        if t.bounds and not t.monitor_every:
            raise ValueError("train.bounds: nothing is monitored; set train.monitor_every")
        distance = t.bounds.get("distance_to_base")
        if distance is not None and distance.collapse is not None:
            raise ValueError("train.bounds: distance_to_base begins at 0 and cannot collapse")
        if "diversity" in t.bounds and t.monitor_samples < 2:
            raise ValueError("train.bounds: diversity needs train.monitor_samples of at least 2")
        zero = [name for name, weight in t.rewards.items() if weight == 0]
        if zero:
            raise ValueError(
                f"train.rewards: {zero[0]!r} has weight 0 and trains nothing; null leaves it out"
            )
        if t.snapshots != sorted(set(t.snapshots)) or min(t.snapshots, default=1) < 1:
            raise ValueError(
                "train.snapshots: distinct, ascending numbers of at least 1 are needed"
            )
        if method.reads_profile and 1 not in self.profile.spans:
            raise ValueError("profile.spans: must hold 1 where the plan reads the profile")
        return self


class TableSpec(Settings):
    """One table of results: arms by rewards, at the end of training and at equal evaluations."""

    caption: str = setting(..., "What the table shows, one sentence.")
    sections: dict[str, list[str]] = setting(
        ...,
        "Heading -> arms (rows of the runs table) below it; best and second are marked within. One "
        "choice: a file laid over another replaces all of them.",
    )
    rewards: list[str] = setting(..., "Columns: names of rewards.")
    evaluations: PositiveInt | Literal["cheapest"] | None = setting(
        None,
        "Network evaluations of training at which the arms are also compared; cheapest: what the "
        "cheapest of them spends in all, if that is an iteration of each; null: only at the end.",
        unit="network evaluations",
    )

    @property
    def arms(self) -> list[str]:
        """All arms of the table, each once."""
        return list(dict.fromkeys(arm for arms in self.sections.values() for arm in arms))


class FigureSpec(Settings):
    """One figure."""

    kind: Literal["branches", "entropy", "spread", "threshold", "curves", "images"] = setting(
        ...,
        "branches: images and reward spread of branches (`pairs`); entropy: by step for `spans`; "
        "spread: measured spread by step; threshold: the automatic choice and its plan; curves: "
        "reward during training; images: prompts by arms.",
    )
    caption: str = setting(..., "What the figure shows, one sentence.")
    arms: list[str] = setting(..., "Arms that it shows, or whose profile it shows.")
    rewards: list[str] = setting([], "Rewards of curves; empty: the trained ones.")
    pairs: list[list[int]] = setting(
        [[2, 1], [6, 1], [6, 4]],
        "Branches shown, of those that profile.shown keeps: [step, span].",
        f"{PAPER}, Fig. 1a",
        unit="grid index, grid intervals",
    )
    spans: list[int] = setting(
        [1, 2, 4, 6],
        "Spans whose entropy is drawn, of profile.spans.",
        f"{PAPER}, Fig. 1b",
        unit="grid intervals",
    )
    prompts: int = setting(6, "Prompts of an image grid, or of branches.", unit="prompts", ge=1)


class StudyConfig(Settings):
    """What a study's YAML holds beside the settings of :class:`RunConfig`."""

    results: str = setting("results", "Folder of all results.")
    runs: str = setting(..., "Runs table (.tsv): an arm's name and overrides by dotted key.")
    seeds: list[Annotated[int, Field(ge=0, lt=2**31)]] | None = setting(
        None,
        "Each arm is trained once per seed, as run `<arm>-s<seed>`; null: once, as run `<arm>`.",
    )
    default_runs: list[str] | None = setting(
        None, "Runs that `snakemake` makes without a target; null: all."
    )
    paper: list[str] | None = setting(
        None, "Tables and figures that the target `paper` makes; null: all."
    )
    tables: dict[str, TableSpec] = setting(
        {}, "Tables by name; the name is the target. null takes one of a file below away."
    )
    figures: dict[str, FigureSpec] = setting(
        {},
        "Figures by name; the name is the target. null takes one of a file below away; another "
        "`kind` starts anew.",
    )
    libraries: Literal["warn", "remake"] = setting(
        "warn",
        "Results made with other versions of torch, diffusers, transformers, peft, accelerate, "
        "numpy, open_clip or CLIP: said in one line, or made again.",
    )
    methods: dict[str, dict[str, Any]] = setting(
        {}, "Settings of `method` by method name, for every run of that method."
    )

    @model_validator(mode="after")
    def _paths(self) -> Self:
        check_path("results", self.results)
        if not self.results or self.results.startswith("-"):
            raise ValueError("results: is no folder that a command can name; `.` is this one")
        if "?" in self.results:  # SQLAlchemy reads options behind it, and has no escape
            raise ValueError(f"results: {self.results!r:.100} holds '?', which MLflow cannot read")
        return self
