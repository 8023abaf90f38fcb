"""What all model families share: loading, guidance, decoding.

A family is a subclass that says how its network is called and how its prompts are encoded; see
:mod:`egrpo.models.families`. What is trained of it: :mod:`egrpo.models.trainable`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from egrpo.errors import UserError, during, refusing
from egrpo.images import Images
from egrpo.models.attention import use_attention
from egrpo.models.conditioning import Conditioning, padded
from egrpo.models.latents import Latents, latents_of
from egrpo.models.loading import load_part, load_text_pipeline
from egrpo.models.trainable import Trainable

if TYPE_CHECKING:
    from egrpo.config.models import Model
    from egrpo.config.prompts import Prompt

Tensors = dict[str, Tensor]


class FlowModel(Trainable):
    """Velocity, decoding and trainable parameters of one pipeline in diffusers' format.

    Latents are [B, C, h, w] whatever the network packs them into; sigma is the flow time in
    [0, 1]; the velocity is noise minus data. Text encoders are loaded by :meth:`encode` only.

    Attributes:
        transformer_class, vae_class: names in diffusers.
        tokens: ``model.max_sequence_length`` where it is null.
    """

    transformer_class: ClassVar[str]
    vae_class: ClassVar[str] = "AutoencoderKL"
    tokens: ClassVar[int]

    def __init__(self, settings: Model, *, parts: Any = None, text: bool = False) -> None:
        """Load the transformer and the VAE, or take the two modules in ``parts``.

        ``text``: neither, for :meth:`encode` alone.
        """
        super().__init__(settings)
        self.vae: Any = None
        if text:
            return
        # a card may have room for float8 alone
        first = torch.device("cpu") if settings.fp8_weights else self.device
        self.transformer, self.vae = parts or (
            load_part(settings, self.transformer_class, "transformer", first),
            load_part(settings, self.vae_class, "vae", self.device),
        )
        self.config = self.transformer.config
        if parts is None:
            self._check_scale()
        if settings.channels_last and self.vae_class == "AutoencoderKL":  # not of video
            self.vae.to(memory_format=torch.channels_last)
        if settings.vae_tiling:
            self.vae.enable_tiling()
        if settings.vae_slicing:
            self.vae.enable_slicing()
        use_attention(self.transformer, settings.attention_backend)
        if settings.fp8_weights:
            self.transformer.enable_layerwise_casting(
                storage_dtype=torch.float8_e4m3fn, compute_dtype=self.dtype
            )
            self.transformer.to(self.device)
        if settings.tuning == "lora" and settings.lora.start is not None:
            self._add_adapter(0)
            self.transformer.requires_grad_(False)

    def _check_scale(self) -> None:
        """Refuse a VAE whose config.json gives no scale of latents: it is read when decoding."""
        try:
            finite = self.to_vae(torch.zeros(1, self.latents.channels, 1, 1)).isfinite().all()
        except (TypeError, ValueError, RuntimeError, ArithmeticError, AttributeError):
            finite = torch.tensor(False)
        if not finite:
            raise UserError(
                f"model.path: {self.settings.path}/vae: config.json does not say the scale of "
                "latents; download it again"
            )

    @abstractmethod
    def network(self, module: nn.Module, x: Tensor, sigma: float, cond: Tensors) -> Tensor:
        """Velocity [B, C, h, w] of one network call, without guidance.

        Args:
            module: the transformer.
            x: [B, C, h, w] in the model's dtype.
            cond: tensors of B prompts, as :meth:`encode_prompt` names them; where prompts differ
                in length, padded, with their ``lengths`` [B].
        """

    @abstractmethod
    def encode_prompt(self, pipe: Any, text: str) -> Tensors:
        """Tensors [1, ...] of one prompt, exactly as the stock pipeline computes them."""

    def guide(self, prompt: Tensor, negative: Tensor) -> Tensor:
        """Classifier-free guidance of two velocities [B, C, h, w]."""
        return negative + self.settings.guidance_scale * (prompt - negative)

    @staticmethod
    def stock_guidance(settings: Model) -> dict[str, float]:
        """Arguments of the stock pipeline's call that mean the same guidance."""
        return {"guidance_scale": settings.guidance_scale}

    def to_vae(self, z: Tensor) -> Tensor:
        """Latents [n, C, h, w] in the VAE's scale."""
        config = self.vae.config
        return z / config.scaling_factor + (config.shift_factor or 0.0)

    def pixels(self, decoded: Tensor) -> Tensor:
        """[n, 3, height, width] of what the VAE returns."""
        return decoded

    @property
    def evaluations_per_velocity(self) -> int:
        """Network evaluations of one velocity: two under classifier-free guidance."""
        return self.settings.evaluations_per_velocity

    @property
    def latents(self) -> Latents:
        """What transformer and VAE say of latents."""
        return latents_of(self.settings.family, self.config, self.vae.config)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, rows, columns) of one latent at the configured image size.

        Raises:
            UserError: if VAE, patches or positions do not allow the size.
        """
        return self.latents.shape(self.settings.height, self.settings.width)

    @property
    def sequence_length(self) -> int:
        """Most text tokens."""
        given = self.settings.max_sequence_length
        return self.tokens if given is None else given

    @torch.no_grad()
    def encode(self, prompts: Sequence[Prompt], *, negative: bool) -> Conditioning:
        """Embeddings exactly as the stock pipeline computes them; loads the text encoders.

        ``negative``: whether guidance will need the negative texts.
        """
        pipe = load_text_pipeline(self.settings, self.pipeline, self.transformer_class)
        pipe = pipe.to(self.device)
        texts = [p.text for p in prompts], [p.negative for p in prompts] if negative else []

        def one(text: str) -> Tensors:
            return {name: value.cpu() for name, value in self.encode_prompt(pipe, text).items()}

        with refusing(f"model.path: {self.settings.path}: prompts cannot be encoded"):
            return Conditioning(*(padded([one(text) for text in some]) for some in texts))

    def velocity(
        self,
        x: Tensor,
        sigma: float,
        conditioning: Conditioning,
        module: nn.Module | None = None,
        paths: tuple[object, ...] | None = None,
    ) -> Tensor:
        """Velocity [B, C, h, w] of ``x`` at flow time ``sigma``, guidance inside.

        Args:
            conditioning: embeddings of B prompts, row by row.
            module: the transformer to use; None takes ``self.transformer``.
            paths: names the batch for kept features, see :mod:`egrpo.models.features`.
        """
        module = module or self.transformer
        rows, x = len(x), x.to(self.dtype)
        twin = self.twin if self.twin is not None and module is self.twin.network else None
        if twin is not None and (size := twin.size(rows)) != rows:  # a shape that is compiled
            index = torch.arange(size, device=x.device).clamp(max=rows - 1)
            x, conditioning = x[index], conditioning.rows(index)
        guided, tensors = self.settings.guidance_scale > 1, conditioning.tensors
        if guided:
            x, tensors = torch.cat([x, x]), padded([conditioning.negative, tensors])
        with nullcontext() if twin is None else twin.call(x, paths, sigma):
            if twin is None or twin.graphs is None:
                v = self.network(module, x, sigma, tensors)
            else:

                def network(x: Tensor, *values: Tensor) -> Tensor:
                    return self.network(module, x, sigma, dict(zip(tensors, values, strict=True)))

                v = twin.graphs(network, sigma, [x, *tensors.values()])
        if guided:
            negative, prompt = v.chunk(2)
            v = self.guide(prompt, negative)
        return v[:rows]

    @during("decoding")
    @torch.no_grad()
    def decode(self, latents: Tensor, batch: int) -> Images:
        """Images of latents [n, C, h, w], ``batch`` at a time."""
        images = []
        for part in latents.split(batch):
            z = self.to_vae(part.to(self.vae.dtype))
            if self.settings.channels_last and z.ndim == 4:
                z = z.contiguous(memory_format=torch.channels_last)
            x = self.pixels(self.vae.decode(z, return_dict=False)[0]).float()
            images.append(Images.cast(x, part))
        return Images.joined(images)
