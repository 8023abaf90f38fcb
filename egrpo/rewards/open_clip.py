"""Models of open_clip: the raw cosine, and HPSv2.1 with its own preprocessing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from egrpo.config.rewards import Hps as HpsSettings
from egrpo.config.rewards import OpenClip as OpenClipSettings
from egrpo.errors import UserError, refusing
from egrpo.rewards.network import MEAN, STD, Cosine, load_strictly, pictures, place, read_state
from egrpo.store.files import read_json


class OpenClip(Cosine):
    """The raw cosine of image and text, no logit scale; open_clip's own preprocessing."""

    settings: OpenClipSettings | HpsSettings

    def __init__(self, settings: OpenClipSettings | HpsSettings, device: str) -> None:
        import open_clip

        super().__init__(settings, device)
        with refusing(f"architecture: {settings.architecture}"):
            architecture = self.architecture()
            model, _, self.preprocess = open_clip.create_model_and_transforms(
                architecture, pretrained_text=False, **self.published_preprocessing()
            )
            self.tokenizer = open_clip.get_tokenizer(architecture)
        state = read_state(settings.path, settings.revision)
        state = {key.removeprefix("module."): value for key, value in state.items()}
        load_strictly(model, state, settings.path)
        self.model = place(model, self.device)

    def architecture(self) -> str:
        """open_clip's name of the architecture; one in a file is made known to it."""
        import open_clip

        name = self.settings.architecture
        if name.endswith(".json"):
            if not Path(name).is_file():
                raise UserError(f"architecture: {name}: no such file")
            # open_clip keeps the path of a file that it cannot read, and then reads no other
            if not isinstance(read_json(name), dict):
                raise UserError(f"architecture: {name}: not a JSON object")
            open_clip.add_model_config(name)
            return Path(name).stem
        known = open_clip.list_models()
        if name not in known:
            raise UserError(
                f"architecture: open_clip knows no {name!r}; such as "
                f"{', '.join(n for n in known if n.startswith('ViT-H'))}"
            )
        return name

    def published_preprocessing(self) -> dict[str, Any]:
        """Arguments of open_clip's transforms that belong to the weights named by ``tag``."""
        import open_clip

        architecture, tag = self.settings.architecture, getattr(self.settings, "tag", None)
        if tag is None:
            return {}
        published = open_clip.get_pretrained_cfg(architecture, tag)
        if not published:
            tags = open_clip.list_pretrained_tags_by_model(architecture)
            raise UserError(
                f"tag: {architecture} has no {tag!r}, but "
                f"{', '.join(tags) or 'none'}; null takes the architecture's own preprocessing"
            )
        keys = ("mean", "std", "interpolation", "resize_mode")
        return {f"image_{key}": published[key] for key in keys}

    def image_features(self, images: Tensor) -> Tensor:
        """See :class:`Cosine`."""
        pixels = torch.stack([self.preprocess(p) for p in pictures(images)])
        return self.model.encode_image(pixels.to(self.device))

    def text_features(self, prompts: list[str]) -> Tensor:
        """See :class:`Cosine`; over-long prompts are truncated."""
        return self.model.encode_text(self.tokenizer(prompts).to(self.device))


class Hps(OpenClip):
    """HPSv2.1: images are resized by their longer side and padded with black, not cropped."""

    def image_features(self, images: Tensor) -> Tensor:
        """See :class:`Cosine`."""
        size = self.model.visual.image_size
        side = size[0] if isinstance(size, tuple) else size
        return self.model.encode_image(padded_square(images, side).to(self.device))


def padded_square(images: Tensor, side: int) -> Tensor:
    """CLIP's input [n, 3, side, side] of images uint8 [n, 3, h, w], as HPSv2's code makes it.

    The longer side is resized to ``side``, bicubic with antialias on the float tensor; black
    padding, half on each side; then CLIP's normalization, padding included.
    """
    from torchvision.transforms import functional as f

    height, width = images.shape[-2:]
    x = images.float() / 255
    scale = side / max(height, width)
    if scale != 1.0:
        height, width = round(height * scale), round(width * scale)
        x = f.resize(x, [height, width], f.InterpolationMode.BICUBIC, antialias=True)
    down, right = side - height, side - width
    x = f.pad(x, [right // 2, down // 2, right - right // 2, down - down // 2], fill=0)
    return f.normalize(x, MEAN, STD)
