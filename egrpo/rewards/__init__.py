"""Reward models: ``score(images, prompts) -> float32 [n]``, NaN where scoring failed."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol, cast

import numpy as np
import numpy.typing as npt
from torch import Tensor

from egrpo.errors import UserError
from egrpo.images import Images

if TYPE_CHECKING:
    from egrpo.config.rewards import RewardSettings

Scores = npt.NDArray[np.float32]


class RewardModel(Protocol):
    """Anything that scores images uint8 [n, 3, h, w] against n prompts."""

    def score(self, images: Tensor, prompts: Sequence[str]) -> Scores:
        """One finite number per image, or NaN where that image could not be scored."""
        ...


def load_reward(settings: RewardSettings, device: str) -> RewardModel:
    """The model of one reward; ``device`` is that of the base model.

    Raises:
        UserError: naming the file or setting that is missing or wrong.
    """
    module = importlib.import_module(f"egrpo.rewards.{settings.module}")  # some take seconds
    kind = settings.model_dump()["kind"]
    try:
        return cast(RewardModel, getattr(module, type(settings).__name__)(settings, device))
    except UserError as error:
        raise UserError(f"rewards, kind {kind}: {error}") from None


def load_rewards(settings: Mapping[str, RewardSettings], device: str) -> dict[str, RewardModel]:
    """All configured reward models, by name; see :func:`load_reward`."""
    return {name: load_reward(reward, device) for name, reward in settings.items()}


def score_all(
    models: Mapping[str, RewardModel], images: Images | Tensor, prompts: Sequence[str]
) -> dict[str, npt.NDArray[np.float64]]:
    """Every reward of every image: name -> [n] float64.

    What is no image is shown to no reward and scored NaN; of uint8 [n, 3, h, w] all are. Each
    reward gets images and prompts of its own: one that writes into them changes nothing that others
    see. A crash is not caught: no reward may turn into a number because its model failed.

    Raises:
        UserError: if a reward returns the wrong number of scores.
    """
    if not isinstance(images, Images):
        images = Images.whole(images)
    valid = images.valid
    texts = [prompt for prompt, there in zip(prompts, valid, strict=True) if there]
    out = {name: np.full(len(images), np.nan) for name in models}
    for name, model in models.items() if texts else ():
        own = images[valid].pixels  # a copy
        scores = np.asarray(model.score(own, texts.copy()), dtype=np.float64)
        if scores.shape != (len(texts),):
            raise UserError(
                f"rewards.{name}: returned {scores.size} numbers of shape {scores.shape} for "
                f"{len(texts)} images; it must return one number an image"
            )
        out[name][valid] = np.where(np.isfinite(scores), scores, np.nan)
    return out
