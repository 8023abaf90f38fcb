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

from egrpo.config.keys import run_key
from egrpo.config.models import RunConfig
from egrpo.core.entropy import MEASURES, step_entropy
from egrpo.core.noise import STD
from egrpo.core.schedule import Sigmas
from egrpo.core.seeds import normal
from egrpo.images import Images, check
from egrpo.methods.shapes import branches
from egrpo.models import load_model
from egrpo.models.base import FlowModel
from egrpo.models.conditioning import Conditioning, Embeddings, load_conditioning
from egrpo.planning.grids import training_sigmas
from egrpo.progress import Progress
from egrpo.rewards import RewardModel, load_rewards, score_all
from egrpo.rewards.network import png_of
from egrpo.sampling.sample import Sampler
from egrpo.store.tables import BRANCHES, ENTROPY_PROFILE, write_table

Groups = dict[tuple[int, int], Images]


def candidates(steps: int, spans: list[int]) -> list[tuple[int, int]]:
    """All (start, span) that do not land on sigma = 0, by start."""
    return [(i, span) for i in range(steps - 1) for span in spans if i + span < steps]


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
    of ``noise_fraction``: (1 - f) * x + f * noise, with noise of the data's unit scale.

    Returns:
        Images [K] and latents [K, ...].
    """
    f, k = run.profile.noise_fraction, run.profile.samples
    latents = torch.stack(
        [
            (1 - f) * leaf.float().cpu() + f * normal(tuple(leaf.shape), "yardstick", prompt_id, n)
            for n in range(k)
        ]
    )
    decoded = model.decode(leaf[None], 1).cpu()
    image = decoded.pixels[0].float().div(127.5).sub(1)
    noisy = torch.stack(
        [
            (1 - f) * image + f * normal(tuple(image.shape), "yardstick image", prompt_id, n)
            for n in range(k)
        ]
    )
    pixels = noisy.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
    return Images(pixels, decoded.faults.repeat(k)), latents


def profile(run: RunConfig, embeddings: Embeddings, output: Path, branches_path: Path) -> None:
    """Measure and write ``entropy_profile.parquet``, and the images of some of its groups.

    Raises:
        UserError: for missing weights or embeddings, or a group without any image.
    """
    texts, conditioning = load_conditioning(embeddings["profile"])
    model = load_model(run.model)
    rewards = load_rewards(run.rewards, str(model.device))
    measured = _Profile(run, model, conditioning, rewards)
    ids = list(range(min(run.profile.prompts, len(texts))))
    rows: list[dict[str, Any]] = []
    shown: list[dict[str, Any]] = []
    with Progress(len(ids), "profile", unit="prompt") as progress:
        for prompt_id in ids:
            images, found = measured.prompt(prompt_id, texts[prompt_id])
            rows += found
            if prompt_id < run.profile.shown_prompts:
                shown += measured.shown(images, prompt_id, texts[prompt_id])
            progress.step()
    check(measured.faults, "profile", run.model, trained=False)
    head = {"config_hash": run_key(run)}
    write_table(branches_path, BRANCHES, shown, metadata=head)
    write_table(
        output,
        ENTROPY_PROFILE,
        rows,
        metadata={
            **head,
            "sigmas": json.dumps(measured.sigmas),
            "dynamics": run.method.dynamics,
            "noise_level": str(run.method.noise_level),
        },
    )


class _Profile:
    """The branches of one run's profile and what is measured on them."""

    def __init__(
        self,
        run: RunConfig,
        model: FlowModel,
        conditioning: Conditioning,
        rewards: dict[str, RewardModel],
    ) -> None:
        self.run, self.model, self.rewards = run, model, rewards
        self.sigmas, level = training_sigmas(run), run.method.noise_level
        batch = run.profile.micro_batch
        self.sampler = Sampler(model, conditioning, self.sigmas, batch, noise_level=level)
        self.pairs = candidates(run.method.steps, run.profile.spans)
        self.faults: list[int] = []
        self.tree = branches(
            run.method.steps,
            tuple(self.pairs),
            run.profile.samples,
            run.method.dynamics,
            trained=False,
        )

    def prompt(self, prompt_id: int, text: str) -> tuple[Groups, list[dict[str, Any]]]:
        """Images [K] by (step, span), the yardstick's by (-1, 0), and rows."""
        run, model, k = self.run, self.model, self.run.profile.samples
        rollout = self.sampler.rollout([prompt_id], [self.tree], "profile")
        images = model.decode(rollout.leaves, run.profile.decode_batch)
        self._check(images, f"prompt {prompt_id}")
        first = int(images.valid.argmax())  # that is an image
        noisy, noisy_latents = noisy_copies(model, rollout.leaves[first], run, prompt_id)
        self._check(noisy, f"prompt {prompt_id}, yardstick")
        yardstick = spread_of(noisy_latents, noisy, text, self.rewards)
        groups = {(-1, 0): noisy}
        self.faults += images.faults.tolist()
        rows = []
        for group, (start, span) in enumerate(self.pairs):
            members = slice(group * k, (group + 1) * k)
            groups[start, span] = images[members]
            self._check(images[members], f"prompt {prompt_id}, step {start}, span {span}")
            spread = spread_of(rollout.leaves[members], images[members], text, self.rewards)
            head = closed_form(run, self.sigmas, start, span) | {"prompt_id": prompt_id}
            rows += [
                {**head, "quantity": q, "spread": value, "yardstick": yardstick[q]}
                for q, value in spread.items()
            ]
        return groups, rows

    def _check(self, images: Images, what: str) -> None:
        """End the job if none of a group's is an image."""
        faults = images.faults.tolist()
        check(faults, f"profile: {what}", self.run.model, trained=False, say=False)

    def shown(self, groups: Groups, prompt_id: int, text: str) -> list[dict[str, Any]]:
        """Rows of the groups whose images are kept, the yardstick's first."""
        wanted = [(-1, 0), *((step, span) for step, span in self.run.profile.shown)]
        return [
            {
                "prompt_id": prompt_id,
                "prompt": text,
                "step": step,
                "span": span,
                "sample": sample,
                "png": png_of(picture),
            }
            for step, span in wanted
            if (step, span) in groups
            for sample, picture in enumerate(groups[step, span].to_files())
        ]


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
