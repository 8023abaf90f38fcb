"""Reward models: ``score(images, prompts) -> float32 [n]``, NaN where scoring failed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from egrpo.rewards import clip, jpeg, preference, verifier

if TYPE_CHECKING:
    from torch import Tensor

    from egrpo.config.models import Reward

Scores = npt.NDArray[np.float32]


class RewardModel(Protocol):
    """Anything that scores images uint8 [n, 3, h, w] against n prompts."""

    def score(self, images: Tensor, prompts: Sequence[str]) -> Scores:
        """One finite number per image, or NaN where that image could not be scored."""
        ...


LOADERS: dict[str, Callable[[Reward, str], RewardModel]] = {
    "verifier": lambda reward, device: verifier.Verifier(exact=False),
    "verifier_exact": lambda reward, device: verifier.Verifier(exact=True),
    "jpeg_compressibility": lambda reward, device: jpeg.JpegCompressibility(),
    "clip": lambda reward, device: clip.Clip(str(reward.path), device),
    "preference": lambda reward, device: preference.Preference(str(reward.path), device),
}
"""How each ``kind`` of reward is made from its settings."""


def load_rewards(settings: Mapping[str, Reward], device: str) -> dict[str, RewardModel]:
    """All configured reward models, by name.

    Raises:
        UserError: naming the file that is missing or wrong.
    """
    return {name: LOADERS[reward.kind](reward, device) for name, reward in settings.items()}


def score_all(
    models: Mapping[str, RewardModel], images: Tensor, prompts: Sequence[str]
) -> dict[str, npt.NDArray[np.float64]]:
    """Every reward of every image: name -> [n] float64.

    Raises:
        RuntimeError: if a reward returns the wrong number of scores. A crash is not caught: no
            reward may turn into a number because its model failed.
    """
    out = {}
    for name, model in models.items():
        scores = np.asarray(model.score(images, prompts), dtype=np.float64)
        if scores.shape != (len(images),):
            raise RuntimeError(
                f"reward {name!r} returned shape {scores.shape} for {len(images)} images"
            )
        out[name] = np.where(np.isfinite(scores), scores, np.nan)
    return out
