"""Scores below the gallery's images: evaluation scored each image by itself, monitors keep means.

An image of a monitor has a score where the evaluation sampled the very same pixels from the same
prompt and noise, as it does of the base model and of the weights at the end of training.
"""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from PIL import Image

from egrpo.errors import UserError
from egrpo.report.evaluations import read_images, read_scores
from egrpo.report.text import decimals

Pixels = tuple[int, int, bytes]
"""Prompt, sample, and :func:`pixels_of` the image."""


def pixels_of(image: Image.Image) -> bytes:
    """A digest of what an RGB image shows."""
    return hashlib.sha256(image.tobytes()).digest()


def score_texts(
    folders: Iterable[Path], prompts: Sequence[str], samples: int, rewards: Sequence[str]
) -> dict[Pixels, str]:
    """Scores of the first samples of the first prompts as text, three digits of what a reward spans
    over all of them, a dash where scoring failed; nothing of a folder without images.

    Args:
        folders: with the images.parquet and scores.parquet of an evaluation.

    Raises:
        UserError: if one of these files is damaged.
    """
    found: dict[Pixels, list[float]] = {}
    for folder in folders:
        path = folder / "images.parquet"
        if not path.is_file():
            continue
        scores = read_scores(folder / "scores.parquet")
        for key, png in read_images(path).items():
            prompt, sample, text = key
            if prompt < len(prompts) and sample < samples and text == prompts[prompt]:
                values = [scores.get(name, {}).get(key, math.nan) for name in rewards]
                found[prompt, sample, pixels_of(_opened(png, path))] = values
    digits = []
    for column in zip(*found.values(), strict=True):
        finite = {value for value in column if not math.isnan(value)}
        digits.append(decimals(min(finite), max(finite)) + 1 if len(finite) > 1 else 3)
    return {key: _text(values, rewards, digits) for key, values in found.items()}


def _opened(png: bytes, path: Path) -> Image.Image:
    try:
        return Image.open(io.BytesIO(png)).convert("RGB")
    except (OSError, ValueError, SyntaxError):  # Pillow's words for a damaged PNG
        raise UserError(f"{path}: holds a damaged image; delete it and run again") from None


def _text(values: Sequence[float], rewards: Sequence[str], digits: Sequence[int]) -> str:
    texts = ["-" if math.isnan(v) else f"{v:.{d}f}" for v, d in zip(values, digits, strict=True)]
    if len(rewards) == 1:
        return texts[0]
    return " · ".join(f"{name} {text}" for name, text in zip(rewards, texts, strict=True))
