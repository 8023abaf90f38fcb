"""Settings of what is measured of a model, and where a study is tracked."""

from __future__ import annotations

from typing import Self

from pydantic import PositiveFloat, model_validator

from egrpo.methods.base import Solver
from egrpo.settings import (
    EXPERIMENTS,
    PAPER,
    Batch,
    Count,
    Fraction,
    Settings,
    setting,
    without_password,
)


class Profile(Settings):
    """The empirical entropy profile of the base model."""

    prompts: Count = setting(8, unit="prompts")
    """Training prompts that are profiled."""
    samples: int = setting(12, source=f"{PAPER}, Fig. 1a", unit="samples", ge=2)
    """Branches K from each anchor latent."""
    spans: list[int] = setting([1, 2, 4, 6], source=f"{PAPER}, Table 2", unit="grid intervals")
    """Spans that are measured."""
    noise_fraction: Fraction = setting(0.1, source=f"{PAPER}, Fig. 1a")
    """Yardstick: share of random noise on the final image."""
    micro_batch: Batch = setting("auto", unit="latents")
    """Most latents in one evaluation; auto as in train."""
    decode_batch: Count = setting(96, unit="latents")
    """Most latents decoded at once."""
    shown: list[list[int]] = setting(
        [[2, 1], [6, 1], [6, 4]], source=f"{PAPER}, Fig. 1a", unit="grid index, grid intervals"
    )
    """Branches whose images are kept: [step, span]; those off the schedule are left out."""
    strides: list[int] = setting([1, 2, 4], unit="grid intervals")
    """Strides of the suffixes that `snakemake suffixes` compares with the exact one."""
    solvers: list[Solver] = setting(["ode", "dpm2"])
    """Their solvers; each stride with each solver."""
    features: list[int] = setting([2, 3], unit="steps")
    """Intervals of model.feature_cache that `snakemake suffixes` compares as well."""
    fp8: bool = setting(True)
    """Whether it compares float8 weights (model.fp8_weights) as well."""
    fp8_sampling: bool = setting(False)
    """Whether it compares float8 products (model.fp8_sampling) as well."""
    shown_prompts: int = setting(2, unit="prompts", ge=0)
    """First prompts whose images are kept."""

    @model_validator(mode="after")
    def _spans(self) -> Self:
        if not self.spans or min(self.spans) < 1 or len(set(self.spans)) != len(self.spans):
            raise ValueError("spans: distinct whole numbers of at least 1 are needed")
        return self


class Evaluate(Settings):
    """Evaluation on the held-out prompts."""

    steps: int = setting(50, source=EXPERIMENTS, unit="steps", ge=1, le=1000)
    """ODE steps."""
    height: int | None = setting(None, source=PAPER, unit="pixels", ge=8)
    """Image height in pixels; null: as in training. The paper's is 1024."""
    width: int | None = setting(None, source=PAPER, unit="pixels", ge=8)
    """Image width in pixels; null: as in training. The paper's is 1024."""
    guidance_scale: float | None = setting(None, unit="1", ge=1.0)
    """Classifier-free guidance; null: as in training."""
    samples: Count = setting(1, source=EXPERIMENTS, unit="images")
    """Images of each prompt."""
    prompts: Count | None = setting(None, unit="prompts")
    """First prompts that are used; null for all."""
    micro_batch: Batch = setting("auto", unit="latents")
    """Most latents in one evaluation; auto as in train."""
    grid_prompts: Count = setting(8, unit="prompts")
    """Prompts shown in the image grids."""
    bootstrap: int | None = setting(None, unit="resamples")
    """Resamples, of versions that resampled; it has no effect: intervals are computed."""


class Tracking(Settings):
    """MLflow."""

    uri: str | None = setting(None)
    """Tracking server, without a password; null takes MLFLOW_TRACKING_URI, else SQLite in the
    results folder."""
    every_seconds: PositiveFloat = setting(5.0, unit="s")
    """Pause between deliveries of live metrics, seconds."""
    enabled: bool = setting(True)
    """Deliver live metrics while training."""

    @model_validator(mode="after")
    def _no_password(self) -> Self:
        if self.uri is not None and without_password(self.uri) != self.uri:
            raise ValueError(
                "uri: holds a user or a password, which files of the results would show; leave "
                "them out and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or leave "
                "the key out and set MLFLOW_TRACKING_URI, which is used and never written"
            )
        return self
