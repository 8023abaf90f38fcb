"""OpenAI's CLIP models by clip-anytorch: the raw cosine, and LAION's aesthetic head on one."""

from __future__ import annotations

import torch
from torch import Tensor

from egrpo.config.rewards import Aesthetic as AestheticSettings
from egrpo.config.rewards import Clip as ClipSettings
from egrpo.errors import UserError, refusing
from egrpo.rewards.network import (
    Cosine,
    Network,
    linear_head,
    normalized,
    pictures,
    place,
    read_state,
)


class OpenAIClip:
    """A CLIP model from a local file in OpenAI's format (ViT-L/14 and kin).

    clip-anytorch rounds weights to float16 and builds width/64 heads: right for OpenAI's ViTs,
    wrong for ViT-H, so never load HPS or PickScore weights here.
    """

    def __init__(self, path: str, revision: str | None, device: torch.device) -> None:
        try:
            from clip.clip import _transform
            from clip.model import build_model
        except ImportError as error:
            raise UserError(
                f"clip-anytorch cannot be imported ({error}); it needs setuptools below "
                "82: pip install 'setuptools>=77.0.3,<82'"
            ) from None

        state = read_state(path, revision)
        with refusing(f"{path}: not CLIP weights"):
            model = build_model(state)  # as clip.load does, which runs code of the file
        self.model = place(model.float() if device.type == "cpu" else model, device)
        self.preprocess = _transform(self.model.visual.input_resolution)
        self.device = device

    def pixels(self, images: Tensor) -> Tensor:
        """Input of the network for images uint8 [n, 3, h, w], bit for bit as CLIP makes it."""
        size = self.model.visual.input_resolution
        if images.shape[-2:] == (size, size):
            # its resize and crop change nothing here: the detour over PIL is saved
            return self.preprocess.transforms[-1](images.to(torch.float32) / 255)
        return torch.stack([self.preprocess(p) for p in pictures(images)])

    def images(self, images: Tensor) -> Tensor:
        """Features [n, D] of images uint8 [n, 3, h, w]."""
        return self.model.encode_image(self.pixels(images).to(self.device))

    def texts(self, prompts: list[str]) -> Tensor:
        """Features [n, D]; over-long prompts are truncated."""
        import clip

        return self.model.encode_text(clip.tokenize(prompts, truncate=True).to(self.device))


class Clip(Cosine):
    """The raw cosine of image and text, no logit scale."""

    def __init__(self, settings: ClipSettings, device: str) -> None:
        super().__init__(settings, device)
        self.clip = OpenAIClip(settings.path, settings.revision, self.device)

    def image_features(self, images: Tensor) -> Tensor:
        """See :class:`Cosine`."""
        return self.clip.images(images)

    def text_features(self, prompts: list[str]) -> Tensor:
        """See :class:`Cosine`."""
        return self.clip.texts(prompts)


class Aesthetic(Network):
    """LAION's aesthetic score: a linear head on normalized image features; no prompt."""

    def __init__(self, settings: AestheticSettings, device: str) -> None:
        super().__init__(settings, device)
        self.clip = OpenAIClip(settings.clip, settings.clip_revision, self.device)
        state = read_state(settings.path, settings.revision)
        self.head = place(linear_head(state, settings.path), self.device)
        width = self.clip.model.visual.output_dim
        if self.head[0].in_features != width:
            raise UserError(
                f"{settings.path} takes {self.head[0].in_features} features, but "
                f"{settings.clip} gives {width}; the published head belongs to ViT-L-14.pt"
            )

    def scores(self, images: Tensor, prompts: list[str]) -> Tensor:
        """[n], about 1 to 10."""
        return self.head(normalized(self.clip.images(images)))[:, 0]
