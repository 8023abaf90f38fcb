"""Trains the toy scorers: a tiny CLIP in OpenAI's format and the preference model.

Shape legend: B batch, images float32 [B, 3, 32, 32] in [0, 1] unless a line says otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid, normalize, pad
from toy_world.train_pipeline import Descent, Log, cosine, generator, progress

from egrpo.world.preference import PreferenceModel
from egrpo.world.prompts import Attributes, to_prompt
from egrpo.world.shapes import render

if TYPE_CHECKING:
    from clip.model import CLIP
    from toy_world.recipe import ClipSettings, PreferenceSettings

# Channel statistics of OpenAI's CLIP preprocessing, which `clip.load` returns with the model.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
CONTEXT_LENGTH = 77
VOCABULARY = 49408


def to_unit(images: NDArray[np.uint8]) -> Tensor:
    """uint8 [B, 32, 32, 3] -> float32 [B, 3, 32, 32] in [0, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().div(255.0)


def blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur of each image by its own sigma [B] in pixels (7 taps, edges repeated)."""
    taps = torch.arange(-3, 4, dtype=torch.float32)
    weights = torch.exp(-0.5 * (taps[None] / sigma.clamp(min=0.05)[:, None]) ** 2)
    weights = (weights / weights.sum(1, keepdim=True))[:, :, None, None, None]
    height, width = images.shape[-2:]
    padded = pad(images, (3, 3, 0, 0), mode="replicate")
    images = sum((weights[:, k] * padded[..., k : k + width] for k in range(7)), torch.zeros(()))
    padded = pad(images, (0, 0, 3, 3), mode="replicate")
    return sum((weights[:, k] * padded[..., k : k + height, :] for k in range(7)), torch.zeros(()))


def add_noise(images: Tensor, std: Tensor, rng: torch.Generator) -> Tensor:
    """Adds Gaussian pixel noise of standard deviation std [B]; the result stays in [0, 1]."""
    noise = torch.randn(images.shape, generator=rng)
    return (images + noise * std[:, None, None, None]).clamp(0.0, 1.0)


# --- CLIP ----------------------------------------------------------------------------------


def clip_text_features(model: CLIP, tokens: Tensor) -> Tensor:
    """CLIP's `encode_text` on tokens [B, L] of any L; causal, so surplus padding changes nothing.

    The end token must have the largest number of its row, as in CLIP's vocabulary.
    """
    x = model.token_embedding(tokens) + model.positional_embedding[: tokens.shape[1]]
    x = model.transformer(x.permute(1, 0, 2)).permute(1, 0, 2)
    last = model.ln_final(x[torch.arange(len(x)), tokens.argmax(-1)])
    return last @ model.text_projection


def clip_normalize(images: Tensor) -> Tensor:
    """CLIP's preprocessing of images in [0, 1] that already have the model's size."""
    mean = torch.tensor(CLIP_MEAN)[:, None, None]
    return (images - mean) / torch.tensor(CLIP_STD)[:, None, None]


def train_clip(
    images: NDArray[np.uint8],
    combinations: Sequence[Attributes],
    settings: ClipSettings,
    seed: int,
    log: Log,
) -> dict[str, Tensor]:
    """Contrastive training (2103.00020, figure 3); returns an OpenAI-format state dict in fp16.

    images: uint8 [n, 32, 32, 3], image i of combination i % len(combinations). The prompts of a
    batch are distinct, so that no negative is a match. Half of the images are blurred and half
    are noisy, so that scores fall off smoothly on imperfect drawings.
    """
    import clip
    from clip.model import CLIP

    count = len(combinations)
    steps, batch = settings.steps, min(settings.batch, count)
    tokens = clip.tokenize([to_prompt(c) for c in combinations])
    length = int((tokens != 0).sum(1).max())
    used, tokens = tokens[:, :length].unique(return_inverse=True)

    rng = generator(seed, 5)
    torch.manual_seed(seed * 1000 + 5)
    # Only the used rows of the embedding are trained; the rest stays zero.
    model = CLIP(64, 32, 3, 64, 8, CONTEXT_LENGTH, len(used), 64, 1, 3).train()
    descent = Descent(model.parameters(), settings.learning_rate, cosine(steps))
    target = torch.arange(batch)
    for step in progress(steps, "clip", log):
        rows = torch.randperm(count, generator=rng)[:batch]
        repeat = torch.randint(len(images) // count, (batch,), generator=rng)
        pixels = to_unit(images[(rows + count * repeat).numpy()])
        amounts = torch.rand(4, batch, generator=rng)
        pixels = blur(pixels, 1.2 * amounts[0] * (amounts[1] < 0.5))
        pixels = add_noise(pixels, settings.noise * amounts[2] * (amounts[3] < 0.5), rng)
        image_features = normalize(model.encode_image(clip_normalize(pixels)), dim=-1)
        text_features = normalize(clip_text_features(model, tokens[rows]), dim=-1)
        logits = model.logit_scale.exp() * image_features @ text_features.T
        loss = 0.5 * (cross_entropy(logits, target) + cross_entropy(logits.T, target))
        descent.step(loss)
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100.0))
        if step % max(1, steps // 10) == 0:
            log(f"clip: step {step}, loss {loss.item():.4f}, scale {model.logit_scale.exp():.1f}")
    state = {name: value.detach().half() for name, value in model.state_dict().items()}
    embedding = torch.zeros(VOCABULARY, 64, dtype=torch.float16)
    embedding[used] = state["token_embedding.weight"]
    state["token_embedding.weight"] = embedding
    state["input_resolution"] = torch.tensor(32)
    state["context_length"] = torch.tensor(CONTEXT_LENGTH)
    state["vocab_size"] = torch.tensor(VOCABULARY)
    return state


@torch.no_grad()
def clip_ranking(
    path: str, images: NDArray[np.uint8], own: NDArray[np.int64], prompts: Sequence[str]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(1 where an image's own prompt has the largest cosine of all, margin to the next) [n].

    images: uint8 [n, 32, 32, 3]; own [n]: number of each image's prompt. Uses `clip.load`.
    """
    import clip

    model, _ = clip.load(path, device="cpu", jit=False)
    text = normalize(model.encode_text(clip.tokenize(list(prompts))), dim=-1)
    cosine = normalize(model.encode_image(clip_normalize(to_unit(images))), dim=-1) @ text.T
    rows, right = torch.arange(len(own)), torch.from_numpy(own)
    others = cosine.clone()
    others[rows, right] = -math.inf
    margin = (cosine[rows, right] - others.amax(1)).numpy()
    return (margin > 0).astype(np.float32), margin


# --- preference ----------------------------------------------------------------------------


@dataclass(frozen=True)
class PreferencePairs:
    """Pairs of images uint8 [n, 2, 3, 32, 32] and their hidden utilities float32 [n, 2]."""

    images: Tensor
    utility: Tensor


def synthetic_pairs(
    combinations: Sequence[Attributes], count: int, rng: torch.Generator
) -> PreferencePairs:
    """Random pairs; the utility falls with blur, noise, distance to the middle and grayness.

    Each image starts as a render in the center and is moved, blurred, bleached and made noisy.
    Distances are in pixels; each fault takes up to about one unit from the utility.
    """
    centered = [c for c in combinations if c.position == "in the center"]
    total = 2 * count
    picks = torch.randint(len(centered), (total,), generator=rng).tolist()
    seeds = torch.randint(2**40, (total,), generator=rng).numpy()
    pixels = to_unit(render([centered[p] for p in picks], seeds))

    faults = torch.rand(total, 4, generator=rng)
    # A third of the images is faultless in each respect: quality is often near the top.
    faults = faults * (torch.rand(total, 4, generator=rng) > 0.33)
    angle = 2 * math.pi * torch.rand(total, generator=rng)
    dx = (8.0 * faults[:, 0] * torch.cos(angle)).round()
    dy = (8.0 * faults[:, 0] * torch.sin(angle)).round()
    sigma, gray, std = 1.6 * faults[:, 1], 0.8 * faults[:, 2], 0.08 * faults[:, 3]

    grid = torch.arange(32)
    columns = (grid[None] - dx[:, None]).clamp(0, 31).long()
    rows = (grid[None] - dy[:, None]).clamp(0, 31).long()
    batch = torch.arange(total)[:, None, None]
    pixels = pixels[batch, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    luma = pixels.mean(1, keepdim=True)
    pixels = torch.lerp(pixels, luma.expand_as(pixels), gray[:, None, None, None])
    pixels = add_noise(blur(pixels, sigma), std, rng)
    distance = torch.hypot(dx, dy) / 8.0
    utility = -(distance + sigma / 1.6 + gray / 0.8 + 0.5 * std / 0.08)
    images = pixels.mul(255.0).round().to(torch.uint8)
    return PreferencePairs(images.reshape(count, 2, 3, 32, 32), utility.reshape(count, 2))


def train_preference(
    combinations: Sequence[Attributes],
    clean: NDArray[np.uint8],
    settings: PreferenceSettings,
    seed: int,
    log: Log,
) -> PreferenceModel:
    """Bradley-Terry loss, -log sigmoid(score of chosen - score of rejected), on noisy choices.

    The choice follows a Bradley-Terry model of the hidden utilities, flipped with probability
    label_noise. clean: uint8 [n, 32, 32, 3], the renders that set the score's zero and unit.
    """
    rng = generator(seed, 6)
    torch.manual_seed(seed * 1000 + 6)
    model = PreferenceModel().train()
    steps, batch = settings.steps, settings.batch
    descent = Descent(model.parameters(), settings.learning_rate, cosine(steps))
    for step in progress(steps, "preference", log):
        pairs = synthetic_pairs(combinations, batch, rng)
        gap = pairs.utility[:, 0] - pairs.utility[:, 1]
        first = torch.rand(batch, generator=rng) < torch.sigmoid(4.0 * gap)
        first ^= torch.rand(batch, generator=rng) < settings.label_noise
        scores = model(pairs.images.flatten(0, 1)).reshape(batch, 2)
        sign = torch.where(first, 1.0, -1.0)
        loss = -logsigmoid(sign * (scores[:, 0] - scores[:, 1])).mean()
        descent.step(loss)
        if step % max(1, steps // 5) == 0:
            log(f"preference: step {step}, loss {loss.item():.4f}")
    model.eval().requires_grad_(False)
    scores = model(torch.from_numpy(clean).permute(0, 3, 1, 2))
    model.mean.copy_(scores.mean())
    model.std.copy_(scores.std().clamp(min=1e-3))
    return model


@torch.no_grad()
def preference_accuracy(model: PreferenceModel, pairs: PreferencePairs) -> float:
    """Share of pairs that the scores order as the hidden utilities do."""
    scores = model(pairs.images.flatten(0, 1)).reshape(-1, 2)
    right = (scores[:, 0] > scores[:, 1]) == (pairs.utility[:, 0] > pairs.utility[:, 1])
    return float(right.float().mean())
