"""The sigma grid: an explicit tuple of floats handed to everything else.

Source: E-GRPO (arXiv 2601.00423); the shift is that of SD3 (arXiv 2403.03206, eq. 23).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

Sigmas = tuple[float, ...]
"""``sigmas[i]``, i = 0..T, strictly falling from 1 (noise) to 0 (data)."""


def shifted_sigmas(steps: int, shift: float, terminal: float | None = None) -> Sigmas:
    """Grid of ``steps`` + 1 flow times, ``s*t / (1 + (s-1)*t)`` over ``t = linspace(1, 0)``.

    Args:
        steps: number of network evaluations T of a plain ODE sampler, at least 1.
        shift: timestep shift s > 0; 1 leaves the grid uniform.
        terminal: in (0, 1); 1 - sigma is scaled so that ``sigmas[-2]`` is this (``shift_terminal``
            of diffusers' FlowMatchEulerDiscreteScheduler). None leaves the grid.

    Raises:
        ValueError: if an argument is out of range, or ``terminal`` is given for one step.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if not (shift > 0 and math.isfinite(shift)):
        raise ValueError(f"shift must be a positive finite number, got {shift}")
    uniform = [1.0 - i / steps for i in range(steps + 1)]
    grid = tuple(shift * t / (1.0 + (shift - 1.0) * t) for t in uniform)
    if terminal is None:
        return grid
    if not 0.0 < terminal < 1.0 or steps < 2:
        raise ValueError(f"terminal must lie in (0, 1), with 2 steps or more, got {terminal}")
    scale = (1.0 - terminal) / (1.0 - grid[-2])
    return (*(1.0 - (1.0 - s) * scale for s in grid[:-1]), 0.0)


def check_sigmas(sigmas: Sequence[float]) -> Sigmas:
    """Return ``sigmas`` as a tuple after checking that it falls strictly from 1 to 0.

    Raises:
        ValueError: if it does not.
    """
    grid = tuple(float(s) for s in sigmas)
    if len(grid) < 2 or grid[0] != 1.0 or grid[-1] != 0.0:
        raise ValueError("sigmas must start at 1 and end at 0")
    if not all(b < a for a, b in pairwise(grid)):  # refuses NaN too
        raise ValueError("sigmas must fall strictly")
    return grid
