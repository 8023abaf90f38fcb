"""Every setting, with its unit, bounds, default and the default's source.

Frozen, and unknown keys are refused. The commented reference YAML, the JSON schema and the
settings page are generated from these classes (``docs.generate``).
"""

from __future__ import annotations

import math
from typing import Literal, Self

from pydantic import NonNegativeFloat, PositiveFloat, model_validator

from egrpo.config.consistency import problems
from egrpo.config.measuring import Evaluate, Profile, Tracking
from egrpo.config.rewards import AnyReward
from egrpo.config.training import COLLAPSE, DIVERSITY_COLLAPSE, Advantage, Bound, Train
from egrpo.core.schedule import Sigmas, shifted_sigmas, stock_end
from egrpo.methods import AnyMethod
from egrpo.methods.base import FLOW
from egrpo.methods.egrpo import Egrpo
from egrpo.settings import EXPERIMENTS, PAPER, Count, Fraction, Settings, setting

OWN_GRID = ("sd3",)
"""Families whose stock pipeline has its scheduler make the grid, which then ends near 0; those of
the others hand over equally spaced sigmas down to 1/T."""

TOKEN = 16
"""Pixels of an image token's side: a latent has 8, a patch 2 of these."""


class Lora(Settings):
    """Low-rank adapters (peft)."""

    rank: Count = setting(32, source=FLOW)
    """Rank of the adapters."""
    alpha: Count = setting(64, source=FLOW)
    """Scale: adapters are multiplied by alpha / rank; saved ones hold it in their weights."""
    targets: list[str] | None = setting(None, source=FLOW)
    """Names of the adapted linear layers; null takes the family's own list."""
    start: str | None = setting(None)
    """File of an adapter that training goes on from: ours, diffusers', or another form that
    diffusers reads, as kohya's for FLUX.1. Its rank may be smaller than `rank`. It is part of the
    base model that runs are compared with; penalties pull towards the model without it."""


class FeatureCache(Settings):
    """TaylorSeer (arXiv 2503.06923): predict some evaluations from those before."""

    interval: int = setting(3, unit="steps", ge=2)
    """Every so many steps the network is really evaluated."""
    warm_up: Count = setting(2, source="diffusers: 3, for 50 steps", unit="steps")
    """First steps of a suffix on which it always is."""
    order: int = setting(1, source="diffusers", ge=0, le=3)
    """Order of the Taylor series."""


class Model(Settings):
    """The base model: a local path or a hub id, in diffusers' format."""

    sources = ("path",)

    family: Literal["sd3", "flux", "qwen_image", "z_image"] = setting("sd3")
    """Model family; chooses the adapter: SD3 and SD3.5, FLUX.1, Qwen-Image, Z-Image."""
    path: str = setting(...)
    """Folder with the pipeline, or a hub id."""
    revision: str | None = setting(None)
    """Revision of a hub id; a file laid over another that changes `path` drops it."""
    dtype: Literal["float32", "bfloat16", "float16"] = setting("bfloat16", source=EXPERIMENTS)
    """Type of weights and stored latents."""
    device: str = setting("auto")
    """torch device; auto takes CUDA where there is one."""
    height: int = setting(720, source="DanceGRPO's FLUX recipe", unit="pixels", ge=8)
    """Image height in pixels, in training."""
    width: int = setting(720, source="DanceGRPO's FLUX recipe", unit="pixels", ge=8)
    """Image width in pixels, in training."""
    guidance_scale: float = setting(1.0, ge=1.0)
    """Classifier-free guidance, with `negative_prompt` where a prompt file has one, in sampling and
    in training; 1 means one evaluation per velocity, more means two. (Z-Image's pipeline counts
    from 0: its 5 is 6 here.)"""
    embedded_guidance: NonNegativeFloat = setting(3.5, source=EXPERIMENTS)
    """Guidance that distilled models (FLUX.1-dev) take as an input; others ignore it."""
    max_sequence_length: int | None = setting(
        None, source="diffusers' pipelines", unit="tokens", ge=0, le=1024
    )
    """Most text tokens (of SD3 and FLUX.1: of T5); null: what the family's pipeline takes, sd3 256,
    flux, qwen_image and z_image 512."""
    tuning: Literal["lora", "full"] = setting("lora")
    """What is trained."""
    lora: Lora = Lora()
    merge_lora_for_sampling: bool = setting(True)
    """Evaluations whose log-probability nobody needs use a copy of the adapted layers with the LoRA
    merged: faster, for the memory of these layers. In 16 bit the merged weights are rounded up or
    down at random, so that small updates are not lost."""
    channels_last: bool = setting(True)
    """Memory format of the VAE's convolutions."""
    vae_tiling: bool = setting(False)
    """Decode large images in tiles: less memory, faint seams."""
    vae_slicing: bool = setting(False)
    """Decode one image at a time inside the VAE: less memory."""
    attention_backend: str = setting("auto", source="diffusers, attention_dispatch")
    """Attention of the transformer: auto, torch's choice without cuDNN's kernel, whose backward
    pass fails in FLUX's blocks on Hopper cards; native, torch's choice with it; or diffusers' name
    of another (_native_cudnn, _native_flash, flash, sage ...), which sd3's layers do not take. A
    training job checks it on one block of each kind first."""
    compile: bool | Literal["auto"] = setting("auto")
    """Compile (torch.compile) the blocks of the network that samples; what trains stays as it is.
    The first batch takes a minute, later jobs on the same machine find most of it done; auto: on
    CUDA, for sd3 and flux without `feature_cache`."""
    cuda_graphs: bool = setting(False)
    """On CUDA the network that samples replays calls of a shape and time that it had before as one
    launch: for small models, whose kernels take less time than their launches. For sd3 and flux
    without `feature_cache`; never timed yet."""
    feature_cache: FeatureCache | None = setting(None)
    """Evaluations of training's rollouts whose log-probability nobody needs reuse features of the
    steps before: `interval`, `warm_up`, `order`; null: all are exact. Monitors and evaluation are
    always exact."""
    fp8_weights: bool = setting(False, source="diffusers, layerwise casting")
    """Store the frozen weights as float8 and compute in `dtype`: half the memory, rounded
    weights."""
    fp8_sampling: bool = setting(False, source="torchao, dynamic float8 by rows")
    """Evaluations whose log-probability nobody needs multiply in float8, those of monitors and
    evaluation too: faster from compute capability 8.9 on; needs torchao and `dtype: bfloat16`."""

    @property
    def evaluations_per_velocity(self) -> int:
        """Network evaluations of one velocity: two under classifier-free guidance."""
        return 2 if self.guidance_scale > 1 else 1

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.fp8_sampling and (self.dtype != "bfloat16" or self.fp8_weights):
            key = "fp8_weights" if self.fp8_weights else "dtype"
            value = str(getattr(self, key)).lower()
            raise ValueError(
                f"fp8_sampling: needs dtype: bfloat16 without fp8_weights; {key}: {value}"
            )
        if self.cuda_graphs and (self.feature_cache or self.family not in ("sd3", "flux")):
            raise ValueError("cuda_graphs: for families sd3 and flux without feature_cache only")
        if self.feature_cache is not None and self.family == "z_image":
            raise ValueError("feature_cache: diffusers offers none for z_image")
        if self.tuning == "full" and self.dtype != "float32":
            raise ValueError(
                f"dtype: {self.dtype} rounds the updates of tuning: full away; set float32, or "
                "tuning: lora"
            )
        return self


