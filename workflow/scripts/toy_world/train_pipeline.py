"""Trains the toy base model: VAE, frozen text encoders and SD3 transformer by flow matching.

Everything is saved in diffusers' own on-disk format, so that the stock
`StableDiffusion3Pipeline.from_pretrained` loads it.

Shape legend: B batch, C = 4 latent channels, h = w = 8 latent size, L = 9 tokens of a prompt,
D = 64 width of the context.
"""

from __future__ import annotations

import itertools
import math
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from numpy.typing import NDArray
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from egrpo.store.files import replacing
from egrpo.world.prompts import COLORS, POSITIONS, SHAPES, SIZES, Attributes

if TYPE_CHECKING:
    from toy_world.recipe import TransformerSettings, VaeSettings

Log = Callable[[str], None]

SHIFT = 3.0  # timestep shift of SD3, used in training and in sampling
PROMPT_TOKENS = 9  # begin, seven words, end
PROGRESS_SECONDS = 15.0


def progress(steps: int, name: str, log: Log) -> Iterator[int]:
    """Yields 0 .. steps - 1 and logs the rate and the time left every few seconds."""
    start = last = time.monotonic()
    for step in range(steps):
        yield step
        now = time.monotonic()
        if now - last >= PROGRESS_SECONDS or step + 1 == steps:
            last = now
            rate = (step + 1) / max(now - start, 1e-9)
            left = (steps - step - 1) / rate
            log(f"{name}: step {step + 1}/{steps}, {rate:.1f} steps/s, {left:.0f} s left")


class Descent:
    """AdamW, at a rate times what ``factor`` says of a step, and no weight decay: the data never
    runs out. ``clipped``: gradients to a norm of 1."""

    def __init__(
        self,
        parameters: Iterable[torch.nn.Parameter],
        learning_rate: float,
        factor: Callable[[int], float],
        *,
        clipped: bool = False,
    ) -> None:
        self.parameters, self.clipped = list(parameters), clipped
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.0, fused=True
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)

    def step(self, loss: Tensor) -> None:
        """One optimizer step."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.clipped:
            torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.schedule.step()


def cosine(steps: int) -> Callable[[int], float]:
    """A linear warm-up over the first 3% of the steps and cosine decay to zero."""
    warmup = max(1, steps * 3 // 100)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    return factor


def plateau(steps: int) -> Callable[[int], float]:
    """A short warm-up, a constant rate, and linear decay over the last quarter.

    Before the decay the rate does not depend on the number of steps, so that a longer recipe
    starts out as a shorter one does.
    """
    return lambda step: min(1.0, (step + 1) / 200, 4.0 * (steps - step) / steps)


def generator(seed: int, phase: int) -> torch.Generator:
    """The random numbers of one phase of the recipe, independent of all other phases."""
    return torch.Generator().manual_seed(seed * 1000 + phase)


def to_tensor(images: NDArray[np.uint8]) -> Tensor:
    """uint8 [n, H, W, 3] -> float32 [n, 3, H, W] in [-1, 1], channels last in memory."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().div(127.5).sub(1.0)


# --- VAE -----------------------------------------------------------------------------------


