"""Model families: how each network is called, and how its prompts are encoded.

Sources: the stock pipelines of diffusers (``StableDiffusion3Pipeline``, ``FluxPipeline``,
``QwenImagePipeline``, ``ZImagePipeline``); LoRA targets as noted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from egrpo.models.base import FlowModel, Tensors

if TYPE_CHECKING:
    from egrpo.config.models import Model

ATTENTION = (
    *("attn.add_k_proj", "attn.add_q_proj", "attn.add_v_proj", "attn.to_add_out"),
    *("attn.to_k", "attn.to_out.0", "attn.to_q", "attn.to_v"),
)
"""Linear layers of joint attention, as diffusers names them."""


def packed(x: Tensor) -> Tensor:
    """Tokens of 2 x 2 latent pixels, [B, h/2 * w/2, 4 C], of latents [B, C, h, w]."""
    b, c, h, w = x.shape
    patches = x.view(b, c, h // 2, 2, w // 2, 2)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(b, (h // 2) * (w // 2), 4 * c)


def unpacked(tokens: Tensor, h: int, w: int) -> Tensor:
    """Latents [B, C, h, w] of tokens [B, h/2 * w/2, 4 C]; undoes :func:`packed`."""
    b, _, c = tokens.shape
    patches = tokens.view(b, h // 2, w // 2, c // 4, 2, 2)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(b, c // 4, h, w)


def token_positions(h: int, w: int, device: torch.device) -> Tensor:
    """FLUX.1's (0, row, column) of each token, [h/2 * w/2, 3]."""
    rows, columns = torch.arange(h // 2, device=device), torch.arange(w // 2, device=device)
    grid = torch.cartesian_prod(rows, columns)
    return torch.cat([torch.zeros_like(grid[:, :1]), grid], dim=1).float()


class SD3(FlowModel):
    """SD3, SD3.5, and the toy world's pipeline.

    LoRA targets: Flow-GRPO's SD3.5 recipe (its public code).
    """

    pipeline = "StableDiffusion3Pipeline"
    transformer_class = "SD3Transformer2DModel"
    lora_targets = ATTENTION
    equal_lengths = True
    tokens = 256

    def encode_prompt(self, pipe: Any, text: str) -> Tensors:
        """``embeds`` [1, L, D], ``pooled`` [1, P]."""
        embeds, _, pooled, _ = pipe.encode_prompt(
            text,
            None,
            None,
            do_classifier_free_guidance=False,
            max_sequence_length=self.sequence_length,
        )
        return {"embeds": embeds, "pooled": pooled}

    def network(self, module: nn.Module, x: Tensor, sigma: float, cond: Tensors) -> Tensor:
        """See :class:`FlowModel`."""
        return module(
            hidden_states=x,
            encoder_hidden_states=cond["embeds"].to(self.dtype),
            pooled_projections=cond["pooled"].to(self.dtype),
            timestep=torch.full((len(x),), 1000.0 * sigma, device=x.device),
            return_dict=False,
        )[0]


class Flux(FlowModel):
    """FLUX.1: packed latents, guidance embedded in distilled models (``embedded_guidance``).

    The network is given sigma itself, as by the stock pipeline. The public codes of DanceGRPO,
    MixGRPO, BranchGRPO, Granular-GRPO and E-GRPO give it int(1000 * sigma) / 1000.

    LoRA targets: Flow-GRPO's FLUX recipe (its public code).
    """

    pipeline = "FluxPipeline"
    transformer_class = "FluxTransformer2DModel"
    lora_targets = (
        *ATTENTION,
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    )
    equal_lengths = True
    tokens = 512

    @staticmethod
    def stock_guidance(settings: Model) -> dict[str, float]:
        """See :class:`FlowModel`."""
        return {
            "guidance_scale": settings.embedded_guidance,
            "true_cfg_scale": settings.guidance_scale,
        }

    def encode_prompt(self, pipe: Any, text: str) -> Tensors:
        """``embeds`` [1, L, D], ``pooled`` [1, P]."""
        embeds, pooled, _ = pipe.encode_prompt(text, None, max_sequence_length=self.sequence_length)
        return {"embeds": embeds, "pooled": pooled}

    def network(self, module: nn.Module, x: Tensor, sigma: float, cond: Tensors) -> Tensor:
        """See :class:`FlowModel`."""
        embeds = cond["embeds"].to(self.dtype)
        guidance = None
        if self.config.guidance_embeds:
            guidance = torch.full((len(x),), self.settings.embedded_guidance, device=x.device)
        v = module(
            hidden_states=packed(x),
            timestep=torch.full((len(x),), sigma, device=x.device),
            guidance=guidance,
            pooled_projections=cond["pooled"].to(self.dtype),
            encoder_hidden_states=embeds,
            txt_ids=torch.zeros(embeds.shape[1], 3, device=x.device),
            img_ids=token_positions(x.shape[-2], x.shape[-1], x.device),
            return_dict=False,
        )[0]
        return unpacked(v, x.shape[-2], x.shape[-1])


class QwenImage(FlowModel):
    """Qwen-Image: packed latents, prompts of different lengths, guidance that keeps the norm.

    LoRA targets: attention and both MLPs, as verl's Flow-GRPO recipe for Qwen-Image has them.
    """

    pipeline = "QwenImagePipeline"
    transformer_class = "QwenImageTransformer2DModel"
    vae_class = "AutoencoderKLQwenImage"
    lora_targets = (
        *ATTENTION,
        *("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2"),
    )
    tokens = 512

    def encode_prompt(self, pipe: Any, text: str) -> Tensors:
        """``embeds`` [1, L, D], ``lengths`` [1]."""
        embeds, _ = pipe.encode_prompt(text, max_sequence_length=self.sequence_length)
        return {"embeds": embeds, "lengths": torch.tensor([embeds.shape[1]])}

    def network(self, module: nn.Module, x: Tensor, sigma: float, cond: Tensors) -> Tensor:
        """See :class:`FlowModel`."""
        rows, columns = x.shape[-2:]
        lengths = cond["lengths"].tolist()
        longest = max(lengths)
        mask = None
        if min(lengths) < longest:
            mask = torch.arange(longest, device=x.device) < cond["lengths"][:, None]
        v = module(
            hidden_states=packed(x),
            timestep=torch.full((len(x),), sigma, device=x.device),
            encoder_hidden_states=cond["embeds"][:, :longest].to(self.dtype),
            encoder_hidden_states_mask=mask,
            img_shapes=[[(1, rows // 2, columns // 2)]] * len(x),
            return_dict=False,
        )[0]
        return unpacked(v, rows, columns)

    @staticmethod
    def stock_guidance(settings: Model) -> dict[str, float]:
        """See :class:`FlowModel`."""
        return {"true_cfg_scale": settings.guidance_scale}

    def guide(self, prompt: Tensor, negative: Tensor) -> Tensor:
        """Guidance with each token's norm kept, as the stock pipeline does."""
        rows, columns = prompt.shape[-2:]
        tokens, guided = packed(prompt), packed(super().guide(prompt, negative))
        kept = tokens.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True)
        return unpacked(guided * kept, rows, columns)

    def to_vae(self, z: Tensor) -> Tensor:
        """[n, C, 1, h, w]: this VAE is one of videos, its scale differs by channel."""
        config = self.vae.config
        mean, std = (
            torch.tensor(values, device=z.device, dtype=z.dtype).view(1, -1, 1, 1)
            for values in (config.latents_mean, config.latents_std)
        )
        return (z * std + mean)[:, :, None]

    def pixels(self, decoded: Tensor) -> Tensor:
        """The only frame."""
        return decoded[:, :, 0]


class ZImage(FlowModel):
    """Z-Image: prompts of different lengths; its time runs from noise to data.

    LoRA targets: attention and feed-forward, as public trainers for Z-Image have them.
    """

    pipeline = "ZImagePipeline"
    transformer_class = "ZImageTransformer2DModel"
    lora_targets = (
        *("attention.to_k", "attention.to_out.0", "attention.to_q", "attention.to_v"),
        *("feed_forward.w1", "feed_forward.w2", "feed_forward.w3"),
    )
    tokens = 512

    @staticmethod
    def stock_guidance(settings: Model) -> dict[str, float]:
        """See :class:`FlowModel`; the pipeline counts from 0."""
        return {"guidance_scale": settings.guidance_scale - 1.0}

    def encode_prompt(self, pipe: Any, text: str) -> Tensors:
        """``embeds`` [1, L, D], ``lengths`` [1]."""
        (embeds,), _ = pipe.encode_prompt(
            text, do_classifier_free_guidance=False, max_sequence_length=self.sequence_length
        )
        return {"embeds": embeds[None], "lengths": torch.tensor([len(embeds)])}

    def network(self, module: nn.Module, x: Tensor, sigma: float, cond: Tensors) -> Tensor:
        """See :class:`FlowModel`."""
        embeds = cond["embeds"].to(self.dtype)
        lengths = cond["lengths"].tolist()
        v = module(
            list(x[:, :, None].unbind(0)),
            torch.full((len(x),), 1.0 - sigma, device=x.device),
            [row[:length] for row, length in zip(embeds, lengths, strict=True)],
            return_dict=False,
        )[0]
        return -torch.stack(list(v))[:, :, 0]


FAMILIES: dict[str, type[FlowModel]] = {
    "sd3": SD3,
    "flux": Flux,
    "qwen_image": QwenImage,
    "z_image": ZImage,
}
"""Adapters by ``model.family``."""
