"""What the signs of a tree's drawing mean, as a drawing."""

from __future__ import annotations

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from docs.generate.trees import (
    LEFT,
    RIGHT,
    RING,
    WIDTH,
    add_curves,
    add_dots,
    look_of,
    straight,
    wave,
)
from egrpo.figures.style import FREE_STYLE, INK, PALETTE

HEIGHT, LINE = 1.5, 0.27
"""Inches of the whole, and from one sign to the next."""
SIGNS = (
    ("deterministic step (ODE, Euler)", "ode"),
    ("deterministic, second order (DPM-Solver++)", "dpm2"),
    ("stochastic step, not trained", "untrained"),
    ("stochastic step, trained", "trained"),
    ("several steps merged into one stochastic step", "merged"),
    ("the image is noised again, to train there", "noising"),
    ("network evaluation", "forward"),
    ("network evaluation, then forward+backward", "train"),
    ("image with its reward; each shape apart", "images"),
    ("group: what is compared with each other", "groups"),
)


def _sign(axes: Axes, kind: str, x: float, y: float) -> None:
    """One sign, 0.56 inches wide."""
    start, middle, stop = (x, y), (x + 0.28, y), (x + 0.56, y)
    blue = PALETTE[0]
    if kind in ("ode", "dpm2", "noising"):
        add_curves(axes, [straight(start, stop)], kind, **look_of(kind, blue))
    elif kind in ("untrained", "trained", "merged"):
        if kind == "merged":
            add_curves(axes, [straight(start, stop)], kind, **look_of(kind, blue))
        wavy = "trained" if kind == "merged" else kind
        add_curves(axes, [wave(start, stop)], f"wave-{kind}", **look_of(wavy, blue))
    elif kind == "images":
        add_dots(axes, [(x + 0.16, y)], kind, "o", color=blue, markersize=7.5)
        add_dots(axes, [(x + 0.42, y)], kind, "D", color=blue, markersize=6)
    elif kind == "groups":
        for k, shade in enumerate(PALETTE[:2]):
            axes.plot([x + 0.2 + 0.18 * k] * 2, [y - 0.09, y + 0.09], color=shade, linewidth=2.2)
    else:
        if kind == "train":
            add_dots(axes, [middle], "ring", "o", **RING)
        add_dots(axes, [middle], kind, "o", color=INK, markersize=3.2, markeredgewidth=0)


def draw_legend() -> Figure:
    """What the signs of a drawing mean."""
    with matplotlib.rc_context(FREE_STYLE):
        wide = LEFT + WIDTH + RIGHT
        figure = Figure(figsize=(wide, HEIGHT))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        axes.set_xlim(0, wide)
        axes.set_ylim(0, HEIGHT)
        for n, (text, kind) in enumerate(SIGNS):
            x, y = 0.2 + 3.85 * (n // 5), 1.33 - LINE * (n % 5)
            _sign(axes, kind, x, y)
            axes.text(x + 0.72, y, text, va="center", fontsize=8.5, color=INK)
    return figure