def new_vae() -> AutoencoderKL:
    """An untrained VAE of factor 4: 32x32 RGB <-> 8x8 latents of 4 channels."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 16, 16),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).to(memory_format=torch.channels_last)


def train_vae(
    images: NDArray[np.uint8], settings: VaeSettings, seed: int, log: Log
) -> AutoencoderKL:
    """Squared and absolute pixel error plus a small KL term; sets the latent statistics.

    images: uint8 [n, 32, 32, 3]. scaling_factor and shift_factor are set so that
    (latent - shift) * scale has mean 0 and standard deviation 1 over all images.
    """
    rng = generator(seed, 1)
    torch.manual_seed(seed * 1000 + 1)
    vae = new_vae().train()
    steps, rate = settings.steps, settings.learning_rate
    descent = Descent(vae.parameters(), rate, cosine(steps), clipped=True)
    for step in progress(steps, "vae", log):
        rows = torch.randint(len(images), (settings.batch,), generator=rng)
        pixels = to_tensor(images[rows.numpy()])
        posterior = vae.encode(pixels).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=rng)
        error = vae.decode(posterior.mean + posterior.std * noise).sample - pixels
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        loss = error.square().mean() + 0.3 * error.abs().mean() + settings.kl_weight * kl
        descent.step(loss)
        if step % max(1, steps // 10) == 0:
            log(f"vae: step {step}, mse {error.square().mean().item():.5f}, kl {kl.item():.3f}")
    vae.eval()
    vae.register_to_config(scaling_factor=1.0, shift_factor=0.0)
    latents = encode_images(vae, images[:4096])
    vae.register_to_config(
        scaling_factor=float(1.0 / latents.std()), shift_factor=float(latents.mean())
    )
    return vae


@torch.no_grad()
def encode_images(vae: AutoencoderKL, images: NDArray[np.uint8]) -> Tensor:
    """Posterior means, shifted and scaled, [n, C, h, w], of uint8 images [n, 32, 32, 3]."""
    parts = [
        vae.encode(to_tensor(images[i : i + 256])).latent_dist.mean
        for i in range(0, len(images), 256)
    ]
    return (torch.cat(parts) - vae.config.shift_factor) * vae.config.scaling_factor


@torch.no_grad()
def decode_latents(vae: AutoencoderKL, latents: Tensor) -> NDArray[np.uint8]:
    """uint8 images [n, 32, 32, 3] of shifted and scaled latents [n, C, h, w].

    Raises:
        ValueError: if one of them is not finite.
    """
    raw = latents / vae.config.scaling_factor + vae.config.shift_factor
    raw = raw.contiguous(memory_format=torch.channels_last)
    pixels = torch.cat([vae.decode(part).sample for part in raw.split(256)])
    if not pixels.isfinite().all():
        raise ValueError("images are NaN or infinite: the training of the pipeline has diverged")
    pixels = pixels.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).contiguous().numpy()


# --- text encoders -------------------------------------------------------------------------


def new_tokenizer() -> CLIPTokenizer:
    """A byte-level CLIP tokenizer in which each word of the grammar is one token.

    Any other text falls back to its bytes, so that it is encoded, if not understood.
    """
    from tokenizers.pre_tokenizers import ByteLevel

    alphabet = sorted(ByteLevel.alphabet())
    tokens = alphabet + [symbol + "</w>" for symbol in alphabet]
    merges: list[tuple[str, str]] = []
    words = sorted(set(" ".join(("a", *SIZES, *COLORS, *SHAPES, *POSITIONS)).split()))
    for word in words:
        # Merge from the end: only the last pair holds "</w>", so no two words can disagree.
        suffix = word[-1] + "</w>"
        for letter in reversed(word[:-1]):
            if letter + suffix not in tokens:
                merges.append((letter, suffix))
                tokens.append(letter + suffix)
            suffix = letter + suffix
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=PROMPT_TOKENS)
    for word in words:
        if tokenizer.tokenize(word) != [word + "</w>"]:
            raise RuntimeError(f"the tokenizer splits {word!r} into {tokenizer.tokenize(word)}")
    return tokenizer


def new_text_encoder(
    tokenizer: CLIPTokenizer, seed: int, phase: int
) -> CLIPTextModelWithProjection:
    """A frozen random CLIP text model; a grammar of 17 attribute values needs no training.

    Embeddings have unit scale and the attention has a gain, so that words differ clearly in
    the context and the pooled vector still carries all of them.
    """
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        projection_dim=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=PROMPT_TOKENS,
        bos_token_id=bos,
        eos_token_id=eos,
        pad_token_id=eos,
    )
    model = CLIPTextModelWithProjection(config).eval().requires_grad_(False)
    rng = generator(seed, phase)
    for name, weight in sorted(model.named_parameters()):
        if "norm" in name:
            continue
        if name.endswith("bias"):
            weight.zero_()
            continue
        std = 1.0 / math.sqrt(weight.shape[-1])
        if "token_embedding" in name:
            std = 1.0
        elif "position_embedding" in name:
            std = 0.3
        elif "v_proj" in name or "out_proj" in name:
            std *= 1.7
        weight.copy_(torch.randn(weight.shape, generator=rng) * std)
    return model


@torch.no_grad()
def encode_prompts(
    pipeline: StableDiffusion3Pipeline, prompts: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """Context [n, L, D] and pooled vector [n, D], by the stock pipeline's own `encode_prompt`.

    max_sequence_length=0: no rows of zeros in place of the absent T5 encoder.
    """
    context, _, pooled, _ = pipeline.encode_prompt(
        prompt=list(prompts),
        prompt_2=None,
        prompt_3=None,
        do_classifier_free_guidance=False,
        max_sequence_length=0,
    )
    return context, pooled


# --- transformer ---------------------------------------------------------------------------


def new_transformer() -> SD3Transformer2DModel:
    """An untrained transformer of three blocks and 16 latent tokens of width 64.

    Modulations start at zero, so that each block starts as the identity (DiT, 2212.09748).
    """
    model = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=64,
        caption_projection_dim=64,
        pooled_projection_dim=64,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )
    for name, weight in model.named_parameters():
        modulation = "norm1" in name and "linear" in name
        if modulation or name.startswith(("norm_out.", "proj_out.")):
            torch.nn.init.zeros_(weight)
    return model


def caption_table(combinations: Sequence[Attributes], corruption: float) -> Tensor:
    """P(caption | image), [n, n], rows and columns in the order of `combinations`.

    Each attribute is kept with probability 1 - corruption and otherwise replaced by one of the
    others. Captions outside `combinations` (the held-out ones) get probability zero: a held-out
    prompt must never be seen, not even on a wrong image.
    """
    index = torch.tensor([c.indices for c in combinations])
    table = torch.ones(len(combinations), len(combinations), dtype=torch.float64)
    for column, values in enumerate((SIZES, COLORS, SHAPES, POSITIONS)):
        same = index[:, None, column] == index[None, :, column]
        table *= torch.where(same, 1.0 - corruption, corruption / (len(values) - 1))
    return (table / table.sum(1, keepdim=True)).float()


def sample_times(count: int, rng: torch.Generator) -> Tensor:
    """Times in (0, 1), [count]: uniform numbers shifted towards noise, 3u / (1 + 2u)."""
    u = torch.rand(count, generator=rng)
    return SHIFT * u / (1.0 + (SHIFT - 1.0) * u)


@dataclass(frozen=True)
class TrainingSet:
    """Latents [n, C, h, w], the caption number of each image [n], and the captions' embeddings.

    context [captions, L, D], pooled [captions, D], table [captions, captions] as in
    `caption_table`.
    """

    latents: Tensor
    caption: Tensor
    context: Tensor
    pooled: Tensor
    table: Tensor


def train_transformer(
    data: TrainingSet, settings: TransformerSettings, seed: int, log: Log
) -> SD3Transformer2DModel:
    """Flow matching: x_t = (1 - t) x_0 + t noise, target velocity noise - x_0, timestep 1000 t.

    Returns the exponential moving average of the weights.
    """
    rng = generator(seed, 4)
    torch.manual_seed(seed * 1000 + 4)
    model = new_transformer().train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    average = [p.detach().clone() for p in parameters]
    steps, batch = settings.steps, settings.batch
    descent = Descent(parameters, settings.learning_rate, plateau(steps), clipped=True)
    running = 0.0
    for step in progress(steps, "transformer", log):
        rows = torch.randint(len(data.latents), (batch,), generator=rng)
        captions = torch.multinomial(data.table[data.caption[rows]], 1, generator=rng)[:, 0]
        clean = data.latents[rows]
        noise = torch.randn(clean.shape, generator=rng)
        t = sample_times(batch, rng)
        mixed = torch.lerp(clean, noise, t[:, None, None, None])
        velocity = model(
            hidden_states=mixed,
            encoder_hidden_states=data.context[captions],
            pooled_projections=data.pooled[captions],
            timestep=1000.0 * t,
            return_dict=False,
        )[0]
        loss = (velocity - (noise - clean)).square().mean()
        descent.step(loss)
        # A shorter memory at the start, so that the initial weights are soon forgotten.
        decay = min(settings.ema_decay, (1.0 + step) / (10.0 + step))
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 1.0 - decay)
        running += (loss.item() - running) * max(0.005, 1.0 / (step + 1))
        if step % max(1, steps // 20) == 0:
            log(f"transformer: step {step}, loss {running:.4f}")
    with torch.no_grad():
        for parameter, value in zip(parameters, average, strict=True):
            parameter.copy_(value)
    return model.eval()


@torch.no_grad()
def sample(
    transformer: SD3Transformer2DModel,
    context: Tensor,
    pooled: Tensor,
    *,
    steps: int,
    rng: torch.Generator,
) -> Tensor:
    """Latents [n, C, h, w] by Euler steps of the probability-flow ODE, without guidance.

    sigma = 3 t / (1 + 2 t) on a uniform grid of t from 1 to 0, `steps` + 1 values.
    """
    t = torch.linspace(1.0, 0.0, steps + 1)
    sigmas = SHIFT * t / (1.0 + (SHIFT - 1.0) * t)
    x = torch.randn(len(context), 4, 8, 8, generator=rng)
    for sigma, following in itertools.pairwise(sigmas):
        velocity = transformer(
            hidden_states=x,
            encoder_hidden_states=context,
            pooled_projections=pooled,
            timestep=(1000.0 * sigma).expand(len(x)),
            return_dict=False,
        )[0]
        x = x + (following - sigma) * velocity
    return x


def assemble(vae: AutoencoderKL, seed: int) -> StableDiffusion3Pipeline:
    """The pipeline around a VAE, with frozen text encoders and an untrained transformer."""
    tokenizer = new_tokenizer()
    return StableDiffusion3Pipeline(
        transformer=new_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=vae,
        text_encoder=new_text_encoder(tokenizer, seed, 2),
        tokenizer=tokenizer,
        text_encoder_2=new_text_encoder(tokenizer, seed, 3),
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )


def save_pipeline(pipeline: StableDiffusion3Pipeline, folder: Path) -> None:
    """Saves in diffusers' format; also `vocab.json` and `merges.txt` for older transformers."""
    pipeline.save_pretrained(folder, safe_serialization=True)
    for name in ("tokenizer", "tokenizer_2"):
        pipeline.tokenizer.backend_tokenizer.model.save(str(folder / name))
    for path in sorted(folder.rglob("*.safetensors")):
        with replacing(path) as temporary:  # written readable by the owner alone
            shutil.copyfile(path, temporary)


def load_pipeline(folder: str | Path) -> StableDiffusion3Pipeline:
    """The saved pipeline by stock diffusers, from local files only.

    The absent T5 must be named: `StableDiffusion3Pipeline.from_pretrained` refuses a folder
    whose model_index.json has null for it, unless the caller passes None (the idiom for SD3
    without T5).
    """
    return StableDiffusion3Pipeline.from_pretrained(
        str(folder), text_encoder_3=None, tokenizer_3=None, local_files_only=True
    )
