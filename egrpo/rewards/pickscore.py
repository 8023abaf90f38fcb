"""PickScore by transformers: exp(logit_scale) times the cosine."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from egrpo.config.rewards import PickScore as Settings
from egrpo.rewards.network import NO_CODE, Cosine, loaded, pictures, place


class PickScore(Cosine):
    """About 23 for good images. Prompts are truncated to 77 tokens."""

    settings: Settings

    def __init__(self, settings: Settings, device: str) -> None:
        from transformers import AutoProcessor, CLIPModel

        super().__init__(settings, device)
        source, revision = settings.path, settings.revision
        model = loaded(CLIPModel, "path", source, revision, output_loading_info=True)
        self.model: Any = place(model, self.device)
        if settings.processor:
            source, revision = settings.processor, settings.processor_revision
        self.processor: Any = loaded(AutoProcessor, "processor", source, revision, **NO_CODE)
        self.scale = float(self.model.logit_scale.exp())

    def image_features(self, images: Tensor) -> Tensor:
        """See :class:`Cosine`."""
        inputs = self.processor(images=pictures(images), return_tensors="pt").to(self.device)
        return pooled(self.model.get_image_features(**inputs))

    def text_features(self, prompts: list[str]) -> Tensor:
        """See :class:`Cosine`."""
        inputs = self.processor(
            text=prompts, padding=True, truncation=True, max_length=77, return_tensors="pt"
        )
        return pooled(self.model.get_text_features(**inputs.to(self.device)))

    def scores(self, images: Tensor, prompts: list[str]) -> Tensor:
        """[n] scaled cosines."""
        return super().scores(images, prompts) * self.scale / self.settings.divide_by


def pooled(output: Any) -> Tensor:
    """The projected features, whatever the version of transformers wraps them in."""
    return output if isinstance(output, Tensor) else output.pooler_output
