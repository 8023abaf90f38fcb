"""Figures as SVG files that are small and the same everywhere."""

from __future__ import annotations

import io
import re

import matplotlib
from matplotlib.figure import Figure


def svg_text(figure: Figure) -> str:
    """The figure as SVG: coordinates to a hundredth of a point, nothing of date or machine."""
    with matplotlib.rc_context({"svg.hashsalt": "egrpo", "svg.fonttype": "none"}):
        buffer = io.BytesIO()
        metadata = {"Date": None, "Creator": None, "Type": None, "Format": None}
        figure.savefig(buffer, format="svg", metadata=metadata)
    text = buffer.getvalue().decode()
    text = re.sub(r"'DejaVu Sans'[^;\"]*", "sans-serif", text)
    return re.sub(r"(?<=[ \"-])(\d+\.\d{3,})(?=[ \"\n])", _short, text)


def _short(number: re.Match[str]) -> str:
    return f"{float(number[0]):.2f}".rstrip("0").rstrip(".")
