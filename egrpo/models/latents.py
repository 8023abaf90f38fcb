"""Latents of each family, by the config.json of transformer and VAE: no weights, no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from egrpo.config.models import RunConfig
from egrpo.errors import UserError
from egrpo.store.weights import read_config

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Latents:
    """What the two parts of a pipeline say of its latents.

    Attributes:
        channels: of a latent.
        factor: pixels of one latent row or column.
        patch: latent rows and columns of one token.
        most: tokens of a side that there are positions for, (rows, columns).
    """

    channels: int
    factor: int
    patch: int
    most: tuple[float, float] = (math.inf, math.inf)

    def shape(
        self, height: int, width: int, keys: tuple[str, str] = ("model.height", "model.width")
    ) -> tuple[int, int, int]:
        """(channels, rows, columns) of the latent of an image in pixels.

        Args:
            keys: the settings that say height and width, for messages.

        Raises:
            UserError: if the size is not a multiple of what VAE and patches need, or more than
                there are positions for.
        """
        unit = self.factor * self.patch
        for key, size, most in zip(keys, (height, width), self.most, strict=True):
            if size % unit:
                raise UserError(f"{key}: {size} is not a multiple of {unit}")
            if size > most * unit:
                raise UserError(
                    f"{key}: {size} is more than {most * unit}, where the model's positions end"
                )
        return self.channels, height // self.factor, width // self.factor


def _sd3(config: Config) -> dict[str, Any]:
    most = config["pos_embed_max_size"] or math.inf
    return {"channels": config["in_channels"], "patch": config["patch_size"], "most": (most, most)}


def _packed(config: Config) -> dict[str, Any]:
    """Two by two latents are a token's channels; positions are computed for any size."""
    return {"channels": config["in_channels"] // 4, "patch": 2}


def _z_image(config: Config) -> dict[str, Any]:
    return {
        "channels": config["in_channels"],
        "patch": config["all_patch_size"][0],
        "most": tuple(config["axes_lens"][1:]),
    }


TRANSFORMERS: dict[str, Callable[[Config], dict[str, Any]]] = {
    "sd3": _sd3,
    "flux": _packed,
    "qwen_image": _packed,
    "z_image": _z_image,
}
"""What the transformer's config says, by ``model.family``."""


def latents_of(family: str, transformer: Config, vae: Config) -> Latents:
    """What a pipeline of this family says of its latents.

    Raises:
        KeyError, TypeError: if a config lacks what a pipeline of this family has.
    """
    if "temperal_downsample" in vae:  # a VAE of videos
        halvings = len(vae["temperal_downsample"])
    else:
        halvings = len(vae["block_out_channels"]) - 1
    return Latents(factor=2**halvings, **TRANSFORMERS[family](transformer))


def size_problems(run: RunConfig) -> Iterator[str]:
    """What is wrong with the image sizes of training and evaluation, by the files of the model.

    Nothing is said where they are not on this machine, nor of a config.json that is no such one:
    loading does.
    """
    path = Path(run.model.path)
    if not path.is_dir():
        return
    try:
        transformer, vae = (read_config(path / part) for part in ("transformer", "vae"))
        latents = latents_of(run.model.family, transformer, vae)
        for model in (run.model, run.evaluation_model):
            own = model.height != run.model.height, model.width != run.model.width
            height, width = ("evaluate" if changed else "model" for changed in own)
            try:
                latents.shape(model.height, model.width, (f"{height}.height", f"{width}.width"))
            except UserError as error:
                yield f"{error} ({model.path})"
    except (UserError, LookupError, TypeError, ValueError, ArithmeticError):
        return
