"""Images as a model makes them, and how one that is none travels.

NaN and infinity have no place among pixels: a cast makes them black or white, and whatever reads
the image takes it for a picture. So the one cast looks first, and what it finds goes along: no
reward is asked about an image that is none, no distance is measured to it, and its PNG is
transparent. Below that, for eyes and for readers without transparency, it is a gray cross.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from egrpo.core.distance import Pixels, diversity, mean_distance
from egrpo.errors import UserError, say

if TYPE_CHECKING:
    from egrpo.config.models import Model

Faults = npt.NDArray[np.int8]
FINE, LATENT, DECODED = 0, 1, 2
"""An image; none, for its latent was not finite; none, for only what the VAE made of it was not."""


@dataclass(frozen=True)
class Images:
    """Images on their way from the VAE to rewards and files.

    Pixels are uint8 [n, 3, height, width], a gray cross where there is no image; faults int8 [n],
    FINE for an image.
    """

    pixels: Tensor
    faults: Faults

    @classmethod
    def cast(cls, decoded: Tensor, latents: Tensor) -> Images:
        """What a VAE made, floats [n, 3, height, width] in [-1, 1], of latents [n, C, h, w]."""
        pixels = ((decoded / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
        faults = np.where(_finite(decoded), FINE, DECODED)
        faults = np.where(_finite(latents), faults, LATENT).astype(np.int8)
        if faults.any():
            pixels[faults != FINE] = _cross(*pixels.shape[2:]).to(pixels.device)
        return cls(pixels, faults)

    @classmethod
    def whole(cls, pixels: Tensor) -> Images:
        """Images uint8 [n, 3, height, width] of which none is in doubt."""
        return cls(pixels, np.zeros(len(pixels), np.int8))

    @classmethod
    def from_rgba(cls, pixels: Tensor) -> Images:
        """What :meth:`with_opacity` gave, uint8 [n, 4, height, width], read from files."""
        none = (pixels[:, 3] == 0).flatten(1).all(1).numpy()
        return cls(pixels[:, :3].contiguous(), np.where(none, DECODED, FINE).astype(np.int8))

    @classmethod
    def joined(cls, parts: list[Images]) -> Images:
        """The parts, at least one, one after the other."""
        pixels = torch.cat([part.pixels for part in parts]).contiguous()
        return cls(pixels, np.concatenate([part.faults for part in parts]))

    def __len__(self) -> int:
        return len(self.faults)

    def __getitem__(self, index: slice | npt.NDArray[np.bool_]) -> Images:
        """Some of them: of a slice the pixels are shared, of a mask they are copied."""
        return Images(self.pixels[index], self.faults[index])

    def cpu(self) -> Images:
        """The same, its pixels in main memory."""
        return Images(self.pixels.cpu(), self.faults)

    @property
    def valid(self) -> npt.NDArray[np.bool_]:
        """Which are images, [n]."""
        return self.faults == FINE

    def pairwise_distance(self) -> float:
        """Mean RMS distance of all pairs of images, in [0, 1]; NaN of fewer than two."""
        return diversity(self._scaled())

    def distance_to(self, others: Images) -> float:
        """Mean RMS distance of each image to its counterpart, in [0, 1]; NaN without a pair."""
        return mean_distance(zip(self._scaled(), others._scaled(), strict=True))

    def _scaled(self) -> list[Pixels]:
        """Each in [0, 1], float32 [3, height, width]; NaN where there is no image."""
        scaled = self.pixels.float().div(255).cpu().numpy()
        scaled[~self.valid] = np.nan
        return list(scaled)

    def with_opacity(self) -> Tensor:
        """uint8 [n, 4, height, width]: transparent where there is no image."""
        alpha = torch.from_numpy(self.valid).to(self.pixels)[:, None, None, None] * 255
        return torch.cat([self.pixels, alpha.expand_as(self.pixels[:, :1])], dim=1)

    def to_files(self) -> Iterator[Tensor]:
        """Each as it goes into a PNG: uint8 [3, h, w], or transparent [4, h, w] if it is none."""
        for n, valid in enumerate(self.valid):
            yield self.pixels[n] if valid else self[n : n + 1].with_opacity()[0]


def _finite(values: Tensor) -> npt.NDArray[np.bool_]:
    """[n]: whether all of each is finite."""
    found: npt.NDArray[np.bool_] = values.isfinite().flatten(1).all(1).cpu().numpy()
    return found


def _cross(height: int, width: int) -> Tensor:
    """uint8 [3, height, width]: gray, with both diagonals darker."""
    down, across = torch.linspace(-1, 1, height)[:, None], torch.linspace(-1, 1, width)
    dark = (down.abs() - across.abs()).abs() < max(0.04, 1.5 / max(height, width))
    return torch.where(dark, 120, 224).to(torch.uint8).expand(3, height, width)


def check(
    faults: Iterable[int], what: str, model: Model, *, trained: bool, told: bool = True
) -> None:
    """End a job that made no image at all; say, if asked, where it made some that are none.

    Args:
        faults: of n images, those of all processes of the job, for they must end together.
        what, model: whose images, for the line, and the settings that they were made with.
        trained: whether training has changed the weights.

    Raises:
        UserError: if there are images and none is one, with the likely cause and what to do.
    """
    found = Counter(faults)
    count, lost = found.total(), found.total() - found.pop(FINE, 0)
    if not lost:
        return
    ((fault, _),) = found.most_common(1)
    cause, part = {
        LATENT: ("their latents are not finite", "transformer"),
        DECODED: ("their latents are finite, but not what the VAE makes of them", "VAE"),
    }[fault]
    if trained and (fault == LATENT or model.dtype != "float16"):
        remedy = "the weights have diverged; train with a lower train.learning_rate_scale"
    elif model.dtype == "float16":
        remedy = f"the {part} overflows in model.dtype float16; set it to bfloat16 or float32"
    else:
        remedy = f"the {part}'s weights (model.path) are damaged; download them again"
    text = f"{what}: {lost} of {count} images are NaN or infinite: {cause}: {remedy}"
    if lost == count:
        raise UserError(text)
    if told:
        say(f"{text}; they have no score")
