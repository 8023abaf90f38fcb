"""The entropy profile of a base model: closed form, and the spread measured by branching.

For each step and candidate span, K samples branch from a shared anchor latent, finish by ODE, and
the spread of the result is recorded beside the spread that 10% random noise on one final image
gives, the yardstick of E-GRPO's Fig. 1a (arXiv 2601.00423).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from egrpo.config.keys import run_key
from egrpo.config.models import RunConfig
from egrpo.core.entropy import MEASURES, step_entropy
from egrpo.core.noise import STD
from egrpo.core.schedule import Sigmas
from egrpo.core.seeds import normal
from egrpo.core.tree import Tree
from egrpo.images import Images, check
from egrpo.methods.shapes import branches
from egrpo.models import load_model
from egrpo.models.base import FlowModel
from egrpo.models.conditioning import Embeddings, load_conditioning
from egrpo.planning.grids import training_sigmas
from egrpo.progress import Progress
from egrpo.rewards import RewardModel, load_rewards, score_all
from egrpo.rewards.network import png_of
from egrpo.sampling.sample import Sampler
from egrpo.store.tables import BRANCHES, ENTROPY_PROFILE, write_table

Pair = tuple[int, int]
"""A step and a span."""
YARDSTICK: Pair = (-1, 0)


def spread_of(
    latents: Tensor, images: Images, prompt: str, rewards: dict[str, RewardModel]
) -> dict[str, float]:
    """Spread of one group: quantity -> value; NaN where fewer than two samples are left of it."""
    left = latents[images.valid].float()
    out = {
        "image_distance": images.pairwise_distance(),
        "latent_variance": float(left.var(0).mean()) if len(left) > 1 else float("nan"),
    }
    for name, values in score_all(rewards, images, [prompt] * len(images)).items():
        valid = values[~np.isnan(values)]
        out[f"reward:{name}"] = float(valid.std(ddof=1)) if valid.size > 1 else float("nan")
    return out


def noisy_copies(
    model: FlowModel, leaf: Tensor, run: RunConfig, prompt_id: int
) -> tuple[Images, Tensor]:
    """The yardstick: K copies of one final sample, each with its own 10% noise.

    Noise goes on the final image (and, for ``latent_variance``, on the final latent), in a share
    of ``noise_fraction``: (1 - f) * x + f * noise, with noise of the data's unit scale. Returns
    images [K] and latents [K, ...].
    """
    f, k = run.profile.noise_fraction, run.profile.samples

    def noisy(x: Tensor, purpose: str) -> Tensor:
        shape = tuple(x.shape)
        return torch.stack(
            [(1 - f) * x + f * normal(shape, purpose, prompt_id, n) for n in range(k)]
        )

    decoded = model.decode(leaf[None], 1).cpu()
    images = noisy(decoded.pixels[0].float().div(127.5).sub(1), "yardstick image")
    pixels = images.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
    return Images(pixels, decoded.faults.repeat(k)), noisy(leaf.float().cpu(), "yardstick")


def profile(run: RunConfig, embeddings: Embeddings, output: Path, branches_path: Path) -> None:
    """Measure and write ``entropy_profile.parquet``, and the images of some of its groups.

    Raises UserError for missing weights or embeddings, or a group without any image.
    """
    texts, conditioning = load_conditioning(embeddings["profile"])
    model = load_model(run.model)
    rewards = load_rewards(run.rewards, str(model.device))
    p, method, sigmas = run.profile, run.method, training_sigmas(run)
    sampler = Sampler(model, conditioning, sigmas, p.micro_batch, noise_level=method.noise_level)
    starts = range(method.steps - 1)
    pairs = [(i, n) for i in starts for n in p.spans if i + n < method.steps]  # none ends at 0
    tree = branches(method.steps, tuple(pairs), p.samples, method.dynamics, trained=False)
    rows: list[dict[str, Any]] = []
    shown: list[dict[str, Any]] = []
    faults: list[int] = []
    count = min(p.prompts, len(texts))
    with Progress(count, "profile", unit="prompt") as progress:
        for prompt_id, text in enumerate(texts[:count]):
            groups = _groups(run, sampler, tree, pairs, prompt_id)
            spreads = {pair: spread_of(*group, text, rewards) for pair, group in groups.items()}
            faults += [f for pair in pairs for f in groups[pair][1].faults.tolist()]
            rows += [
                {
                    **closed_form(run, sigmas, *pair),
                    "prompt_id": prompt_id,
                    "quantity": quantity,
                    "spread": spread,
                    "yardstick": spreads[YARDSTICK][quantity],
                }
                for pair in pairs
                for quantity, spread in spreads[pair].items()
            ]
            if prompt_id < p.shown_prompts:
                of = {"prompt_id": prompt_id, "prompt": text}
                shown += [{**of, **row} for row in _shown(groups, [YARDSTICK, *p.shown])]
            progress.step()
    check(faults, "profile", run.model, trained=False)
    head = {"config_hash": run_key(run)}
    write_table(branches_path, BRANCHES, shown, metadata=head)
    head |= {"sigmas": json.dumps(sigmas), "dynamics": method.dynamics}
    head["noise_level"] = str(method.noise_level)
    write_table(output, ENTROPY_PROFILE, rows, metadata=head)


def _groups(
    run: RunConfig, sampler: Sampler, tree: Tree, pairs: list[Pair], prompt_id: int
) -> dict[Pair, tuple[Tensor, Images]]:
    """Latents and images [K] of a prompt by (step, span), the yardstick's first."""

    def some(images: Images, what: str) -> Images:
        faults = images.faults.tolist()
        check(faults, f"profile: prompt {prompt_id}{what}", run.model, trained=False, told=False)
        return images

    k = run.profile.samples
    leaves = sampler.rollout([prompt_id], [tree], "profile", exact=True).leaves
    images = some(sampler.model.decode(leaves, run.profile.decode_batch), "")
    first = int(images.valid.argmax())  # that is an image
    noisy, latents = noisy_copies(sampler.model, leaves[first], run, prompt_id)
    groups = {YARDSTICK: (latents, some(noisy, ", yardstick"))}
    for n, (step, span) in enumerate(pairs):
        of = slice(n * k, (n + 1) * k)
        groups[step, span] = leaves[of], some(images[of], f", step {step}, span {span}")
    return groups


def _shown(
    groups: dict[Pair, tuple[Tensor, Images]], pairs: Iterable[Sequence[int]]
) -> Iterator[dict[str, Any]]:
    """Rows of the groups whose images are kept."""
    for step, span in pairs:
        if (step, span) in groups:
            for sample, picture in enumerate(groups[step, span][1].to_files()):
                yield {"step": step, "span": span, "sample": sample, "png": png_of(picture)}


def closed_form(run: RunConfig, sigmas: Sigmas, start: int, span: int) -> dict[str, Any]:
    """Grid columns and closed-form entropies of one transition."""
    level, dynamics = run.method.noise_level, run.method.dynamics
    how: dict[str, Any] = {"noise_level": level, "dynamics": dynamics}
    return {
        "step": start,
        "span": span,
        "sigma": sigmas[start],
        "sigma_stop": sigmas[start + span],
        "std": STD[dynamics](sigmas, start, start + span, level),
        **{m: step_entropy(sigmas, start, span, measure=m, **how) for m in MEASURES},
    }
