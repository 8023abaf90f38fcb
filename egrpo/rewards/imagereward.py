"""ImageReward: BLIP by transformers' modules, loaded from the published checkpoint."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from egrpo.config.rewards import ImageReward as Settings
from egrpo.errors import UserError, refusing
from egrpo.rewards.network import (
    MEAN,
    NO_CODE,
    STD,
    Network,
    linear_head,
    load_strictly,
    loaded,
    pictures,
    place,
    read_state,
)

SCORE_MEAN, SCORE_STD = 0.16717362830052426, 1.0333394966054072
"""Of the published model's scores."""

TOKENS = 35
"""Prompts are cut to this many."""

MED_CONFIG = {
    "hidden_size": 768,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 512,
    "vocab_size": 30524,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
}
"""The published med_config.json, as far as the text encoder depends on it."""

VISION_NAMES = (
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^blocks\.", "encoder.layers."),
    (r"\.norm(\d)\.", r".layer_norm\1."),
    (r"\.attn\.qkv\.", ".self_attn.qkv."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
    (r"^norm\.", "post_layernorm."),
)
"""BLIP's names of the vision transformer -> transformers' names."""

UNUSED = ("pooler", "embeddings.position_ids", "cls")
"""Parts of the text encoder that a checkpoint may hold and the score does not use."""


class ImageReward(Network):
    """About -2 to 2; the text encoder attends to the image, so nothing is cached."""

    def __init__(self, settings: Settings, device: str) -> None:
        from torchvision import transforms as t
        from transformers import AutoTokenizer
        from transformers.models.blip.modeling_blip import BlipVisionModel
        from transformers.models.blip.modeling_blip_text import BlipTextModel

        super().__init__(settings, device)
        path = settings.path
        state = read_state(path, settings.revision)
        vision = {renamed(k): v for k, v in below(state, "blip.visual_encoder.").items()}
        text = below(state, "blip.text_encoder.")
        text = {k: v for k, v in text.items() if not k.startswith(UNUSED)}
        if not vision or not text:
            raise UserError(f"{path}: holds no blip.* weights of ImageReward")
        with refusing(f"{path}: does not fit"):
            eyes = BlipVisionModel(vision_config(vision))
        with refusing(f"med_config: {settings.med_config}"):
            config = text_config(settings.med_config, eyes.config.hidden_size)
            reader = BlipTextModel(config, add_pooling_layer=False)
        load_strictly(eyes, vision, path)
        load_strictly(reader, text, path)
        head = linear_head(below(state, "mlp."), path)
        self.eyes, self.reader, self.head = (place(m, self.device) for m in (eyes, reader, head))
        source, revision = settings.tokenizer, settings.tokenizer_revision
        self.tokenizer: Any = loaded(AutoTokenizer, "tokenizer", source, revision, **NO_CODE)
        side = eyes.config.image_size
        resize = t.Resize(side, interpolation=t.InterpolationMode.BICUBIC)
        rest = t.CenterCrop(side), t.ToTensor(), t.Normalize(MEAN, STD)
        self.preprocess = t.Compose([resize, *rest])

    def scores(self, images: Tensor, prompts: list[str]) -> Tensor:
        """[n] normalized scores."""
        pixels = torch.stack([self.preprocess(p) for p in pictures(images)]).to(self.device)
        seen = self.eyes(pixels).last_hidden_state
        tokens = self.tokenizer(
            prompts, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt"
        ).to(self.device)
        read = self.reader(
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], device=self.device).long(),
        ).last_hidden_state
        with torch.autocast(self.device.type, enabled=False):
            score = self.head(read[:, 0].float())[:, 0]
        return (score - SCORE_MEAN) / SCORE_STD


def below(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Weights under a prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def renamed(key: str) -> str:
    """transformers' name of a weight of BLIP's vision transformer."""
    for pattern, name in VISION_NAMES:
        key = re.sub(pattern, name, key)
    return key


def vision_config(state: dict[str, Tensor]) -> Any:
    """The vision transformer's sizes, read from its weights; heads are 64 wide (ViT-L: 16)."""
    from transformers import BlipVisionConfig

    sizes = (
        "embeddings.patch_embedding.weight",
        "embeddings.position_embedding",
        "encoder.layers.0.mlp.fc1.weight",
    )
    for key in sizes:
        if key not in state:
            raise ValueError(f"{key} is missing")
    patch, positions, inner = (state[key].shape for key in sizes)
    grid, size = math.isqrt(positions[1] - 1), patch[-1]
    layers = {int(k.split(".")[2]) for k in state if k.startswith("encoder.layers.")}
    return BlipVisionConfig(
        hidden_size=patch[0],
        intermediate_size=inner[0],
        num_hidden_layers=len(layers),
        num_attention_heads=max(patch[0] // 64, 1),
        image_size=grid * size,
        patch_size=size,
        hidden_act="gelu",
        layer_norm_eps=1e-6,  # timm's, which BLIP uses
    )


def text_config(path: str | None, seen: int) -> Any:
    """The text encoder's sizes, from med_config.json or as published; ``seen``: image features."""
    from transformers import BlipTextConfig

    given = dict(MED_CONFIG)
    if path is not None:
        read = dict(json.loads(Path(path).read_text(encoding="utf-8")))
        given |= {k: read[k] for k in given if k in read}
    return BlipTextConfig(
        **given,
        encoder_hidden_size=seen,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        is_decoder=True,  # gives the layers cross-attention; they are called bidirectionally
    )
