"""Confidence interval of a mean over training seeds and prompts, and of a difference of two.

Every seed's model draws the same held-out prompts from the same noise: seeds and prompts are
crossed. A cell ``y[s, p] = mean + seed[s] + prompt[p] + rest[s, p]``, all three random, is the mean
score of a seed on a prompt; the interval covers another training seed and other prompts at once.

With ``S`` seeds, ``P`` prompts and the mean squares ``MS`` of seeds, prompts and rest, the variance
of the grand mean is estimated as ``(MS_seed + MS_prompt - MS_rest) / (S P)``, its components
``(MS_seed - MS_rest) / P`` and ``(MS_prompt - MS_rest) / S`` cut at 0 where chance makes them
negative. Degrees of freedom are Satterthwaite's for the three mean squares, at least the smaller of
``S - 1`` and ``P - 1``; the quantile is Student's.

Coverage of 95% intervals, simulated at 48 prompts: 94.2 to 98.7% with 5 seeds, 92.4 to 98.8% with
3, 87.5 to 98.7% with 2; lowest where both seeds and prompts matter and the few seeds happen to lie
close together. One seed leaves the scatter of training unknown: the interval then holds for this
trained model alone.

Sources: Searle, Casella and McCulloch, "Variance Components" (1992), chapter 4 (mean squares of the
two-way crossed random model); Satterthwaite, "An approximate distribution of estimates of variance
components", Biometrics Bulletin 2 (1946); Brennan, "Generalizability Theory" (2001).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import stdtrit

Cells = npt.NDArray[np.float64]
"""Scores by seed and prompt, [seeds, prompts]."""


@dataclass(frozen=True)
class CrossedInterval:
    """A mean over seeds and prompts, or a difference of two such means, and its interval.

    Attributes:
        mean: over the cells that were used; NaN without one.
        low, high, dof: ends, and degrees of freedom of the t quantile; NaN below two prompts.
        seeds: rows, of a difference those of both sides. A row alone on its side adds no seed
            variance: the interval takes that model as it is.
        prompts, invalid: prompts with a finite value in every cell; cells of all others.
    """

    mean: float
    low: float
    high: float
    seeds: int
    prompts: int
    invalid: int
    dof: float


def crossed_interval(cells: npt.ArrayLike, *, level: float = 0.95) -> CrossedInterval:
    """Mean over seeds and prompts with an interval over both.

    A prompt without a finite value for one seed is left out for all of them: the seeds' means then
    differ by training, not by which prompts failed. A seed that failed everywhere leaves nothing:
    without it, a collapsed training would flatter the others.

    Args:
        cells: mean score of each seed on each prompt, [seeds, prompts]; not finite without one.
            One seed: the interval covers prompts alone (Student's t on their means).
        level: coverage of the interval, in (0, 1).

    Raises:
        ValueError: if ``cells`` is not a matrix with a row, or ``level`` is out of range.
    """
    return _interval([_matrix(cells)], level)


def difference_interval(
    first: npt.ArrayLike, second: npt.ArrayLike, *, level: float = 0.95
) -> CrossedInterval:
    """Mean of ``first`` minus mean of ``second`` on the same prompts, with an interval.

    Paired by prompt, not by seed: the variance is that of the prompts' differences, plus the seed
    component of each side on its own. Where shared seeds make two arms rise and fall together, the
    interval is too wide, never too narrow; pairing by seed would leave ``S - 1`` degrees of freedom
    where this has up to ``2 (S - 1)``, and sides may differ in their number of seeds.

    Args:
        first, second: cells of the two models, [seeds of each, prompts], same order of prompts. A
            prompt without a finite value in one cell of either side is left out of both.
        level: coverage of the interval, in (0, 1).

    Raises:
        ValueError: as :func:`crossed_interval`, or if the sides differ in their prompts.
    """
    sides = [_matrix(first), _matrix(second)]
    if sides[0].shape[1] != sides[1].shape[1]:
        raise ValueError(
            f"both sides need the same prompts, got shapes {sides[0].shape}, {sides[1].shape}"
        )
    return _interval(sides, level)


def _matrix(cells: npt.ArrayLike) -> Cells:
    matrix = np.asarray(cells, dtype=np.float64)
    if matrix.ndim != 2 or not len(matrix):
        raise ValueError(f"cells must be [seeds, prompts] with a seed, got shape {matrix.shape}")
    return matrix


def _interval(sides: list[Cells], level: float) -> CrossedInterval:
    """Interval of the mean of one side, or of the first minus the second."""
    if not 0.0 < level < 1.0:
        raise ValueError(f"level must lie between 0 and 1, got {level}")
    valid = np.logical_and.reduce([np.isfinite(side).all(axis=0) for side in sides])
    prompts, seeds = int(valid.sum()), sum(map(len, sides))
    counts = seeds, prompts, seeds * int((~valid).sum())
    if prompts == 0:
        return CrossedInterval(math.nan, math.nan, math.nan, *counts, math.nan)
    kept = [side[:, valid] for side in sides]
    # measured from one of them, so that constant cells give exactly their value and no width
    pivots = [float(side.min()) for side in kept]
    kept = [side - pivot for side, pivot in zip(kept, pivots, strict=True)]
    means, pivot = kept[0].mean(axis=0), pivots[0]
    if len(kept) > 1:
        means, pivot = means - kept[1].mean(axis=0), pivots[0] - pivots[1]
    mean = pivot + float(means.mean())
    half = dof = math.nan
    if prompts > 1:
        variance, dof = _variance(kept, float(means.var(ddof=1)) / prompts)
        half = float(stdtrit(dof, (1.0 + level) / 2.0)) * math.sqrt(variance)
    return CrossedInterval(mean, mean - half, mean + half, *counts, dof)


def _variance(sides: list[Cells], by_prompt: float) -> tuple[float, float]:
    """Variance of the mean, or of the difference of means, and its degrees of freedom.

    ``by_prompt``: as the scatter of prompts, or of their differences, shows it.
    """
    terms = [(by_prompt, sides[0].shape[1] - 1)]
    seed = rest = 0.0
    for cells in sides:
        seeds, prompts = cells.shape
        if seeds == 1:
            continue
        by_seed = cells.mean(axis=1, keepdims=True) - cells.mean()
        residual = cells - cells.mean(axis=0) - by_seed
        dof = seeds - 1, (seeds - 1) * (prompts - 1)
        of_seed = float((by_seed**2).sum()) / (seeds * dof[0])  # MS_seed / (S P)
        of_rest = float((residual**2).sum()) / (seeds * prompts * dof[1])  # MS_rest / (S P)
        terms += [(of_seed, dof[0]), (of_rest, dof[1])]
        seed += max(of_seed - of_rest, 0.0)
        rest += of_rest
    variance = max(by_prompt, rest) + seed
    least = float(min(freedom for _, freedom in terms))
    if variance == 0.0:
        return 0.0, least
    shares = sum((value / variance) ** 2 / dof for value, dof in terms)
    return variance, max(1.0 / shares, least)
