"""Early signs of reward hacking on fixed held-out prompts, and the bounds set on them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from egrpo.config.models import Bound
from egrpo.store.files import replacing


def measure(
    scores: Mapping[str, Any], images: Tensor, base: Tensor, samples: int
) -> dict[str, float]:
    """``monitor/...``: mean of every reward, diversity, distance to the untrained model's images.

    Args:
        scores: name -> [n]; NaN where scoring failed.
        images: uint8 [n, 3, h, w], the samples of a prompt together.
        base: those of the untrained model from the same noise.
        samples: of each prompt.

    Returns:
        Rewards in their own units; RMS distances as a fraction of full scale: ``diversity``
        between the samples of a prompt, ``distance_to_base`` from ``base``.
    """
    out = {
        f"monitor/reward/{name}": float(np.nanmean(v)) if not np.isnan(v).all() else np.nan
        for name, v in scores.items()
    }
    pixels, before = (x.float().div(255).flatten(1) for x in (images, base))
    spread = [
        float(torch.pdist(part).mean()) / pixels.shape[1] ** 0.5
        for part in pixels.split(samples)
        if len(part) > 1
    ]
    if spread:
        out["monitor/diversity"] = float(np.mean(spread))
    out["monitor/distance_to_base"] = float((pixels - before).square().mean(1).sqrt().mean())
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


def save_grid(path: Path, images: Tensor, samples: int) -> None:
    """One PNG: a column per prompt, its samples below each other."""
    from PIL import Image

    n, c, h, w = images.shape
    grid = images.reshape(n // samples, samples, c, h, w).permute(1, 3, 0, 4, 2)
    picture = Image.fromarray(grid.reshape(samples * h, n // samples * w, c).numpy())
    with replacing(path) as temporary:
        picture.save(temporary, format="PNG")


def load_grid(path: Path, samples: int, height: int, width: int) -> Tensor:
    """The images uint8 [n, 3, h, w] that :func:`save_grid` wrote."""
    from PIL import Image

    pixels = torch.from_numpy(np.array(Image.open(path).convert("RGB")))
    grid = pixels.reshape(samples, height, -1, width, 3).permute(2, 0, 4, 1, 3)
    return grid.reshape(-1, 3, height, width).contiguous()


def whole_grid(path: Path) -> bool:
    """Whether there is a grid, with all its bytes as they were written (checksums of PNG)."""
    from PIL import Image

    try:
        with Image.open(path) as picture:
            picture.verify()
    except (OSError, SyntaxError, ValueError):  # PIL raises all of them for a damaged file
        return False
    return True
