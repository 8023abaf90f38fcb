"""Early signs of reward hacking on fixed held-out prompts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

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
        between the samples of a prompt, ``distance_to_base`` from ``base``. Of rewards (over
        images with a score) and diversity (over prompts) also ``monitor_std/...`` and
        ``monitor_count/...``: the std with ddof 1, and of how many values.
    """
    of = {f"reward/{name}": v[~np.isnan(v)] for name, v in scores.items()}
    pixels, before = (x.float().div(255).flatten(1) for x in (images, base))
    spread = [
        float(torch.pdist(part).mean()) / pixels.shape[1] ** 0.5
        for part in pixels.split(samples)
        if len(part) > 1
    ]
    if spread:
        of["diversity"] = np.array(spread)
    out = {}
    for name, v in of.items():
        out[f"monitor/{name}"] = float(v.mean()) if v.size else np.nan
        out[f"monitor_std/{name}"] = float(v.std(ddof=1)) if v.size > 1 else np.nan
        out[f"monitor_count/{name}"] = v.size
    out["monitor/distance_to_base"] = float((pixels - before).square().mean(1).sqrt().mean())
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
