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
from egrpo.images import Images
from egrpo.store.tables import Table, metadata_of, read_table
from egrpo.study.sources import Sources


@dataclass(frozen=True)
class Kept:
    """Images [samples] by prompt id, and scores [samples] by reward and prompt id."""

    images: dict[int, Images] = field(default_factory=dict)
    scores: dict[str, dict[int, npt.NDArray[np.float64]]] = field(default_factory=dict)

    @classmethod
    def read(
        cls,
        folder: Path,
        tables: tuple[Table, Table],
        sources: Sources,
        samples: int,
        limit: int | None = None,
    ) -> Kept:
        """Of an earlier evaluation in a folder what was made from the same; nothing if damaged.

        Args:
            folder, tables: where it lies: its scores and its images.
            sources: what is made now, ``samples`` images of each prompt.
            limit: of snapshots, which.
        """
        try:
            found = [read_table(folder / f"{table.name}.parquet", table) for table in tables]
            heads = [metadata_of(table) for table in found]
            prompts, rewards = (json.loads(heads[0][k]) for k in ("prompts_of", "rewards_of"))
            if any(head["images_of"] != sources.images for head in heads):
                return cls()
        except (UserError, KeyError, ValueError):
            return cls()
        shared = {
            i for i, (a, b) in enumerate(zip(prompts, sources.prompts, strict=False)) if a == b
        }
        rows, shown = (
            [r for r in t.to_pylist() if r["prompt_id"] in shared and r.get("evaluations") == limit]
            for t in found
        )
        pictures: dict[int, list[Any]] = {}
        for row in sorted(shown, key=lambda row: row["sample"]):
            png = Image.open(io.BytesIO(row["png"])).convert("RGBA")
            pictures.setdefault(row["prompt_id"], []).append(np.array(png))
        images = {
            i: Images.from_rgba(torch.from_numpy(np.stack(made)).permute(0, 3, 1, 2))
            for i, made in pictures.items()
            if len(made) == samples
        }
        scores: dict[str, dict[int, Any]] = {}
        for row in rows:
            name, i = row["reward"], row["prompt_id"]
            if i in images and rewards.get(name) == sources.rewards.get(name):
                values = scores.setdefault(name, {}).setdefault(i, np.full(samples, np.nan))
                values[row["sample"]] = np.nan if row["value"] is None else row["value"]
        return cls(images, scores)
