"""Grids of images: prompts below each other, the base model and what was trained side by side."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from egrpo.core.distance import Pixels
from egrpo.errors import UserError
from egrpo.figures.style import DPI, FINE, FREE_STYLE, inches, save_figure, wrap
from egrpo.report.evaluations import Key, decode_png, first_samples, read_images

PAGE, MARGIN, GAP, LEFT = 10.0, 0.12, 0.06, 1.3
"""Inches: width of a page, its edge, between images, of the prompts beside them."""
Column = tuple[str, Path, dict[Key, bytes]]
"""Heading, file, images."""


class Canvas:
    """A figure laid out in inches from its top left corner, so that pixels stay whole."""

    def __init__(self, width: float, height: float, dpi: int):
        self.width, self.height, self.dpi = width, height, dpi
        self.figure = Figure(figsize=(width, height), dpi=dpi)

    def axes(self, x: float, y: float, width: float, height: float) -> Axes:
        """Axes whose upper left corner is at (x, y)."""
        bottom = self.height - y - height
        box = x / self.width, bottom / self.height, width / self.width, height / self.height
        return self.figure.add_axes(box)

    def image(self, pixels: Pixels, x: float, y: float, across: int) -> None:
        """An image ``across`` output pixels wide, its upper left corner at (x, y).

        Small ones go into the file as they are, others with the pixels shown: in the SVG too.
        """
        down = height_of(pixels, across)
        if across % pixels.shape[1]:
            whole = Image.fromarray(np.rint(pixels * 255.0).astype(np.uint8))
            shown = whole.resize((across, down), Image.Resampling.LANCZOS)
            pixels = np.asarray(shown, np.float32) / np.float32(255.0)
        axes = self.axes(x, y, across / self.dpi, down / self.dpi)
        axes.imshow(pixels, interpolation="nearest")
        axes.set_axis_off()

    def text(self, x: float, y: float, text: str, **style: Any) -> None:
        """Text as it is, at (x, y); dollar signs of a prompt are no mathematics."""
        place = x / self.width, 1.0 - y / self.height
        self.figure.text(*place, text, parse_math=False, **style)


def cell_width(pixels: Pixels, room: int) -> int:
    """Output pixels across that an image takes of ``room``: small ones a whole multiple."""
    factor = room // pixels.shape[1]
    return pixels.shape[1] * factor if factor > 1 else room


def height_of(pixels: Pixels, across: int) -> int:
    """Output pixels down of an image that is ``across`` wide."""
    return round(across * pixels.shape[0] / pixels.shape[1])


def images_figure(
    base_images: str | Path,
    columns: Sequence[tuple[str, str | Path]],
    prompts: int,
    stem: str | Path,
    *,
    page: bool = True,
) -> Figure:
    """Fig. 5 of the paper: prompts by models, from the same prompt and noise.

    Rows are the first samples of so many ``prompts`` of the base model's ``images.parquet``;
    ``columns`` heading and ``images.parquet`` of each trained model. Either all on one ``page``, as
    PNG and SVG, or large images to look at, as PNG only. Raises UserError if a file is missing or
    damaged, or a model lacks an image of the base.
    """
    keys: list[Key] = []
    read: list[Column] = []
    for run, path in [("base", Path(base_images)), *((run, Path(path)) for run, path in columns)]:
        images = read_images(path)
        keys = keys or list(islice(first_samples(images), prompts))
        for prompt, sample, text in (key for key in keys if key not in images):
            raise UserError(
                f"{path}: run {run!r} has no image of prompt {prompt} ({text!r}), sample {sample}; "
                "evaluate it on the base's prompts"
            )
        # one table at a time: hundreds of large images each, of which few are shown
        read.append((run, path, {key: images[key] for key in keys}))
    first = decode_png(read[0][2][keys[0]], read[0][1])
    if page:
        room, dpi = int(((PAGE - 2 * MARGIN - LEFT) / len(read) - GAP) * FINE), FINE
        across = cell_width(first, min(384, max(96, room)))
    else:
        across, dpi = cell_width(first, 192 if first.shape[1] <= 192 else 384), DPI
    with rc_context(FREE_STYLE):
        figure = _draw(keys, read, across, height_of(first, across), dpi)
        return save_figure(figure, stem, ("png", "svg") if page else ("png",), dpi)


def _draw(
    keys: Sequence[Key], columns: Sequence[Column], across: int, down: int, dpi: int
) -> Figure:
    """Prompts to the left, headings above; each cell is as large as the first image's."""
    width, height = across / dpi, down / dpi
    size, font = (7.5, 7.5) if width < 1.0 else (10.0, 9.0)
    head_width = inches(size, weight="bold")
    heads = [wrap(name, width + GAP / 2, measure=head_width) for name, *_ in columns]
    top = MARGIN + GAP + max(head.count("\n") + 1 for head in heads) * size * 1.25 / 72.0
    total = LEFT + len(columns) * (width + GAP) + 2 * MARGIN - GAP
    canvas = Canvas(total, top + len(keys) * (height + GAP) + MARGIN - GAP, dpi)
    lines = max(1, int(height * 72.0 / (font * 1.25)))
    bold = {"ha": "center", "va": "baseline", "fontsize": size, "weight": "bold"}
    lefts = [MARGIN + LEFT + column * (width + GAP) for column in range(len(columns))]
    for x, head in zip(lefts, heads, strict=True):
        canvas.text(x + width / 2, top - GAP - size * 0.25 / 72.0, head, **bold)
    for row, key in enumerate(keys):
        y = top + row * (height + GAP)
        text = wrap(key[2], LEFT - 2 * GAP, lines, inches(font))
        canvas.text(MARGIN, y + height / 2, text, va="center", fontsize=font)
        for x, (_, path, images) in zip(lefts, columns, strict=True):
            canvas.image(decode_png(images[key], path), x, y, across)
    return canvas.figure
