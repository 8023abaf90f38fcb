"""How far images differ: root mean square over pixels and channels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations

import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.float32]
"""One image in [0, 1], float32 [h, w, 3]; NaN where there is none."""


def rms(first: Pixels, second: Pixels) -> float:
    """Root mean square difference over pixels and channels, in [0, 1]; NaN if one is no image."""
    return float(np.sqrt(np.mean((first - second) ** 2, dtype=np.float64)))


def diversity(images: Sequence[Pixels]) -> float:
    """Mean RMS distance over all pairs, in [0, 1]; NaN of fewer than two that are images."""
    there = [image for image in images if np.isfinite(image).all()]
    pairs = [rms(a, b) for a, b in combinations(there, 2)]
    return float(np.mean(pairs)) if pairs else math.nan
