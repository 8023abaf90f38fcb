"""How many latents one network call takes, where ``micro_batch`` is auto."""

from __future__ import annotations

from typing import Literal

import torch

from egrpo.errors import say
from egrpo.models.base import FlowModel
from egrpo.models.conditioning import Conditioning

ON_CPU = 96
"""Latents of one call where memory is not the card's; small networks are fastest there."""

FULL = 2**16
"""Image tokens of one call beyond which a card gains nothing: half of them fill an H200."""

TRIED = 3
"""Latents of the larger of the two calls that are measured: the least that must fit."""

SHARE = 0.85
"""Of a card's memory that may be used; the rest is for CUDA, rewards at work, and fragments."""


def batch_of(
    model: FlowModel, conditioning: Conditioning, micro_batch: int | Literal["auto"]
) -> int:
    """Most latents in one network call; whoever samples from a model agrees on what fits."""
    if micro_batch != "auto":
        return micro_batch
    if model.fits is None:
        model.fits = largest_batch(model, conditioning)
    return model.fits


def largest_batch(model: FlowModel, conditioning: Conditioning) -> int:
    """Latents that fit a card beside all that is on it now, by the memory of two small calls.

    It depends on the card and on what the job has loaded, not on what others do there, so a job
    that is started again chooses the same. Says so in one line.
    """
    if model.device.type != "cuda":
        return ON_CPU
    with torch.no_grad(), model.sampling():  # its network is on the card from here on
        one, more = (_peak(model, conditioning, rows) for rows in (1, TRIED))
    each = max((more - one) / (TRIED - 1), 1.0)
    _, rows, columns = model.image_shape
    patch = model.latents.patch
    wanted = -(-FULL * patch**2 // (rows * columns))
    total = torch.cuda.get_device_properties(model.device).total_memory
    room = SHARE * total - torch.cuda.memory_allocated(model.device)
    found = rounded_down(min(wanted, int(room / each)))
    say(
        f"micro_batch: auto: {found} latents, {each / 2**30:.3g} GiB each with "
        f"{room / 2**30:.3g} GiB of the card free"
    )
    return found


def rounded_down(count: int) -> int:
    """The largest of 1, 2, 3, 4, 6, 8, 12, 16, 24, ... within ``count``: groups divide by them."""
    sizes = (n << k for k in range(12) for n in (2, 3))
    return max((size for size in sizes if size <= count), default=1)


def _peak(model: FlowModel, conditioning: Conditioning, rows: int) -> float:
    """Bytes that one call of the transformer needs beside what is there."""
    x = torch.zeros(rows, *model.image_shape, device=model.device)
    prompts = conditioning.batch([0] * rows, model.device)
    before = torch.cuda.memory_allocated(model.device)
    torch.cuda.reset_peak_memory_stats(model.device)
    model.velocity(x, 0.5, prompts)
    return float(torch.cuda.max_memory_allocated(model.device) - before)
