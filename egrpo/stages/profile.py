"""The entropy profile of a base model: closed form, and the spread measured by branching.

For each step and candidate span, K samples branch from a shared anchor latent, finish by ODE, and
the spread of the result is recorded beside the spread that 10% random noise on one final image
gives, the yardstick of E-GRPO's Fig. 1a (arXiv 2601.00423).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from egrpo.config.keys import profile_key
from egrpo.config.models import RunConfig
from egrpo.config.trees import training_sigmas
from egrpo.core.entropy import MEASURES, step_entropy
from egrpo.core.executor import execute
from egrpo.core.methods import branches
from egrpo.core.noise import STD
from egrpo.core.schedule import Sigmas
from egrpo.core.seeds import normal
from egrpo.models import load_model
from egrpo.models.conditioning import load_conditioning
from egrpo.models.sd3 import SD3
from egrpo.rewards import RewardModel, load_rewards, score_all
from egrpo.stages.progress import Progress
from egrpo.store.tables import ENTROPY_PROFILE, write_table

Spread = dict[str, float]


def candidates(steps: int, spans: list[int]) -> list[tuple[int, int]]:
    """All (start, span) that do not land on sigma = 0, by start."""
    return [(i, span) for i in range(steps - 1) for span in spans if i + span < steps]


def image_distance(images: Tensor) -> float:
    """Mean pairwise RMS distance of images uint8 [n, 3, h, w], as a fraction of full scale."""
    pixels = images.float().div(255).flatten(1)
    return float(torch.pdist(pixels).mean()) / pixels.shape[1] ** 0.5


def spread_of(
    latents: Tensor | None, images: Tensor, prompt: str, rewards: dict[str, RewardModel]
) -> Spread:
    """Spread of one group: quantity -> value."""
    out: Spread = {"image_distance": image_distance(images)}
    if latents is not None:
        out["latent_variance"] = float(latents.float().var(0).mean())
    for name, values in score_all(rewards, images, [prompt] * len(images)).items():
        valid = values[~np.isnan(values)]
        out[f"reward:{name}"] = float(valid.std(ddof=1)) if valid.size > 1 else float("nan")
    return out


def yardstick_of(
    model: SD3,
    leaf: Tensor,
    prompt: str,
    rewards: dict[str, RewardModel],
    run: RunConfig,
    prompt_id: int,
) -> Spread:
    """The same spreads for K copies of one final sample, each with its own 10% noise.

    Noise goes on the final image (and, for ``latent_variance``, on the final latent), in a share
    of ``noise_fraction``: (1 - f) * x + f * noise, with noise of the data's unit scale.
    """
    f, k = run.profile.noise_fraction, run.profile.samples
    latents = torch.stack(
        [
            (1 - f) * leaf.float().cpu() + f * normal(tuple(leaf.shape), "yardstick", prompt_id, n)
            for n in range(k)
        ]
    )
    image = model.decode(leaf[None], 1)[0].float().cpu().div(127.5).sub(1)
    noisy = torch.stack(
        [
            (1 - f) * image + f * normal(tuple(image.shape), "yardstick image", prompt_id, n)
            for n in range(k)
        ]
    )
    pixels = noisy.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
    return spread_of(latents, pixels, prompt, rewards)


def profile(run: RunConfig, embeddings: Path, output: Path) -> None:
    """Measure and write ``entropy_profile.parquet``.

    Raises:
        UserError: for missing weights or embeddings.
    """
    texts, conditioning = load_conditioning(embeddings, "train")
    model = load_model(run.model)
    rewards = load_rewards(run.rewards, str(model.device))
    conditioning = conditioning.to(model.device)
    sigmas = training_sigmas(run)
    ids = list(range(min(run.profile.prompts, len(texts))))
    rows: list[dict[str, Any]] = []
    with Progress(len(ids), "profile", unit="prompt") as progress:
        for prompt_id in ids:
            prompt = conditioning.rows(torch.tensor([prompt_id], device=model.device))
            rows += _one_prompt(run, model, rewards, sigmas, prompt, prompt_id, texts[prompt_id])
            progress.step()
    write_table(
        output,
        ENTROPY_PROFILE,
        rows,
        metadata={
            "config_hash": profile_key(run),
            "sigmas": json.dumps(sigmas),
            "dynamics": run.method.dynamics,
            "noise_level": str(run.method.noise_level),
        },
    )


def _one_prompt(
    run: RunConfig,
    model: SD3,
    rewards: dict[str, RewardModel],
    sigmas: Sigmas,
    prompt: Any,
    prompt_id: int,
    text: str,
) -> list[dict[str, Any]]:
    pairs = candidates(run.method.steps, run.profile.spans)
    k = run.profile.samples
    tree = branches(run.method.steps, tuple(pairs), k, run.method.dynamics, trained=False)
    zero = torch.zeros(1, dtype=torch.int64, device=model.device)

    def noise(tree: int, start: int, sample: int) -> Tensor:
        return normal(model.image_shape, "profile", prompt_id, start, sample)

    rollout = execute(
        [tree],
        sigmas,
        lambda x, sigma, trees: model.velocity(x, sigma, prompt.rows(zero.expand(len(x)))),
        noise,
        noise_level=run.method.noise_level,
        micro_batch=run.train.micro_batch,
        dtype=model.dtype,
        device=model.device,
    )
    images = model.decode(rollout.leaves, run.train.decode_batch)
    yardstick = yardstick_of(model, rollout.leaves[0], text, rewards, run, prompt_id)
    rows = []
    for group, (start, span) in enumerate(pairs):
        members = slice(group * k, (group + 1) * k)
        spread = spread_of(rollout.leaves[members], images[members], text, rewards)
        head = closed_form(run, sigmas, start, span) | {"prompt_id": prompt_id}
        rows += [
            {**head, "quantity": q, "spread": value, "yardstick": yardstick[q]}
            for q, value in spread.items()
        ]
    return rows


def closed_form(run: RunConfig, sigmas: Sigmas, start: int, span: int) -> dict[str, Any]:
    """Grid columns and closed-form entropies of one transition."""
    level, dynamics = run.method.noise_level, run.method.dynamics
    entropies = {
        measure: step_entropy(
            sigmas, start, span, noise_level=level, dynamics=dynamics, measure=measure
        )
        for measure in MEASURES
    }
    return {
        "step": start,
        "span": span,
        "sigma": sigmas[start],
        "sigma_stop": sigmas[start + span],
        "std": STD[dynamics](sigmas, start, start + span, level),
        **entropies,
    }
