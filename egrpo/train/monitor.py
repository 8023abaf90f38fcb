"""Early signs of reward hacking on fixed held-out prompts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

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
        left to be averaged. Of rewards (over images with a score) and diversity (over prompts) also
        ``monitor_std/...`` and ``monitor_count/...``: the std with ddof 1, and of how many values.
        ``images_invalid``: how many images are none.
    """
    of = {f"reward/{name}": v[~np.isnan(v)] for name, v in scores.items()}
    pixels, before = (x.pixels.float().div(255).flatten(1) for x in (images, base))
    groups = (slice(begin, begin + samples) for begin in range(0, len(images), samples))
    parts = [pixels[group][images.valid[group]] for group in groups]
    spread = [
        float(torch.pdist(part).mean()) / pixels.shape[1] ** 0.5 for part in parts if len(part) > 1
    ]
    if samples > 1:
        of["diversity"] = np.array(spread)
    out = {}
    for name, v in of.items():
        out[f"monitor/{name}"] = float(v.mean()) if v.size else np.nan
        out[f"monitor_std/{name}"] = float(v.std(ddof=1)) if v.size > 1 else np.nan
        out[f"monitor_count/{name}"] = v.size
    both = images.valid & base.valid
    apart = (pixels[both] - before[both]).square().mean(1).sqrt()
    out["monitor/distance_to_base"] = float(apart.mean())  # of none: NaN
    out["monitor/images_invalid"] = int((~images.valid).sum())
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


def whole_grid(path: Path) -> bool:
    """Whether there is a grid, with all its bytes as they were written (checksums of PNG)."""
    from PIL import Image

    try:
        with Image.open(path) as picture:
            picture.verify()
    except (OSError, SyntaxError, ValueError):  # PIL raises all of them for a damaged file
        return False
    return True
