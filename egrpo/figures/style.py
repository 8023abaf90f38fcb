"""What all figures share: colors, markers, units, texts that wrap, columns, files.

Artists that carry a finding have a ``gid`` ("threshold", "yardstick", …), which is also their id
in the SVG. Color is never the only cue: every series has its own marker or dashes too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path
from matplotlib.ticker import MaxNLocator

from egrpo.store.files import replacing
from egrpo.store.tables import Table, read_table

Array = npt.NDArray[Any]

# Okabe and Ito, "Color Universal Design" (2008); yellow is left out, too pale for lines on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
INK = "#444444"
MARKERS = "os^DvPX<>p*"
# Four dashes do not divide the seven colors: 28 series have a pair of their own.
LINES: tuple[Any, ...] = ("-", (0, (5, 1.6)), (0, (6, 1.5, 1.2, 1.5)), (0, (1.6, 1.1)))
DPI = 150
FINE = 300
"""Dots per inch of figures that hold images."""
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.labelsize": 10,
    "legend.fontsize": 9,
    "figure.titlesize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E6E6E6",
    "axes.axisbelow": True,
    "lines.linewidth": 1.8,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "svg.hashsalt": "egrpo",
}
FREE_STYLE = STYLE | {"figure.constrained_layout.use": False}
"""For figures laid out by hand."""
ENTROPY = {
    "exp_per_dim": ("$e^{h/d}$", "entropy $e^{h/d}$ (latent units)"),
    "nats_per_dim": ("$h/d$", "entropy $h/d$ (nats per dimension)"),
    "variance": (r"$(\mathrm{std}/a)^2$", r"variance $(\mathrm{std}/a)^2$"),
}
"""Symbol and label of an axis, by measure."""


def look(series: int) -> dict[str, Any]:
    """Color and marker of the n-th series, as arguments of ``Axes.plot``."""
    return {"color": PALETTE[series % len(PALETTE)], "marker": MARKERS[series % len(MARKERS)]}


def by_span(spans: Iterable[Any]) -> list[tuple[int, dict[str, Any]]]:
    """Spans, ascending and each once, with the look and label of every figure of a profile."""
    return [
        (int(span), look(i) | {"label": "1 step" if span == 1 else f"{span} steps merged"})
        for i, span in enumerate(np.unique(list(spans)))
    ]


def entropy_axis(axes: Axes, measure: str, steps: str) -> None:
    """Steps across, entropy up from 0; nats may be negative."""
    axes.set(xlabel=f"{steps} (grid index)", ylabel=ENTROPY[measure][1])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if measure != "nats_per_dim":
        axes.set_ylim(bottom=0)


def numbered(axes: Axes, x: Array, y: Iterable[float], numbers: Iterable[int], **own: Any) -> None:
    """Markers that hold a number; those drawn later hide numbers below them, which read as one."""
    order = own.setdefault("zorder", 4.0)
    heights = list(y)
    axes.plot(x, heights, **{"ls": "none", "mfc": "white", "mec": "black"} | own)
    middle = {"ha": "center", "va": "center_baseline", "zorder": order + 0.05}
    for across, up, number in zip(x, heights, numbers, strict=True):
        axes.text(across, up, str(number), fontsize=own["ms"] - 3.0, **middle)


def shared_legend(figure: Figure, ncols: int) -> None:
    """One legend below the panels; what several of them show is said once."""
    shown: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            shown.setdefault(label, handle)
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=ncols)


def columns(path: str | Path, table: Table) -> dict[str, Array]:
    """Columns as arrays, null numbers as NaN; UserError if the file is no such table."""
    data = read_table(path, table)
    return {name: data[name].to_numpy() for name in data.column_names}


def inches(size: float, **font: Any) -> Callable[[str], float]:
    """How wide a text is printed; ``font`` as in ``FontProperties``."""
    font_of_size = FontProperties(size=size, **font)

    def width(text: str) -> float:
        points, *_ = text_to_path.get_text_width_height_descent(text, font_of_size, ismath=False)
        return float(points) / 72.0

    return width


def wrap(
    text: str, width: float, lines: int | None = None, measure: Callable[[str], float] = len
) -> str:
    """Text in lines that measure at most ``width``, by default in characters; names break after
    ``_ - .`` before within a word. After so many ``lines`` an ellipsis stands for the rest."""
    done = [""]
    for part in re.findall(r"\s+|[^\s_.-]*[_.-]+|[^\s_.-]+", text.strip()):
        piece = " " if part.isspace() else part
        if measure(done[-1] + piece) <= width:
            done[-1] += piece
        elif piece != " ":
            done.append("")
            for letter in piece:
                if done[-1] and measure(done[-1] + letter) > width:
                    done.append("")
                done[-1] += letter
    done = [line.strip() for line in done if line.strip()]
    if lines is not None and len(done) > lines:
        kept = done[lines - 1]
        while len(kept) > 1 and measure(kept + "…") > width:
            kept = kept.rpartition(" ")[0] or kept[:-1]
        done = [*done[: lines - 1], kept + "…"]
    return "\n".join(done)


def save_figure(
    figure: Figure, stem: str | Path, endings: Sequence[str] = ("png", "svg"), dpi: int = DPI
) -> Figure:
    """Write ``<stem>.<ending>`` atomically; the same data gives the same bytes."""
    for ending in endings:
        metadata = {"Date": None} if ending == "svg" else None
        with replacing(f"{stem}.{ending}") as temporary:
            figure.savefig(temporary, format=ending, dpi=dpi, metadata=metadata)
    return figure
