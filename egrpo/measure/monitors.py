"""What the images of monitors say: rewards, diversity, distance; and their files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from egrpo.config.models import RunConfig
from egrpo.images import Images
from egrpo.store.files import read_json, replacing
from egrpo.store.tables import TRAIN_METRICS, metadata_of, read_table, write_table

PROMPTS = "prompts.json"
"""Beside the grids: whose images they are."""


def measure(
    scores: Mapping[str, Any], images: Images, base: Images, samples: int
) -> dict[str, float]:
    """``monitor/...``: mean of every reward, diversity, distance to the untrained model's images.

    Args:
        scores: name -> [n]; NaN where scoring failed.
        images, base: [n], samples of a prompt together; those of the untrained model, same noise.
        samples: of each prompt.

    Returns:
        Rewards in their own units; RMS distances as a fraction of full scale: ``diversity``
        between the samples of a prompt, ``distance_to_base`` from ``base``; NaN where nothing is
        left to be averaged. Of rewards (over images with a score) and diversity (over prompts) also
        ``monitor_std/...`` and ``monitor_count/...``: the std with ddof 1, and of how many values.
        ``images_invalid``: how many images are none.
    """
    of = {f"reward/{name}": v[~np.isnan(v)] for name, v in scores.items()}
    if samples > 1:
        starts = range(0, len(images), samples)
        spread = np.array([images[n : n + samples].pairwise_distance() for n in starts])
        of["diversity"] = spread[~np.isnan(spread)]
    out = {}
    for name, v in of.items():
        out[f"monitor/{name}"] = float(v.mean()) if v.size else np.nan
        out[f"monitor_std/{name}"] = float(v.std(ddof=1)) if v.size > 1 else np.nan
        out[f"monitor_count/{name}"] = v.size
    out["monitor/distance_to_base"] = images.distance_to(base)
    out["monitor/images_invalid"] = int((~images.valid).sum())
    return out


def save_grid(path: Path, images: Images, samples: int) -> None:
    """One PNG: a column per prompt, its samples below each other; what is none is transparent."""
    pixels = images.pixels if images.valid.all() else images.with_opacity()
    n, c, h, w = pixels.shape
    grid = pixels.reshape(n // samples, samples, c, h, w).permute(1, 3, 0, 4, 2)
    picture = Image.fromarray(grid.reshape(samples * h, n // samples * w, c).numpy())
    with replacing(path) as temporary:
        picture.save(temporary, format="PNG")


def load_grid(path: Path, samples: int, height: int, width: int) -> Images:
    """The images [n] that :func:`save_grid` wrote."""
    pixels = torch.from_numpy(np.array(Image.open(path).convert("RGBA")))
    grid = pixels.reshape(samples, height, -1, width, 4).permute(2, 0, 4, 1, 3)
    return Images.from_rgba(grid.reshape(-1, 4, height, width))


def whole_grid(path: Path) -> bool:
    """Whether there is a grid, with all its bytes as they were written (checksums of PNG)."""
    try:
        with Image.open(path) as picture:
            picture.verify()
    except (OSError, SyntaxError, ValueError):  # PIL raises all of them for a damaged file
        return False
    return True


Score = Callable[[Sequence[str], Images, Sequence[str]], Mapping[str, Any]]
"""Some rewards, by name, of images [n] and their prompts: name -> [n]."""


def score_monitors(run: RunConfig, training: Path, output: Path, score: Score) -> None:
    """Write what training recorded, and what every other reward says of the monitored images.

    Reads train_metrics.parquet and monitor/, the images, of ``training``; raises UserError if a
    file is missing or damaged.
    """
    table = read_table(training / "train_metrics.parquet", TRAIN_METRICS)
    rows = table.to_pylist()
    there = {row["metric"].removeprefix("monitor/reward/") for row in rows}
    others = [name for name in run.rewards if name not in there]
    nfe = {row["iteration"]: row["nfe"] for row in rows}
    grids = sorted((training / "monitor").glob("iteration-*.png")) if others else []
    about = read_json(training / "monitor" / PROMPTS) if grids else {}
    for path in grids:
        iteration, samples = int(path.stem.removeprefix("iteration-")), about["samples"]
        images = load_grid(path, samples, run.model.height, run.model.width)
        prompts = [text for text in about["prompts"] for _ in range(samples)]
        measured = measure(score(others, images, prompts), images, images, samples)
        head = {"run": run.run, "iteration": iteration, "nfe": nfe[iteration]}
        rows += [
            {**head, "metric": metric, "value": value}
            for metric, value in measured.items()
            if "/reward/" in metric
        ]
    head = {"config_hash": metadata_of(table)["config_hash"]}
    write_table(output, TRAIN_METRICS, rows, metadata=head)
