"""What evaluation and training left behind: scores, images, and what a training spent.

Scores are paired by prompt and sample: both models drew that image from the same noise.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from egrpo.core.distance import Pixels, diversity, rms
from egrpo.errors import UserError
from egrpo.store.files import read_json
from egrpo.store.tables import IMAGES, SCORES, read_table

Row = dict[str, Any]
Key = tuple[int, int, str]
"""(prompt id, sample, prompt): the same prompt id must also mean the same text."""
Scores = dict[str, dict[Key, float]]
"""By reward and by key; NaN where scoring failed."""

TRAIN_KEYS = ("iterations", "nfe_forward", "nfe_train", "nfe_reference", "seconds")
MEASURED = {
    "diversity": "mean RMS pixel distance between the samples of one prompt",
    "distance_to_base": "mean RMS pixel distance to the base model's image of the same prompt "
    "and noise",
}
"""Early signs of reward hacking, measured on the images instead of scored by a reward, in [0, 1]:
name -> what it is. The distance only grows from 0; it has no better or worse."""


def _key(row: Row) -> Key:
    return row["prompt_id"], row["sample"], row["prompt"]


def read_scores(path: Path) -> Scores:
    """Scores of a table of SCORES."""
    if out := scores_of(read_table(path, SCORES).to_pylist(), path):
        return out
    raise UserError(f"{path}: holds no score; delete it and run again")


def scores_of(rows: Iterable[Row], path: Path) -> Scores:
    """Scores from rows with the columns of SCORES; ``path`` for messages."""
    out: Scores = {}
    for row in rows:
        scores, key = out.setdefault(row["reward"], {}), _key(row)
        if key in scores:
            raise UserError(
                f"{path}: prompt {key[0]}, sample {key[1]}, reward {row['reward']!r} occurs twice; "
                "delete the file and run again"
            )
        scores[key] = math.nan if row["value"] is None else row["value"]
    return out


def same_keys(base: Iterable[Key], trained: Iterable[Key], at: Path, other: Path) -> list[Key]:
    """Sorted keys that both sides have; UserError where one side has another."""
    mine, theirs = set(base), set(trained)
    for key in sorted(mine ^ theirs):
        where, lacking = (at, other) if key in mine else (other, at)
        raise UserError(
            f"{where}: prompt {key[0]} ({key[2]!r}), sample {key[1]} is missing from {lacking}; "
            "trained and base model must be evaluated on the same prompts and samples"
        )
    return sorted(mine)


def measured(base_file: Path, file: Path) -> tuple[Scores, Scores]:
    """Of base and trained model ``distance_to_base``, a number an image, and ``diversity``, one a
    prompt that has several; NaN where images are none.

    Raises UserError if a file is missing or damaged, or images differ in prompts or size.
    """
    base, trained = read_images(base_file), read_images(file)
    before: Scores = {name: {} for name in MEASURED}
    after: Scores = {name: {} for name in MEASURED}
    keys = same_keys(base, trained, base_file, file)
    for prompt, samples in groupby(keys, lambda key: key[0]):  # large images need not all fit
        group = list(samples)
        first = [_measurable(base[key], base_file) for key in group]
        second = [_measurable(trained[key], file) for key in group]
        if len({image.shape for image in first + second}) > 1:
            raise UserError(
                f"{file}: images of prompt {prompt} differ in size from each other or from "
                f"{base_file}; evaluate both again"
            )
        before["distance_to_base"] |= dict.fromkeys(group, 0.0)
        after["distance_to_base"] |= dict(zip(group, map(rms, second, first), strict=True))
        if len(group) > 1:
            before["diversity"][group[0]] = diversity(first)
            after["diversity"][group[0]] = diversity(second)
    return before, after


def read_images(path: Path) -> dict[Key, bytes]:
    """PNG files by key."""
    return {_key(row): row["png"] for row in read_table(path, IMAGES).to_pylist()}


def first_samples(
    images: Iterable[Key], wanted: Callable[[Key], bool] = lambda key: True
) -> Iterator[Key]:
    """Of each prompt its first sample that is wanted, by prompt."""
    for _, samples in groupby(sorted(images), lambda key: key[0]):
        yield from islice(filter(wanted, samples), 1)


def decode_png(png: bytes, path: Path) -> Pixels:
    """Pixels to look at in [0, 1], float32 [h, w, 3], of what is no image a gray cross; UserError
    naming ``path`` if the PNG is damaged."""
    return _rgba(png, path)[..., :3]


def is_image(png: bytes, path: Path) -> bool:
    """Whether a PNG of ours holds an image; what is none is transparent all over."""
    return bool(_rgba(png, path)[..., 3].any())


def _measurable(png: bytes, path: Path) -> Pixels:
    """Pixels to measure: NaN where there is no image."""
    pixels = _rgba(png, path)
    return pixels[..., :3] if pixels[..., 3].any() else np.full_like(pixels[..., :3], np.nan)


def _rgba(png: bytes, path: Path) -> Pixels:
    try:
        image = Image.open(io.BytesIO(png)).convert("RGBA")
    except (UnidentifiedImageError, OSError):
        raise UserError(f"{path}: holds a damaged image; delete it and run again") from None
    return np.asarray(image, dtype=np.float32) / np.float32(255.0)


def train_record(path: Path) -> Mapping[str, Any]:
    """What training spent, from ``train.json``."""
    record = read_json(path)
    for key in TRAIN_KEYS:
        if key not in record:
            raise UserError(f"{path}: has no {key!r}; delete it and run the training again")
    return record


def evaluations(train: Mapping[str, Any]) -> int:
    """Network evaluations of a training: forward, forward+backward and reference passes."""
    return int(train["nfe_forward"] + train["nfe_train"] + train["nfe_reference"])
