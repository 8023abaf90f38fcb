"""Early signs of reward hacking on fixed held-out prompts, and the bounds set on them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from egrpo.config.models import Bound
from egrpo.images import DECODED, FINE, Images
from egrpo.store.files import replacing


def measure(
    scores: Mapping[str, Any], images: Images, base: Images, samples: int
) -> dict[str, float]:
    """``monitor/...``: mean of every reward, diversity, distance to the untrained model's images.

    Args:
        scores: name -> [n]; NaN where scoring failed.
        images: [n], the samples of a prompt together.
        base: those of the untrained model from the same noise.
        samples: of each prompt.

    Returns:
        Rewards in their own units; RMS distances as a fraction of full scale: ``diversity``
        between the samples of a prompt, ``distance_to_base`` from ``base``; NaN where nothing is
        left to be averaged. ``images_invalid``: how many are none.
    """
    out = {
        f"monitor/reward/{name}": float(np.nanmean(v)) if not np.isnan(v).all() else np.nan
        for name, v in scores.items()
    }
    pixels, before = (x.pixels.float().div(255).flatten(1) for x in (images, base))
    groups = (slice(begin, begin + samples) for begin in range(0, len(images), samples))
    parts = [pixels[group][images.valid[group]] for group in groups]
    spread = [
        float(torch.pdist(part).mean()) / pixels.shape[1] ** 0.5 for part in parts if len(part) > 1
    ]
    if samples > 1:
        out["monitor/diversity"] = float(np.mean(spread)) if spread else np.nan
    both = images.valid & base.valid
    apart = (pixels[both] - before[both]).square().mean(1).sqrt()
    out["monitor/distance_to_base"] = float(apart.mean())  # of none: NaN
    out["monitor/images_invalid"] = int((~images.valid).sum())
    return out


def crossed(
    bounds: Mapping[str, Bound], now: Mapping[str, float], start: Mapping[str, float]
) -> dict[str, str]:
    """Monitors beyond their bound: name -> what happened, in words.

    A monitor that is NaN, because all its scores failed, is beyond any bound.
    """
    out = {}
    for name, bound in bounds.items():
        value, base = (
            np.nan if m[f"monitor/{name}"] is None else m[f"monitor/{name}"] for m in (now, start)
        )
        limits = [] if bound.least is None else [(bound.least, "least")]
        if bound.fall is not None:
            limits.append((base - bound.fall, "fall"))
        low, key = max(limits, default=(-np.inf, ""))
        if not value >= low:
            out[name] = f"{value:.4g} is below {low:.4g} (train.bounds.{name}.{key})"
        elif bound.most is not None and value > bound.most:
            out[name] = f"{value:.4g} is above {bound.most:.4g} (train.bounds.{name}.most)"
    return out


def save_grid(path: Path, images: Images, samples: int) -> None:
    """One PNG: a column per prompt, its samples below each other; what is none is transparent."""
    from PIL import Image

    pixels = images.pixels if images.valid.all() else images.with_opacity()
    n, c, h, w = pixels.shape
    grid = pixels.reshape(n // samples, samples, c, h, w).permute(1, 3, 0, 4, 2)
    picture = Image.fromarray(grid.reshape(samples * h, n // samples * w, c).numpy())
    with replacing(path) as temporary:
        picture.save(temporary, format="PNG")


def load_grid(path: Path, samples: int, height: int, width: int) -> Images:
    """The images [n] that :func:`save_grid` wrote."""
    from PIL import Image

    pixels = torch.from_numpy(np.array(Image.open(path).convert("RGBA")))
    grid = pixels.reshape(samples, height, -1, width, 4).permute(2, 0, 4, 1, 3)
    grid = grid.reshape(-1, 4, height, width)
    none = (grid[:, 3] == 0).flatten(1).all(1).numpy()
    return Images(grid[:, :3].contiguous(), np.where(none, DECODED, FINE).astype(np.int8))
