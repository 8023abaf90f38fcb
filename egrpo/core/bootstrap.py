"""Confidence interval of a paired difference, from a bootstrap that resamples clusters.

Trained and base model draw from the same noise, so their scores are compared pair by pair. The
samples of one prompt resemble each other: whole prompts are resampled, never single samples.

Source: Efron and Tibshirani, "An Introduction to the Bootstrap" (1993), chapter 13 (percentile
interval); Davison and Hinkley, "Bootstrap Methods and their Application" (1997), section 3.8
(resampling clusters).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

_CHUNK = 1 << 22
"""Most cluster draws held in memory at once."""


@dataclass(frozen=True)
class Interval:
    """A mean paired difference and its percentile interval.

    Attributes:
        mean_base, mean_trained: means over the valid pairs; NaN without one.
        difference: mean of trained minus base over the valid pairs; NaN without one.
        low, high: ends of the interval of the difference; NaN with fewer than two clusters,
            whose variation nothing can tell.
        pairs: pairs with two finite values.
        invalid: pairs left out.
    """

    mean_base: float
    mean_trained: float
    difference: float
    low: float
    high: float
    pairs: int
    invalid: int


def paired_interval(
    base: npt.ArrayLike,
    trained: npt.ArrayLike,
    clusters: npt.ArrayLike,
    *,
    resamples: int,
    seed: int,
    level: float = 0.95,
) -> Interval:
    """Mean difference of pairs with a percentile interval over resampled clusters.

    A resample draws as many clusters as there are, with replacement, and takes the mean over all
    pairs in them. The result does not depend on the order of the pairs, bit for bit. Percentile
    intervals are a little narrow with few clusters: with 40 they cover about 94% instead of 95%
    (simulated in the tests), because their variance lacks the factor n / (n - 1).

    Args:
        base: scores of the base model, [n]; a value that is not finite marks a failed score.
        trained: scores of the trained model for the same prompts and noise, [n].
        clusters: label of each pair's cluster (its prompt), [n]; numbers or strings.
        resamples: bootstrap resamples, at least 1.
        seed: of the resampling, at least 0.
        level: coverage of the interval, in (0, 1).

    Returns:
        The interval, in the unit of the scores.

    Raises:
        ValueError: if shapes differ, or ``resamples`` or ``level`` is out of range.
    """
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}")
    if not 0.0 < level < 1.0:
        raise ValueError(f"level must lie between 0 and 1, got {level}")
    before, after, labels, invalid = _finite_pairs(base, trained, clusters)
    pairs = len(before)
    if pairs == 0:
        nan = math.nan
        return Interval(nan, nan, nan, nan, nan, 0, invalid)

    difference = after - before
    # measured from one of them, so that constant differences give exactly their value and no width
    pivot = float(difference.min())
    order = np.lexsort((difference, labels))  # sums then do not depend on the order of the pairs
    _, member = np.unique(labels[order], return_inverse=True)
    sums = np.bincount(member, weights=difference[order] - pivot).astype(np.float64)
    sizes = np.bincount(member)
    low = high = math.nan
    if len(sums) > 1:
        means = _resampled_means(sums, sizes, resamples, seed)
        tail = (1.0 - level) / 2.0
        low, high = (pivot + float(q) for q in np.quantile(means, (tail, 1.0 - tail)))
    return Interval(
        mean_base=math.fsum(before) / pairs,
        mean_trained=math.fsum(after) / pairs,
        difference=pivot + math.fsum(difference - pivot) / pairs,
        low=low,
        high=high,
        pairs=pairs,
        invalid=invalid,
    )


def _finite_pairs(
    base: npt.ArrayLike, trained: npt.ArrayLike, clusters: npt.ArrayLike
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[Any], int]:
    """Base, trained and label of each pair of two finite values, [pairs], and how many were not."""
    before = np.asarray(base, dtype=np.float64)
    after = np.asarray(trained, dtype=np.float64)
    labels = np.asarray(clusters)
    if before.ndim != 1 or not before.shape == after.shape == labels.shape:
        raise ValueError(
            "base, trained and clusters must be of one length, got shapes "
            f"{before.shape}, {after.shape}, {labels.shape}"
        )
    valid = np.isfinite(before) & np.isfinite(after)
    return before[valid], after[valid], labels[valid], int((~valid).sum())


def _resampled_means(
    sums: npt.NDArray[np.float64], sizes: npt.NDArray[np.signedinteger], resamples: int, seed: int
) -> npt.NDArray[np.float64]:
    """Mean over pairs of each resample, [resamples], from cluster sums and sizes, both [c]."""
    rng = np.random.default_rng(seed)
    count = len(sums)
    rows = max(1, _CHUNK // count)
    means = np.empty(resamples)
    for first in range(0, resamples, rows):
        drawn = rng.integers(count, size=(min(rows, resamples - first), count))
        means[first : first + len(drawn)] = sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)
    return means
