"""The sigma grid: an explicit tuple of floats handed to everything else.

Source: E-GRPO (arXiv 2601.00423); the shift is that of SD3 (arXiv 2403.03206, eq. 23); where SD3's
stock pipeline ends its grid: ``set_timesteps`` of diffusers' FlowMatchEulerDiscreteScheduler.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

Sigmas = tuple[float, ...]
"""``sigmas[i]``, i = 0..T, strictly falling from 1 (noise) to 0 (data)."""

SIGMA_MIN = 1e-3
"""Least unshifted sigma of diffusers' scheduler: 1 of 1000 training timesteps."""


def shifted(t: float, shift: float) -> float:
    """The flow time ``s*t / (1 + (s-1)*t)``."""
    return shift * t / (1.0 + (shift - 1.0) * t)


def stock_end(shift: float, *, dynamic: bool) -> float:
    """``end`` of :func:`shifted_sigmas` for the grid of diffusers' SD3 pipeline.

    It asks its scheduler for T timesteps, which end at the least sigma of the scheduler's own
    table. A fixed shift is in that table already, and is then applied once more.
    """
    return SIGMA_MIN if dynamic else shifted(SIGMA_MIN, shift)


def shifted_sigmas(
    steps: int, shift: float, terminal: float | None = None, end: float | None = None
) -> Sigmas:
    """Grid of ``steps`` + 1 flow times: ``s*t / (1 + (s-1)*t)`` of ``linspace(1, end, T)``; then 0.

    Args:
        steps: network evaluations T of a plain ODE sampler, at least 1.
        shift: s > 0; 1 leaves the grid as it is.
        terminal: in (0, 1); 1 - sigma is scaled so that ``sigmas[-2]`` is this (``shift_terminal``
            of diffusers' scheduler). None leaves the grid.
        end: unshifted time of the last evaluation, in (0, 1). None is 1/T: all T intervals are
            equal before the shift, E-GRPO's formula.

    Raises:
        ValueError: if an argument is out of range, or ``terminal`` is given for one step.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if not (shift > 0 and math.isfinite(shift)):
        raise ValueError(f"shift must be a positive finite number, got {shift}")
    if end is None:
        times = [1.0 - i / steps for i in range(steps)]
    elif 0.0 < end < 1.0:
        times = [1.0 - (1.0 - end) * i / max(steps - 1, 1) for i in range(steps)]
    else:
        raise ValueError(f"end must lie in (0, 1), got {end}")
    grid = [shifted(t, shift) for t in times]
    if terminal is None:
        return (*grid, 0.0)
    if not 0.0 < terminal < 1.0 or steps < 2:
        raise ValueError(f"terminal must lie in (0, 1), with 2 steps or more, got {terminal}")
    scale = (1.0 - terminal) / (1.0 - grid[-1])
    return (*(1.0 - (1.0 - s) * scale for s in grid), 0.0)


def check_sigmas(sigmas: Sequence[float]) -> Sigmas:
    """Return ``sigmas`` as a tuple; a ValueError unless it falls strictly from 1 to 0."""
    grid = tuple(float(s) for s in sigmas)
    if len(grid) < 2 or grid[0] != 1.0 or grid[-1] != 0.0:
        raise ValueError("sigmas must start at 1 and end at 0")
    if not all(b < a for a, b in pairwise(grid)):  # refuses NaN too
        raise ValueError("sigmas must fall strictly")
    return grid
