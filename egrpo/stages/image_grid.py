"""The grid of images before and after training."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

from egrpo.errors import UserError
from egrpo.stages.figures import DPI, STYLE, save_figure
from egrpo.stages.tables import Key, Pixels, decode_png, read_images


def before_after(
    base_images: str | Path,
    runs: Sequence[tuple[str, str | Path]],
    prompts: int,
    stem: str | Path,
) -> Figure:
    """Images of the base model and of each run side by side, from the same prompt and noise.

    Rows are the first ``prompts`` prompts (their first sample), columns the base and the runs.
    Writes the PNG only: pixels gain nothing from SVG. Small images are enlarged by whole pixels.

    Raises:
        UserError: if a file is missing or damaged, or a run lacks an image of the base.
    """
    base = read_images(Path(base_images))
    first: dict[int, Key] = {}
    for key in sorted(base):
        first.setdefault(key[0], key)
    keys = list(first.values())[:prompts]
    if not keys:
        raise UserError(f"{base_images}: no image to show; grid_prompts must be at least 1")
    columns = [("base", Path(base_images), base)]
    columns += [(run, Path(path), read_images(Path(path))) for run, path in runs]
    for run, path, images in columns:
        lacking = [key for key in keys if key not in images]
        if lacking:
            raise UserError(
                f"{path}: run {run!r} has no image of prompt {lacking[0][0]} "
                f"({lacking[0][2]!r}), sample {lacking[0][1]}; evaluate it on the base's prompts"
            )
    pixels = [[decode_png(images[k], path) for _, path, images in columns] for k in keys]
    with rc_context(STYLE | {"figure.constrained_layout.use": False}):
        figure = _image_grid(pixels, [k[2] for k in keys], [run for run, *_ in columns])
        return save_figure(figure, stem, endings=("png",))


def _image_grid(pixels: list[list[Pixels]], left: list[str], top: list[str]) -> Figure:
    """Images [row][column] with texts to the left and above; all lengths in output pixels."""
    height, width = pixels[0][0].shape[:2]
    across = 192 if width <= 192 else 384
    down = round(across * height / width)
    gap, margin, text, head = 12, 18, 230, 78
    total_x = margin * 2 + text + len(top) * (across + gap) - gap
    total_y = margin + head + len(left) * (down + gap)
    figure = Figure(figsize=(total_x / DPI, total_y / DPI))
    for row, (prompt, images) in enumerate(zip(left, pixels, strict=True)):
        y = total_y - head - row * (down + gap)
        figure.text(
            margin / total_x,
            (y - down / 2) / total_y,
            textwrap.fill(prompt, 22),
            va="center",
            fontsize=9,
        )
        for column, image in enumerate(images):
            x = margin + text + column * (across + gap)
            box = (x / total_x, (y - down) / total_y, across / total_x, down / total_y)
            axes = figure.add_axes(box)
            enlarged = image.shape[1] <= across
            axes.imshow(image, interpolation="nearest" if enlarged else "antialiased")
            axes.set_axis_off()
            if row == 0:
                name = textwrap.fill(top[column], 16)
                figure.text(
                    box[0] + box[2] / 2,
                    (y + gap) / total_y,
                    name,
                    ha="center",
                    va="bottom",
                    fontsize=10,
                    weight="bold",
                )
    return figure
