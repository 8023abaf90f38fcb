"""Tiny pipelines of every family, all components, random weights, saved by diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789 .,:;!?'\"-"


def sizes(hidden: int = 32, inner: int = 64, layers: int = 2, heads: int = 2) -> dict[str, int]:
    """Those that transformers' configs share."""
    return {
        **{"hidden_size": hidden, "intermediate_size": inner},
        **{"num_hidden_layers": layers, "num_attention_heads": heads},
    }


def special(tokenizer: Any) -> dict[str, int]:
    """The size of a vocabulary and its special tokens, as transformers' configs name them."""
    kinds = ("bos", "eos", "pad")
    ids = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in kinds}
    return {"vocab_size": len(tokenizer), **ids}


def clip_parts(width: int = 32) -> tuple[Any, Any]:
    """A tokenizer (the toy's, real format) and a text encoder."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained("assets/toy/pipeline/tokenizer")
    tokenizer.model_max_length = 77
    given = {"projection_dim": width, "max_position_embeddings": 77, **special(tokenizer)}
    config = CLIPTextConfig(**sizes(width, 2 * width), **given)
    return tokenizer, CLIPTextModelWithProjection(config)


def t5_parts(width: int = 32) -> tuple[Any, Any]:
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    vocab += [(letter, -3.0) for letter in LETTERS if letter != " "]
    tokenizer = T5Tokenizer(vocab=vocab, extra_ids=0)
    config = T5Config(
        vocab_size=len(vocab), d_model=width, d_ff=2 * width, d_kv=16, num_layers=2, num_heads=2
    )
    return tokenizer, T5EncoderModel(config)


def qwen_tokenizer() -> Any:
    """Bytes, and the special tokens of a chat."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocab = {token: i for i, token in enumerate([*special, *sorted(ByteLevel.alphabet())])}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[], additional_special_tokens=special[1:])
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return tokenizer


def vae(channels: int) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(**SIZES["VAE"], latent_channels=channels)


def scheduler(**more: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**more)


def dynamic(most: float, tokens: int, **more: Any) -> Any:
    """A scheduler whose shift grows with the size of images."""
    mu = {"base_shift": 0.5, "max_shift": most, "max_image_seq_len": tokens}
    return scheduler(use_dynamic_shifting=True, **mu, **more)


SIZES: dict[str, Any] = yaml.safe_load("""
VAE: {in_channels: 3, out_channels: 3, block_out_channels: [8, 8], layers_per_block: 1,
  norm_num_groups: 4, scaling_factor: 1.5, shift_factor: 0.06, use_quant_conv: false,
  use_post_quant_conv: false, down_block_types: [DownEncoderBlock2D, DownEncoderBlock2D],
  up_block_types: [UpDecoderBlock2D, UpDecoderBlock2D]}
qwen_image's VAE: {base_dim: 8, z_dim: 4, dim_mult: [1, 1], num_res_blocks: 1,
  temperal_downsample: [false], latents_mean: [0.1, -0.2, 0.3, 0.0],
  latents_std: [1.5, 2.0, 0.7, 1.0]}
sd3: {sample_size: 8, patch_size: 2, in_channels: 4, out_channels: 4, num_layers: 2,
  joint_attention_dim: 64, pooled_projection_dim: 64, pos_embed_max_size: 16, qk_norm: rms_norm}
flux: {patch_size: 1, in_channels: 16, num_layers: 1, num_single_layers: 2,
  joint_attention_dim: 32, pooled_projection_dim: 32, guidance_embeds: true}
qwen_image: {patch_size: 2, in_channels: 16, out_channels: 4, num_layers: 2,
  joint_attention_dim: 32}
""")
HEAD = 16
"""Width of an attention head; the real ones have 64 (SD3.5) and 128."""


def blocks(head: int) -> dict[str, int]:
    return {"attention_head_dim": head, "num_attention_heads": 2}


def axes(head: int) -> tuple[int, int, int]:
    """Of rotary embeddings: frame or text, rows, columns."""
    return head // 4, 3 * head // 8, 3 * head // 8


def sd3(head: int = HEAD) -> Any:
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

    parts = {}
    for n, made in (("", clip_parts()), ("_2", clip_parts()), ("_3", t5_parts(64))):
        parts[f"tokenizer{n}"], parts[f"text_encoder{n}"] = made
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            **SIZES["sd3"], **blocks(head), caption_projection_dim=2 * head
        ),
        vae=vae(4),
        scheduler=scheduler(shift=3.0),
        **parts,
    )


def flux(head: int = HEAD) -> Any:
    from diffusers import FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextModel

    tokenizer, projected = clip_parts()
    tokenizer_2, encoder_2 = t5_parts()
    return FluxPipeline(
        transformer=FluxTransformer2DModel(
            **SIZES["flux"], **blocks(head), axes_dims_rope=axes(head)
        ),
        vae=vae(4),
        scheduler=dynamic(1.15, 4096),
        tokenizer=tokenizer,
        text_encoder=CLIPTextModel(projected.config),
        tokenizer_2=tokenizer_2,
        text_encoder_2=encoder_2,
    )


def qwen_image(head: int = HEAD) -> Any:
    from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    tokenizer = qwen_tokenizer()
    rope = {"mrope_section": [2, 3, 3], "rope_type": "default", "type": "default"}
    text = {
        **{"vocab_size": len(tokenizer), "num_key_value_heads": 2, **sizes()},
        "rope_parameters": {**rope, "rope_theta": 1e6},
    }
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32}
    encoder = Qwen2_5_VLConfig(text_config=text, vision_config={"depth": 1, **vision})
    return QwenImagePipeline(
        transformer=QwenImageTransformer2DModel(
            **SIZES["qwen_image"], **blocks(head), axes_dims_rope=axes(head)
        ),
        vae=AutoencoderKLQwenImage(**SIZES["qwen_image's VAE"]),
        scheduler=dynamic(0.9, 8192, shift_terminal=0.02),
        tokenizer=tokenizer,
        text_encoder=Qwen2_5_VLForConditionalGeneration(encoder),
    )


def z_image(head: int = HEAD) -> Any:
    from diffusers import ZImagePipeline, ZImageTransformer2DModel
    from transformers import Qwen3Config, Qwen3Model

    tokenizer = qwen_tokenizer()
    given = {"vocab_size": len(tokenizer), "num_key_value_heads": 2, "head_dim": 16}
    config = Qwen3Config(**sizes(layers=3), **given)
    transformer = ZImageTransformer2DModel(
        **{"in_channels": 4, "dim": 2 * head, "cap_feat_dim": 32},
        **{"n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2},
        **{"axes_dims": list(axes(head)), "axes_lens": [1024, 32, 32]},
    )
    torch.nn.init.normal_(transformer.x_pad_token)
    torch.nn.init.normal_(transformer.cap_pad_token)
    return ZImagePipeline(
        transformer=transformer,
        vae=vae(4),
        scheduler=scheduler(shift=3.0),
        tokenizer=tokenizer,
        text_encoder=Qwen3Model(config),
    )


FAMILIES = {"sd3": sd3, "flux": flux, "qwen_image": qwen_image, "z_image": z_image}


def save(family: str, folder: Path) -> Path:
    """A pipeline of the family with all components, in the published format."""
    torch.manual_seed(0)
    FAMILIES[family]().save_pretrained(folder, safe_serialization=True)
    return folder


TINY_OPEN_CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
"""An architecture in open_clip's format."""
