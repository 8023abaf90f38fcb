"""Pictures of an evaluation with their prompts and scores written below, as MLflow shows them."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow.compute as pc

from egrpo.report.evaluations import Row
from egrpo.store.tables import IMAGES, read_table

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFont import FreeTypeFont

PIXELS = 256
"""Most pixels of an image, each way; the full ones lie in ``images.parquet``. Smaller ones are
shown as large, by whole factors: text has no place below 32 pixels."""
FONT, LINE, LETTERS = 14, 17, 30  # pixels, pixels from line to line, letters that fit into PIXELS
PROMPT_LINES = 3
COLUMNS = 4
"""Most images in a row: MLflow shows a picture as wide as the window, with its text that small."""

Scores = Mapping[tuple[int, int], Mapping[str, float | None]]
"""By prompt id and sample: reward -> value, None where scoring failed."""


def scores_by_image(scores: Sequence[Row], first: Sequence[str]) -> Scores:
    """The scores of each image; the rewards ``first`` come before the others."""
    found: dict[tuple[int, int], dict[str, float | None]] = {}
    for row in sorted(scores, key=lambda r: (r["reward"] not in first, r["reward"])):
        found.setdefault((row["prompt_id"], row["sample"]), {})[row["reward"]] = row["value"]
    return found


def first_images(folder: Path, prompts: int) -> dict[tuple[int, str], dict[int, Image]]:
    """Samples by number of the first prompts, by prompt id and prompt."""
    from PIL import Image

    table = read_table(folder / "images.parquet", IMAGES)
    first = sorted(set(table["prompt_id"].to_pylist()))[:prompts]
    chosen = table.filter(pc.field("prompt_id").isin(first))
    found: dict[tuple[int, str], dict[int, Image.Image]] = {}
    for row in chosen.sort_by([("prompt_id", "ascending"), ("sample", "ascending")]).to_pylist():
        image = Image.open(io.BytesIO(row["png"])).convert("RGB")
        found.setdefault((row["prompt_id"], row["prompt"]), {})[row["sample"]] = image
    return found


def caption(values: Mapping[str, float | None]) -> list[str]:
    """A line for each reward, a dash where there is no value."""
    return [f"{name} " + ("-" if v is None else f"{v:.3g}") for name, v in values.items()]


def pair(number: int, prompt: str, samples: Mapping[int, Image], scores: Scores) -> Image:
    """Two samples of a prompt beside each other, prompt and scores below: a square at least.

    MLflow's comparison of tables cuts off the lower half of a square; a click shows all of it.
    """
    row = [
        captioned(image, [*_wrapped(prompt), *caption(scores.get((number, sample), {}))])
        for sample, image in list(samples.items())[:2]
    ]
    return _joined(row, least=2 * PIXELS)


def captioned(image: Image, lines: Sequence[str]) -> Image:
    """An image of at most ``PIXELS`` each way in their middle, with lines of text below."""
    from PIL import Image, ImageDraw

    factor = max(1, PIXELS // max(image.size))
    small = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    small.thumbnail((PIXELS, PIXELS))
    whole = Image.new("RGB", (PIXELS, small.height + LINE * len(lines) + LINE), "white")
    whole.paste(small, ((PIXELS - small.width) // 2, 0))
    draw = ImageDraw.Draw(whole)
    for number, line in enumerate(lines):
        shown = line if len(line) <= LETTERS else f"{line[: LETTERS - 1]}…"
        draw.text((4, small.height + 4 + LINE * number), shown, fill="black", font=_font())
    return whole


def before_after(base: Path, trained: Path, prompts: int, scores: Mapping[Path, Scores]) -> Image:
    """The first sample of the first prompts: base model above, trained below, each with scores."""
    shown = []
    for name, folder in (("base model", base), ("trained", trained)):
        row = []
        for (number, prompt), samples in first_images(folder, prompts).items():
            sample, image = next(iter(samples.items()))
            values = caption(scores[folder].get((number, sample), {}))
            row.append(captioned(image, [*_wrapped(prompt), f"{name}:", *values]))
        shown.append(row)
    starts = range(0, max(map(len, shown)), COLUMNS)
    rows = [_joined(part) for at in starts for row in shown if (part := row[at : at + COLUMNS])]
    return _joined(rows, down=True)


def _joined(images: Sequence[Image], *, down: bool = False, least: int = 0) -> Image:
    """Images in a row, or below each other, on white of at least ``least`` pixels each way."""
    from PIL import Image

    widths, heights = [image.width for image in images], [image.height for image in images]
    size = (max(widths), sum(heights)) if down else (sum(widths), max(heights))
    whole = Image.new("RGB", (max(size[0], least), max(size[1], least)), "white")
    left = top = 0
    for image in images:
        whole.paste(image, (left, top))
        left, top = (0, top + image.height) if down else (left + image.width, 0)
    return whole


def _wrapped(prompt: str) -> list[str]:
    return textwrap.wrap(prompt, LETTERS, max_lines=PROMPT_LINES, placeholder="…")


@cache
def _font() -> FreeTypeFont:
    """The font of the figures: it has more letters than Pillow's own."""
    import matplotlib
    from PIL import ImageFont

    file = Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"
    return ImageFont.truetype(str(file), FONT)
