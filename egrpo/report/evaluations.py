"""What evaluation and training left behind: scores, images, and what a training spent.

Scores are paired by prompt and sample: both models drew that image from the same noise.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping
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
MEASURED = ("diversity", "distance_to_base")
"""Early signs of reward hacking, measured on the images instead of scored by a reward."""


def read_scores(path: Path) -> Scores:
    """Scores by reward and by (prompt id, sample, prompt); NaN where scoring failed."""
    out = scores_of(read_table(path, SCORES).to_pylist(), path)
    if not out:
        raise UserError(f"{path}: holds no score; delete it and run again")
    return out


def scores_of(rows: Iterable[Row], path: Path) -> Scores:
    """Scores by reward and key from rows with the columns of SCORES; ``path`` for messages."""
    out: Scores = {}
    for row in rows:
        scores = out.setdefault(row["reward"], {})
        key = (row["prompt_id"], row["sample"], row["prompt"])
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
    different = sorted(mine ^ theirs)
    if different:
        prompt_id, sample, prompt = different[0]
        where, lacking = (at, other) if different[0] in mine else (other, at)
        raise UserError(
            f"{where}: prompt {prompt_id} ({prompt!r}), sample {sample} is missing from {lacking}; "
            "trained and base model must be evaluated on the same prompts and samples"
        )
    return sorted(mine)


def measured(base_file: Path, file: Path) -> tuple[Scores, Scores]:
    """Of the base model and a trained one ``distance_to_base``, a number an image, and
    ``diversity``, one a prompt that has several; NaN where images are none.

    Raises:
        UserError: if a file is missing or damaged, or images differ in prompts or size.
    """
    base, trained = read_images(base_file), read_images(file)
    by_prompt: dict[int, list[Key]] = {}
    for key in same_keys(base, trained, base_file, file):
        by_prompt.setdefault(key[0], []).append(key)
    before: Scores = {name: {} for name in MEASURED}
    after: Scores = {name: {} for name in MEASURED}
    for prompt, group in by_prompt.items():  # prompt by prompt: large images need not all fit
        first = [measurable(base[key], base_file) for key in group]
        second = [measurable(trained[key], file) for key in group]
        if len({image.shape for image in first + second}) > 1:
            raise UserError(
                f"{file}: images of prompt {prompt} differ in size from each other or from "
                f"{base_file}; evaluate both again"
            )
        for key, a, b in zip(group, second, first, strict=True):
            before["distance_to_base"][key], after["distance_to_base"][key] = 0.0, rms(a, b)
        if len(group) > 1:
            before["diversity"][group[0]] = diversity(first)
            after["diversity"][group[0]] = diversity(second)
    return before, after


def read_images(path: Path) -> dict[Key, bytes]:
    """PNG files by (prompt id, sample, prompt)."""
    return {
        (row["prompt_id"], row["sample"], row["prompt"]): row["png"]
        for row in read_table(path, IMAGES).to_pylist()
    }


def first_samples(images: Iterable[Key]) -> list[Key]:
    """The first sample of each prompt, by prompt."""
    first: dict[int, Key] = {}
    for key in sorted(images):
        first.setdefault(key[0], key)
    return list(first.values())


def decode_png(png: bytes, path: Path) -> Pixels:
    """Pixels to look at in [0, 1], float32 [h, w, 3]; of what is no image a grey cross.

    Raises:
        UserError: naming ``path`` if the PNG is damaged.
    """
    return _rgba(png, path)[..., :3]


def measurable(png: bytes, path: Path) -> Pixels:
    """The same to measure: NaN where there is no image, which is transparent all over."""
    pixels = _rgba(png, path)
    return pixels[..., :3] if pixels[..., 3].any() else np.full_like(pixels[..., :3], np.nan)


def is_image(png: bytes, path: Path) -> bool:
    """Whether a PNG of ours holds an image."""
    return bool(_rgba(png, path)[..., 3].any())


def _rgba(png: bytes, path: Path) -> Pixels:
    try:
        image = Image.open(io.BytesIO(png)).convert("RGBA")
    except (UnidentifiedImageError, OSError):
        raise UserError(f"{path}: holds a damaged image; delete it and run again") from None
    return np.asarray(image, dtype=np.float32) / np.float32(255.0)


def train_record(path: Path) -> Mapping[str, Any]:
    """What training spent, from ``train.json``."""
    record = read_json(path)
    missing = [key for key in TRAIN_KEYS if key not in record]
    if missing:
        raise UserError(f"{path}: has no {missing[0]!r}; delete it and run the training again")
    return record


def evaluations(train: Mapping[str, Any]) -> int:
    """Network evaluations of a training: forward, forward+backward and reference passes."""
    return int(train["nfe_forward"] + train["nfe_train"] + train["nfe_reference"])
