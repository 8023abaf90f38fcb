"""How far images differ: root mean square over pixels and channels."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import combinations

import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.float32]
"""One image in [0, 1], float32 [h, w, 3] or [3, h, w]; NaN where there is none."""


def rms(first: Pixels, second: Pixels) -> float:
    """Root mean square difference over pixels and channels, in [0, 1]; NaN if one is no image."""
    return float(np.sqrt(np.mean((first - second) ** 2, dtype=np.float64)))


def mean_distance(pairs: Iterable[tuple[Pixels, Pixels]]) -> float:
    """Mean RMS distance over pairs, in [0, 1]; NaN where none is of two images."""
    found = [distance for pair in pairs if not math.isnan(distance := rms(*pair))]
    return float(np.mean(found)) if found else math.nan


def diversity(images: Sequence[Pixels]) -> float:
    """Mean RMS distance over all pairs, in [0, 1]; NaN of fewer than two that are images."""
    return mean_distance(combinations(images, 2))
