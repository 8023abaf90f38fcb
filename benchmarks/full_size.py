"""Networks of full size with random weights: what they cost, and how to build them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch

from egrpo.config.models import Model
from egrpo.models.base import FlowModel
from egrpo.models.conditioning import Conditioning
from egrpo.models.families import FAMILIES, SD3, Flux

VAE = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
}
"""The VAE of FLUX.1; SD3's has the same shape."""


@dataclass(frozen=True)
class Architecture:
    """One model: its adapter, the transformer's config, and its prompt embeddings."""

    family: type[FlowModel]
    config: dict[str, Any]
    text: int
    width: int
    pooled: int
    vae: dict[str, Any] = field(default_factory=lambda: VAE)

    def tiny(self, **config: Any) -> Architecture:
        """The same family, small."""
        few = {"attention_head_dim": 32, "num_attention_heads": 2, "joint_attention_dim": 32}
        few |= {"pooled_projection_dim": 32, **config}
        vae = VAE | {"block_out_channels": [32] * 4, "layers_per_block": 1}
        return Architecture(self.family, self.config | few, text=8, width=32, pooled=32, vae=vae)


SD35_MEDIUM = Architecture(  # stabilityai/stable-diffusion-3.5-medium, transformer/config.json
    SD3,
    {
        "sample_size": 128,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 24,
        "attention_head_dim": 64,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "caption_projection_dim": 1536,
        "pooled_projection_dim": 2048,
        "pos_embed_max_size": 384,
        "dual_attention_layers": tuple(range(13)),
        "qk_norm": "rms_norm",
    },
    text=333,  # 77 of CLIP and 256 of T5
    width=4096,
    pooled=2048,
)
FLUX_DEV = Architecture(  # black-forest-labs/FLUX.1-dev, transformer/config.json
    Flux,
    {
        "patch_size": 1,
        "in_channels": 64,
        "num_layers": 19,
        "num_single_layers": 38,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 768,
        "guidance_embeds": True,
        "axes_dims_rope": (16, 56, 56),
    },
    text=512,
    width=4096,
    pooled=768,
)
HEADS = {"sd3": 64, "flux": 128, "qwen_image": 128, "z_image": 128}
"""Width of an attention head of the published model, by family."""
TINY_SD3 = {"sample_size": 16, "num_layers": 2, "caption_projection_dim": 64}
TINY_SD3 |= {"pos_embed_max_size": 32, "dual_attention_layers": (0,)}
ARCHITECTURES = {
    "sd35_medium": SD35_MEDIUM,
    "flux_dev": FLUX_DEV,
    "tiny": FLUX_DEV.tiny(num_layers=1, num_single_layers=1, axes_dims_rope=(8, 12, 12)),
    "tiny_sd3": SD35_MEDIUM.tiny(**TINY_SD3),
}


def forward_flops(architecture: Architecture, height: int, width: int) -> float:
    """Model FLOPs of one network evaluation; a multiply-add counts two.

    With d = model width, I image tokens, L text tokens, N = I + L:

    * linear layers of a double block: 12 d^2 weights (qkv 3, output 1, MLP 8) a token, of image and
      text stream alike; SD3's last block has no text output and MLP: 9 d^2 less a text token;
      its dual attention adds 4 d^2 an image token;
    * linear layers of a single block (FLUX): 12 d^2 (qkv 3, MLP 4, output 5) a token;
    * attention: two products of N x N x d in every block, 4 N^2 d FLOPs; dual: 4 I^2 d more;
    * embeddings: patches, text, and the output layer. Modulation, once per image, is left out
      except for its weights: 6 d^2 a stream and double block, 3 d^2 a single block.
    """
    c = architecture.config
    d = c["attention_head_dim"] * c["num_attention_heads"]
    image, text = (height // 16) * (width // 16), architecture.text
    both, double = image + text, c["num_layers"]
    single = c.get("num_single_layers", 0)
    linear = 12.0 * d * d * both * (double + single)
    attention = 4.0 * both * both * d * (double + single)
    modulation = 12.0 * d * d * double + 3.0 * d * d * single
    if architecture.family is SD3:
        dual = len(c["dual_attention_layers"])
        linear += 4.0 * d * d * image * dual - 9.0 * d * d * text
        attention += 4.0 * image * image * d * dual
        modulation += 3.0 * d * d * dual - 4.0 * d * d  # the last block's text has 2, not 6
    patch = c["in_channels"] * (4 if architecture.family is SD3 else 1)
    linear += d * (2.0 * patch * image + c["joint_attention_dim"] * text)
    return 2.0 * (linear + modulation) + attention


def build(
    a: Architecture, device: torch.device, dtype: torch.dtype, height: int, width: int, **more: Any
) -> FlowModel:
    """The adapter around a network and a VAE with random weights."""
    settings: dict[str, Any] = {
        "path": "random",
        "family": next(name for name, family in FAMILIES.items() if family is a.family),
        "dtype": str(dtype).removeprefix("torch."),
        "device": str(device),
        "height": height,
        "width": width,
        "vae_slicing": True,
    }
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # 12 billion float32 weights would not fit first
    try:
        with torch.device(device):
            network = getattr(diffusers, a.family.transformer_class)(**a.config)
            vae = diffusers.AutoencoderKL(**a.vae)
    finally:
        torch.set_default_dtype(before)
    for module in (network, vae):
        module.eval().requires_grad_(False)
    return a.family(Model.model_validate(settings | more), parts=(network, vae))


def prompts(
    architecture: Architecture, device: torch.device, dtype: torch.dtype, count: int
) -> Conditioning:
    """Random embeddings of ``count`` prompts."""
    shape = (count, architecture.text, architecture.width)
    generator = torch.Generator().manual_seed(0)
    made = {
        "embeds": torch.randn(shape, generator=generator),
        "pooled": torch.randn(count, architecture.pooled, generator=generator),
    }
    return Conditioning({k: v.to(device, dtype) for k, v in made.items()}, {})