class Prompts(Settings):
    """Prompt files: .txt (one a line), .jsonl, .json, .csv or .tsv (`prompt`, optional
    `negative_prompt`); empty prompts are left out."""

    sources = ("train", "heldout")

    train: str = setting(...)
    """Prompts to train on."""
    heldout: str = setting(...)
    """Prompts to evaluate and monitor on."""
    limit: Count | None = setting(None, unit="prompts")
    """So many of the prompts to train on are drawn once and used, in the file's order; null: all.
    An embedded prompt takes 4 MiB of disk with FLUX.1."""
    column: str = setting("prompt")
    """Column or key of the prompts in both files, where they are not .txt; in other capitals it is
    found too."""


class Schedule(Settings):
    """The sigma grids of training and evaluation."""

    shift: PositiveFloat | Literal["dynamic"] = setting(3.0, source=EXPERIMENTS)
    """Timestep shift s of s*t/(1+(s-1)*t); dynamic: exp(mu), where mu grows with the number of
    image tokens, by the four settings below."""
    base_shift: float = setting(0.5, source="FLUX.1-dev's scheduler")
    """mu at base_tokens."""
    max_shift: float = setting(1.15, source="FLUX.1-dev's scheduler; Qwen-Image's is 0.9")
    """mu at max_tokens."""
    base_tokens: Count = setting(256, source="FLUX.1-dev's scheduler", unit="tokens")
    """Image tokens of base_shift."""
    max_tokens: Count = setting(
        4096, source="FLUX.1-dev's scheduler; Qwen-Image's is 8192", unit="tokens"
    )
    """Image tokens of max_shift."""
    terminal: Fraction | None = setting(
        None, source="Qwen-Image's scheduler has 0.02 (shift_terminal)", unit="flow time"
    )
    """Stretch the grid so that its last step starts here; null: leave it."""
    end: Literal["uniform", "stock"] | None = setting(
        None, source=f"{PAPER}; {FLOW}; diffusers' pipelines"
    )
    """Where the grid ends before 0. uniform: T equal intervals before the shift, the paper's
    formula; stock: where the family's stock pipeline ends it, which is uniform but for sd3. null:
    stock in evaluation, in monitors and in training by methods whose public code samples so
    (flow_grpo, flow_grpo_fast, tempflow_grpo, diffusion_nft, awm); otherwise uniform."""

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


class RunConfig(Settings):
    """One training run, fully resolved: what its ``config.yaml`` holds."""

    run: str = setting(..., pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=80)
    """Run id."""
    study: str = setting("laptop", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=80)
    """Name of the study: results folder and MLflow experiment."""
    arm: str = setting("")
    """Row of the runs table; runs of one arm differ in their seed alone."""
    seed: int = setting(0, unit="", ge=0, lt=2**31)
    """Run seed."""
    model: Model
    prompts: Prompts
    schedule: Schedule = Schedule()
    method: AnyMethod = Egrpo()
    rewards: dict[str, AnyReward] = setting(...)
    """Reward models by name; the name is what train.rewards and the tables use. Files laid over
    each other add to them and change single settings, null takes one away; another `kind` starts
    anew; the `options` of another `function` do, and the commit of another hub id."""
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
        for problem in problems(self):
            raise ValueError(problem)
        return self
