"""ODE sampling for monitors and evaluation: noise depends on prompt and sample alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from egrpo.core.executor import execute
from egrpo.core.schedule import Sigmas
from egrpo.core.seeds import normal
from egrpo.errors import during
from egrpo.images import Images
from egrpo.methods.shapes import chains
from egrpo.models.base import FlowModel
from egrpo.models.conditioning import Conditioning


@during("sampling")
def sample_images(
    model: FlowModel,
    conditioning: Conditioning,
    prompt_ids: Sequence[int],
    sigmas: Sigmas,
    *,
    samples: int,
    micro_batch: int,
) -> tuple[Images, int]:
    """Images of the prompts, ``samples`` each, by plain ODE.

    The same prompt and sample start from the same noise in every run, whatever the batch size.

    Returns:
        Images [prompts * samples], samples of a prompt together, on the CPU; and the number of
        network evaluations.
    """
    if not prompt_ids:
        size = model.settings.height, model.settings.width
        return Images.whole(torch.empty(0, 3, *size, dtype=torch.uint8)), 0
    shape = model.image_shape
    prompts = conditioning.batch(prompt_ids, model.device)
    exact = model.settings.feature_cache is None
    module = model.sampler if exact else None

    def velocity(x: Tensor, sigma: float, tree: Tensor) -> Tensor:
        return model.velocity(x, sigma, prompts.rows(tree), module)

    rollout = execute(
        [chains(len(sigmas) - 1, samples)] * len(prompt_ids),
        sigmas,
        velocity,
        lambda tree, start, sample: normal(shape, "evaluate", prompt_ids[tree], start, sample),
        noise_level=0.0,
        micro_batch=micro_batch,
        dtype=model.dtype,
        device=model.device,
    )
    images = model.decode(rollout.leaves, micro_batch).cpu()
    return images, rollout.forward * model.evaluations_per_velocity
