"""What an earlier evaluation left that is still right: images and scores, by prompt."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from egrpo.errors import UserError
from egrpo.images import DECODED, FINE, Images
from egrpo.store.tables import IMAGES, SCORES, SNAPSHOT_IMAGES, SNAPSHOTS, metadata_of, read_table
from egrpo.study.sources import Sources

TABLES = {
    "scores.parquet": SCORES,
    "images.parquet": IMAGES,
    "snapshots.parquet": SNAPSHOTS,
    "snapshot_images.parquet": SNAPSHOT_IMAGES,
}


@dataclass(frozen=True)
class Kept:
    """Images and scores that need not be made again.

    Attributes:
        images: prompt id -> its images [samples].
        scores: reward -> prompt id -> its scores [samples].
    """

    images: dict[int, Images] = field(default_factory=dict)
    scores: dict[str, dict[int, npt.NDArray[np.float64]]] = field(default_factory=dict)

    @classmethod
    def read(
        cls,
        folder: Path,
        tables: tuple[str, str],
        sources: Sources,
        samples: int,
        limit: int | None = None,
    ) -> Kept:
        """Of an earlier evaluation what was made from the same; nothing where that cannot be read.

        Args:
            folder: where it lies.
            tables: names of its scores and its images.
            sources: what is made now.
            samples: images of each prompt.
            limit: of snapshots, which.
        """
        try:
            found = [read_table(folder / name, TABLES[name]) for name in tables]
            heads = [metadata_of(table) for table in found]
            prompts, rewards = (json.loads(heads[0][k]) for k in ("prompts_of", "rewards_of"))
            same = all(head["images_of"] == sources.images for head in heads)
        except (UserError, KeyError, ValueError):
            return cls()
        if not same:
            return cls()
        shared = {
            i for i, (a, b) in enumerate(zip(prompts, sources.prompts, strict=False)) if a == b
        }
        rows, shown = (
            [r for r in t.to_pylist() if r["prompt_id"] in shared and r.get("evaluations") == limit]
            for t in found
        )
        images = {i: cls._images([r for r in shown if r["prompt_id"] == i]) for i in shared}
        images = {i: made for i, made in images.items() if len(made) == samples}
        scores: dict[str, dict[int, Any]] = {}
        for row in rows:
            name, i = row["reward"], row["prompt_id"]
            if i in images and rewards.get(name) == sources.rewards.get(name):
                values = scores.setdefault(name, {}).setdefault(i, np.full(samples, np.nan))
                values[row["sample"]] = np.nan if row["value"] is None else row["value"]
        return cls(images, scores)

    @staticmethod
    def _images(rows: list[dict[str, Any]]) -> Images:
        if not rows:
            return Images.whole(torch.empty(0, 3, 1, 1, dtype=torch.uint8))
        rows = sorted(rows, key=lambda row: row["sample"])
        read = [np.array(Image.open(io.BytesIO(row["png"])).convert("RGBA")) for row in rows]
        pixels = torch.from_numpy(np.stack(read)).permute(0, 3, 1, 2)
        none = (pixels[:, 3] == 0).flatten(1).all(1).numpy()
        faults = np.where(none, DECODED, FINE).astype(np.int8)
        return Images(pixels[:, :3].contiguous(), faults)
