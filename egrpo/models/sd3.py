"""Adapter of the SD3 family (SD3, SD3.5, and the toy world's pipeline) in diffusers' format."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from egrpo.config.load import is_hub_id
from egrpo.config.models import Model
from egrpo.config.prompts import Prompt
from egrpo.errors import UserError
from egrpo.models.conditioning import Conditioning

LORA_TARGETS = [
    "attn.add_k_proj",
    "attn.add_q_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
    "attn.to_k",
    "attn.to_out.0",
    "attn.to_q",
    "attn.to_v",
]
"""The linear layers that Flow-GRPO's SD3.5 recipe adapts (its public code)."""

ADAPTER_FILE = "pytorch_lora_weights.safetensors"


def resolve_device(name: str) -> torch.device:
    """``auto`` is CUDA where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(name)
    except RuntimeError:
        raise UserError(f"model.device: {name!r} is not a torch device (auto, cpu, cuda)") from None


class SD3:
    """Velocity, decoding and trainable parameters of one SD3 pipeline.

    Latents are [B, C, h, w]; sigma is the flow time in [0, 1]; the velocity is noise minus data.
    Text encoders are loaded by :meth:`encode` only.
    """

    def __init__(self, settings: Model, device: str | None = None) -> None:
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
        from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel

        self.settings = settings
        self.device = resolve_device(device or settings.device)
        self.dtype: torch.dtype = getattr(torch, settings.dtype)
        self.transformer: Any = self._load(SD3Transformer2DModel, "transformer")
        self.vae: Any = self._load(AutoencoderKL, "vae")
        if settings.channels_last:
            self.vae.to(memory_format=torch.channels_last)
        self.sampler: Any = None
        self.reference: Any = None

    def _load(self, cls: Any, part: str) -> nn.Module:
        source = self.settings.path
        if not Path(source).is_dir() and not is_hub_id(source):
            raise UserError(f"model.path: {source}: no such folder, and not a hub id (owner/name)")
        try:
            module = cls.from_pretrained(
                source,
                subfolder=part,
                revision=self.settings.revision,
                dtype=self.dtype,
                use_safetensors=True,
                local_files_only=Path(source).is_dir(),
            )
        except Exception as error:  # diffusers raises many kinds; all mean: not loadable
            reason = " ".join(str(error).split())[:300]
            raise UserError(
                f"model.path: {source}/{part}: cannot be loaded as {cls.__name__}: {reason}"
            ) from None
        try:
            module.to(self.device)
        except (RuntimeError, AssertionError) as error:  # no driver, no such index, no memory
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"model.device: {self.device} cannot be used: {reason}") from None
        return cast(nn.Module, module.eval().requires_grad_(False))

    @property
    def evaluations_per_velocity(self) -> int:
        """Network evaluations of one velocity: two under classifier-free guidance."""
        return 2 if self.settings.guidance_scale > 1 else 1

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(channels, rows, columns) of one latent.

        Raises:
            UserError: if the size is not a multiple of what VAE and patches need.
        """
        factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        unit = factor * self.transformer.config.patch_size
        for key, size in (("height", height), ("width", width)):
            if size % unit:
                raise UserError(f"model.{key}: {size} is not a multiple of {unit}")
        return self.transformer.config.in_channels, height // factor, width // factor

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """:meth:`latent_shape` of the configured image size."""
        return self.latent_shape(self.settings.height, self.settings.width)

    def encode(self, prompts: Sequence[Prompt]) -> Conditioning:
        """Embeddings exactly as the stock pipeline computes them; loads the text encoders."""
        import diffusers
        import transformers

        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
        pipeline = diffusers.StableDiffusion3Pipeline
        source = self.settings.path
        where = {"revision": self.settings.revision, "local_files_only": Path(source).is_dir()}
        try:
            # diffusers wants a pipeline saved without T5 to be told so again
            index = pipeline.load_config(source, **where)
            absent = [k for k, entry in index.items() if entry in ([None, None], (None, None))]
            given = {**dict.fromkeys(absent), "transformer": self.transformer, "vae": self.vae}
            pipe = pipeline.from_pretrained(source, dtype=self.dtype, **where, **given)
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"model.path: {source}: text encoders: {reason}") from None
        pipe.to(self.device)
        guided = self.settings.guidance_scale > 1
        parts: list[tuple[Tensor | None, ...]] = []
        with torch.no_grad():
            for prompt in prompts:
                parts.append(
                    pipe.encode_prompt(
                        prompt.text,
                        None,
                        None,
                        negative_prompt=prompt.negative,
                        do_classifier_free_guidance=guided,
                        max_sequence_length=self.settings.max_sequence_length,
                    )
                )
        embeds, negative, pooled, negative_pooled = zip(*parts, strict=True)
        positive = {"embeds": torch.cat(embeds).cpu(), "pooled": torch.cat(pooled).cpu()}
        if not guided:
            return Conditioning(positive, {})
        return Conditioning(
            positive,
            {"embeds": torch.cat(negative).cpu(), "pooled": torch.cat(negative_pooled).cpu()},
        )

    def velocity(
        self, x: Tensor, sigma: float, conditioning: Conditioning, module: nn.Module | None = None
    ) -> Tensor:
        """Velocity [B, C, h, w] at flow time ``sigma``, guidance inside.

        Args:
            x: [B, C, h, w].
            conditioning: embeddings of B prompts, row by row.
            module: the transformer to use; None takes ``self.transformer``.
        """
        embeds, pooled = conditioning.tensors["embeds"], conditioning.tensors["pooled"]
        x = x.to(self.dtype)
        guided = self.settings.guidance_scale > 1
        if guided:
            x = torch.cat([x, x])
            embeds = torch.cat([conditioning.negative["embeds"], embeds])
            pooled = torch.cat([conditioning.negative["pooled"], pooled])
        v = (module or self.transformer)(
            hidden_states=x,
            encoder_hidden_states=embeds.to(self.dtype),
            pooled_projections=pooled.to(self.dtype),
            timestep=torch.full((len(x),), 1000.0 * sigma, device=x.device),
            return_dict=False,
        )[0]
        if guided:
            without, with_prompt = v.chunk(2)
            v = without + self.settings.guidance_scale * (with_prompt - without)
        return cast(Tensor, v)

    @torch.no_grad()
    def decode(self, latents: Tensor, batch: int) -> Tensor:
        """Images uint8 [n, 3, height, width] of latents [n, C, h, w], ``batch`` at a time."""
        config = self.vae.config
        images = []
        for part in latents.split(batch):
            z = part.to(self.vae.dtype) / config.scaling_factor + (config.shift_factor or 0.0)
            if self.settings.channels_last:
                z = z.contiguous(memory_format=torch.channels_last)
            x = self.vae.decode(z, return_dict=False)[0].float()
            images.append(((x / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8))
        return torch.cat(images).contiguous()

    def prepare_training(self, seed: int, *, reference: bool = False) -> list[nn.Parameter]:
        """Add the LoRA, or unfreeze everything; returns the trainable parameters.

        LoRA starts as the base model: its second factor is zero, its first is drawn from ``seed``.
        Its parameters are float32. ``reference``: :meth:`reference_velocity` will be asked for.
        """
        if self.settings.tuning == "full":
            self.reference = copy.deepcopy(self.transformer) if reference else None
            self.transformer.requires_grad_(True)
            return list(self.transformer.parameters())
        from peft import LoraConfig

        if self.settings.merge_lora_for_sampling:
            self.sampler = copy.deepcopy(self.transformer)
        lora = self.settings.lora
        targets = lora.targets or LORA_TARGETS
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                self.transformer.add_adapter(
                    LoraConfig(
                        r=lora.rank,
                        lora_alpha=lora.alpha,
                        target_modules=targets,
                        init_lora_weights="gaussian",
                    )
                )
            except ValueError as error:
                raise UserError(f"model.lora.targets: {error}") from None
        parameters = [p for p in self.transformer.parameters() if p.requires_grad]
        for p in parameters:  # updates of 1e-5 vanish in bfloat16
            p.data = p.data.float()
        return parameters

    @torch.no_grad()
    def reference_velocity(self, x: Tensor, sigma: float, conditioning: Conditioning) -> Tensor:
        """Velocity of the model before training: LoRA switched off, or a frozen copy."""
        if self.reference is not None:
            return self.velocity(x, sigma, conditioning, self.reference)
        self.transformer.disable_adapters()
        try:
            return self.velocity(x, sigma, conditioning)
        finally:
            self.transformer.enable_adapters()

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations in the backward pass."""
        self.transformer.train()  # diffusers checkpoints in train mode only; it has no dropout
        self.transformer.enable_gradient_checkpointing()

    def lora_layers(self) -> Iterator[tuple[str, Any]]:
        """(name, layer) of every adapted layer."""
        from peft.tuners.lora import LoraLayer

        for name, module in self.transformer.named_modules():
            if isinstance(module, LoraLayer):
                yield name, module

    @torch.no_grad()
    def refresh_sampler(self) -> None:
        """Bring the merged copy up to date with the LoRA."""
        if self.sampler is None:
            return
        for name, layer in self.lora_layers():
            merged = layer.get_base_layer().weight + layer.get_delta_weight("default")
            self.sampler.get_submodule(name).weight.copy_(merged)

    def save(self, folder: Path) -> None:
        """Write what was trained so that stock diffusers loads it.

        LoRA: ``pipe.load_lora_weights(folder)``; full: a transformer's ``from_pretrained(folder)``.
        """
        folder.mkdir(parents=True, exist_ok=True)
        if self.settings.tuning == "full":
            self.transformer.save_pretrained(folder, safe_serialization=True)
            return
        import json

        from peft.utils import get_peft_model_state_dict
        from safetensors.torch import save_file

        state = get_peft_model_state_dict(self.transformer)
        config = self.transformer.peft_config["default"].to_dict()
        plain = {
            f"transformer.{k}": sorted(v) if isinstance(v, set) else v
            for k, v in config.items()
            if k in ("r", "lora_alpha", "target_modules", "init_lora_weights", "lora_dropout")
        }
        save_file(
            {f"transformer.{k}": v.contiguous() for k, v in state.items()},
            folder / ADAPTER_FILE,
            metadata={"lora_adapter_metadata": json.dumps(plain, sort_keys=True)},
        )

    def load(self, folder: Path) -> None:
        """Bring in what :meth:`save` wrote, LoRA merged into the weights.

        Raises:
            UserError: if the folder does not hold what ``model.tuning`` says.
        """
        if self.settings.tuning == "full":
            from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel

            self.transformer = SD3Transformer2DModel.from_pretrained(
                folder, dtype=self.dtype, use_safetensors=True, local_files_only=True
            ).to(self.device)
            return
        from safetensors import safe_open

        path = folder / ADAPTER_FILE
        if not path.exists():
            raise UserError(f"{path}: no such file; training writes it")
        try:
            self.transformer.load_lora_adapter(
                folder, weight_name=ADAPTER_FILE, prefix="transformer", use_safetensors=True
            )
        except Exception as error:
            raise UserError(f"{path}: cannot be loaded: {' '.join(str(error).split())}") from None
        expected = {
            f"transformer.{name}.{part}.weight"
            for name, _ in self.lora_layers()
            for part in ("lora_A", "lora_B")
        }
        with safe_open(str(path), framework="pt") as handle:
            differing = expected ^ set(handle.keys())
        if differing:
            raise UserError(
                f"{path}: does not fit this model: {min(differing)} is in one and not in the other "
                f"(and {len(differing) - 1} more); train the run again"
            )
        self.transformer.fuse_lora()
