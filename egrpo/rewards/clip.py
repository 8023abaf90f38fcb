"""CLIP score by clip-anytorch: the raw cosine of image and text, no logit scale."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from egrpo.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

BATCH = 256


class Clip:
    """OpenAI's CLIP models from a local file in their own format (ViT-L/14 and kin).

    clip-anytorch rounds weights to float16 and builds width/64 heads: right for OpenAI's ViTs,
    wrong for ViT-H, so never load HPS or PickScore weights here.
    """

    def __init__(self, path: str, device: str) -> None:
        import clip

        if not Path(path).is_file():
            raise UserError(
                f"rewards, kind clip: {path}: no such file (OpenAI-format CLIP weights, .pt)"
            )
        try:
            self.model, self.preprocess = clip.load(path, device=device, jit=False)
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"rewards, kind clip: {path}: not CLIP weights: {reason}") from None
        self.model.eval().requires_grad_(False)
        self.device = device
        self.texts: dict[str, Any] = {}

    def score(self, images: Tensor, prompts: Sequence[str]) -> npt.NDArray[np.float32]:
        """[n] float32 cosines."""
        import torch

        with torch.no_grad():
            self._embed_new(prompts)
            text = torch.stack([self.texts[p] for p in prompts])
            parts = [
                self.model.encode_image(self._pixels(part).to(self.device)).float()
                for part in images.split(BATCH)
            ]
            image = torch.nn.functional.normalize(torch.cat(parts), dim=-1)
            return (image * text).sum(-1).cpu().numpy()

    def _embed_new(self, prompts: Sequence[str]) -> None:
        """Text features are computed once per prompt; over-long prompts are truncated."""
        import clip
        import torch

        new = [p for p in dict.fromkeys(prompts) if p not in self.texts]
        if new:
            tokens = clip.tokenize(new, truncate=True).to(self.device)
            features = torch.nn.functional.normalize(self.model.encode_text(tokens).float(), dim=-1)
            self.texts.update(zip(new, features, strict=True))

    def _pixels(self, images: Tensor) -> Tensor:
        """CLIP's own preprocessing, bit for bit.

        At the model's resolution its resize and crop change nothing, so that only the scaling
        and normalisation remain and the detour over PIL is saved.
        """
        import torch
        from PIL import Image

        size = self.model.visual.input_resolution
        if images.shape[-2:] == (size, size):
            normalise = self.preprocess.transforms[-1]
            return normalise(images.to(torch.float32) / 255)
        pictures = images.permute(0, 2, 3, 1).cpu().numpy()
        return torch.stack([self.preprocess(Image.fromarray(p)) for p in pictures])
