"""What a branch changes, to look at: its samples side by side and the spread of their rewards."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from egrpo.errors import UserError
from egrpo.figures.image_grid import GAP, MARGIN, PAGE, Canvas, cell_width, height_of
from egrpo.figures.style import FINE, FREE_STYLE, INK, PALETTE, inches, save_figure, wrap
from egrpo.report.evaluations import decode_png
from egrpo.store.tables import BRANCHES, ENTROPY_PROFILE, read_table

Pair = tuple[int, int]
"""(step, span)."""
Measured = Mapping[tuple[int, Pair, str], tuple[float, float]]
"""(prompt id, pair, reward) -> std in the group and that of the yardstick; NaN where unknown."""
YARDSTICK: Pair = (-1, 0)
SAMPLES = 8
"""Most images of a row."""
LEFT, PANEL, BETWEEN = 1.1, 0.9, 0.16
"""Inches: labels of the rows, a panel of spread, the room before it."""
HEAD, PROMPT, TICKS, FOOT = 0.62, 0.24, 0.26, 0.26
"""Inches: title and headings, a prompt, the numbers below a block, the legend."""


class Block(NamedTuple):
    """Everything of one prompt; the last row is the yardstick's, noisy copies of one image.

    ``rows`` holds images; ``spread`` by reward the std in each row, NaN where scoring failed.
    """

    prompt_id: int
    prompt: str
    rows: list[list[bytes]]
    spread: dict[str, list[float]]


def branches_figure(
    branches: str | Path,
    profile: str | Path,
    pairs: Sequence[Sequence[int]],
    prompts: int,
    stem: str | Path,
    noise_fraction: float = 0.1,
    *,
    rewards: Sequence[str] | None = None,
) -> Figure:
    """Fig. 1a of the paper: samples that branch at one step, and how far their rewards differ.

    A block a prompt; in it a row for each pair and one for the noisy copies of one image, the
    yardstick. Up to 8 samples of the group stand beside the std of each reward in the group (gid
    "above:<reward>:<prompt id>" or "below:…", by the yardstick), whose axis a reward's panels
    share; the dashed line is the yardstick's ("yardstick:…").

    ``branches.parquet`` and ``entropy_profile.parquet`` are of the same groups; ``pairs`` are
    [step, span]; of ``prompts`` fewer stand there where fewer are kept (``profile.shown_prompts``).
    ``noise_fraction`` is the yardstick's; without ``rewards`` all of the profile are shown. Raises
    UserError if a file is missing or damaged, or lacks a pair or a reward.
    """
    if not pairs:
        raise UserError("branches: pairs must be [step, span], at least one; got []")
    wanted = [(step, span) for step, span in pairs]
    measured = _measured(profile)
    known = sorted({reward for *_, reward in measured})
    shown = list(known if rewards is None else rewards)
    lacking = [reward for reward in shown if reward not in known]
    if not shown or lacking:
        raise UserError(f"{profile}: holds no spread of {lacking[0] if lacking else 'any reward'}")
    images: dict[tuple[int, str], dict[Pair, list[bytes]]] = {}
    rows = read_table(branches, BRANCHES).to_pylist()
    for row in sorted(rows, key=lambda r: (r["prompt_id"], r["sample"])):
        of_prompt = images.setdefault((row["prompt_id"], row["prompt"]), {})
        of_prompt.setdefault((row["step"], row["span"]), []).append(row["png"])
    files = f"{branches}", f"{profile}"
    blocks = [
        _block(prompt, own, measured, wanted, shown, files)
        for prompt, own in list(images.items())[:prompts]
    ]
    if not blocks:
        raise UserError(f"{branches}: no image to show; profile.shown_prompts must be at least 1")
    labels = [
        f"SDE at step {step}" + (f",\n{span} steps merged" if span > 1 else "")
        for step, span in wanted
    ]
    labels.append(f"{noise_fraction:.0%} noise\n(yardstick)")
    with rc_context(FREE_STYLE):
        return save_figure(_draw(blocks, labels, Path(branches)), stem, dpi=FINE)


def _measured(path: str | Path) -> Measured:
    return {
        (row["prompt_id"], (row["step"], row["span"]), row["quantity"].removeprefix("reward:")): (
            math.nan if row["spread"] is None else row["spread"],
            math.nan if row["yardstick"] is None else row["yardstick"],
        )
        for row in read_table(path, ENTROPY_PROFILE).to_pylist()
        if row["quantity"].startswith("reward:")
    }


def _block(
    prompt: tuple[int, str],
    images: Mapping[Pair, list[bytes]],
    measured: Measured,
    pairs: Sequence[Pair],
    rewards: Sequence[str],
    files: tuple[str, str],
) -> Block:
    """What is shown of a prompt; refuses one that lacks a row of images or the spread beside it."""
    number, text = prompt
    for step, span in (pair for pair in (*pairs, YARDSTICK) if pair not in images):
        what = "the yardstick" if (step, span) == YARDSTICK else f"step {step}, span {span}"
        raise UserError(
            f"{files[0]}: holds no image of {what} for prompt {number}; add it to "
            "profile.shown, within the schedule"
        )
    spread = {}
    for reward in rewards:
        for step, span in (pair for pair in pairs if (number, pair, reward) not in measured):
            raise UserError(
                f"{files[1]}: holds no spread of {reward} at step {step}, span {span} for "
                f"prompt {number}; add the span to profile.spans"
            )
        own, (yardstick, *_) = zip(*(measured[number, pair, reward] for pair in pairs), strict=True)
        spread[reward] = [*own, yardstick]
    return Block(number, text, [images[p][:SAMPLES] for p in (*pairs, YARDSTICK)], spread)


def _draw(blocks: Sequence[Block], labels: Sequence[str], path: Path) -> Figure:
    """All blocks below each other; lengths in inches."""
    rewards = list(blocks[0].spread)
    count = max(len(row) for block in blocks for row in block.rows)
    first = decode_png(blocks[0].rows[0][0], path)
    beside = LEFT + len(rewards) * (PANEL + BETWEEN) + 2 * MARGIN
    room = min(0.9, max(0.54, (PAGE - beside) / count - GAP))
    across = cell_width(first, int(room * FINE))
    width, pitch = across / FINE + GAP, height_of(first, across) / FINE + GAP
    tall = PROMPT + len(labels) * pitch + TICKS
    canvas = Canvas(beside + count * width, HEAD + len(blocks) * tall + FOOT, FINE)
    head = {"fontsize": 8, "va": "baseline", "linespacing": 1.1}
    canvas.text(MARGIN, 0.24, "What a branch changes", va="bottom", fontsize=10.5, weight="bold")
    canvas.text(MARGIN + LEFT, HEAD - 0.07, "samples of one group", **head)
    for n, reward in enumerate(rewards):
        x = MARGIN + LEFT + count * width + n * (PANEL + BETWEEN) + BETWEEN
        values = [value for block in blocks for value in block.spread[reward]]
        limit = max([0.0, *filter(math.isfinite, values)]) * 1.08 or 1.0
        name = wrap(reward, PANEL + BETWEEN - GAP, measure=inches(8))
        canvas.text(x, HEAD - 0.07, f"std of\n{name}", **head)
        for k, block in enumerate(blocks):
            y = HEAD + k * tall + PROMPT - GAP / 2
            panel = canvas.axes(x, y, PANEL, len(labels) * pitch)
            _draw_spread(panel, block.spread[reward], f"{reward}:{block.prompt_id}", limit)
    for k, block in enumerate(blocks):
        _draw_images(canvas, block, labels, HEAD + k * tall, across, path)
    said = {"above": "spreads more than the yardstick", "below": "does not"}
    handles = [Line2D([], [], label=label, **_dot(kind)) for kind, label in said.items()]
    line = _dot("yardstick") | {"ls": "--", "color": INK, "lw": 1.1}
    handles.append(Line2D([], [], label="yardstick", **line))
    look: dict[str, Any] = {"fontsize": 8, "borderaxespad": 0.2, "handlelength": 3.0}
    look |= {"loc": "lower right", "bbox_to_anchor": (1.0, 0.0), "ncols": 3}
    canvas.figure.legend(handles=handles, **look)
    return canvas.figure


def _draw_images(
    canvas: Canvas, block: Block, labels: Sequence[str], y: float, across: int, path: Path
) -> None:
    """The prompt, and below it the images row by row behind their label."""
    prompt = wrap(block.prompt, canvas.width - 2 * MARGIN, 1, inches(8, style="italic"))
    canvas.text(MARGIN, y + PROMPT - 0.05, prompt, va="bottom", fontsize=8, style="italic")
    y += PROMPT
    for label, row in zip(labels, block.rows, strict=True):
        for sample, png in enumerate(row):
            image = decode_png(png, path)
            canvas.image(image, MARGIN + LEFT + sample * (across / FINE + GAP), y, across)
        height = height_of(image, across) / FINE
        canvas.text(MARGIN, y + height / 2, label, va="center", fontsize=8)
        y += height + GAP


def _draw_spread(axes: Axes, values: Sequence[float], name: str, limit: float) -> None:
    """A stem and a dot a row, beside the images; the yardstick across all rows."""
    *spread, yardstick = values
    axes.set(xlim=(0.0, limit), ylim=(len(spread) + 0.5, -0.5), yticks=[])
    axes.xaxis.set_major_locator(MaxNLocator(nbins=2))
    axes.tick_params(labelsize=7, pad=1.5, length=2)
    if math.isfinite(yardstick):
        axes.axvline(yardstick, color=INK, ls="--", lw=1.1, gid=f"yardstick:{name}", clip_on=False)
        axes.plot([yardstick], [len(spread)], **_dot("yardstick"))
    groups: Mapping[str, list[int]] = {
        "above": [i for i, v in enumerate(spread) if v > yardstick],
        "below": [i for i, v in enumerate(spread) if v <= yardstick],
        "alone": [i for i, v in enumerate(spread) if math.isfinite(v) and math.isnan(yardstick)],
    }
    for kind, at in groups.items():
        axes.hlines(at, 0.0, [spread[i] for i in at], color=PALETTE[0], lw=1.2)
        axes.plot([spread[i] for i in at], at, gid=f"{kind}:{name}", **_dot(kind))
    for i, value in enumerate(values):
        failed = not math.isfinite(value)
        place = 0.0 if failed else value / limit
        # two digits, and all before the point
        number = f"{value:#.2g}" if 0 < value < 10 else f"{value:.0f}"
        axes.annotate(
            "no score" if failed else number,
            (place * limit, i),
            xytext=(2 if place < 0.2 else 0, 4.5),
            textcoords="offset points",
            ha="left" if place < 0.2 else "right" if place > 0.8 else "center",
            fontsize=7,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.85},
        )


def _dot(kind: str) -> dict[str, Any]:
    """Full above the yardstick, hollow below it, gray without it, a diamond for itself."""
    face = {"above": PALETTE[0], "below": "white", "alone": "#BBBBBB", "yardstick": INK}[kind]
    own: dict[str, Any] = {"marker": "o", "ms": 5.5, "mec": PALETTE[0]}
    if kind == "yardstick":
        own = {"marker": "D", "ms": 4.5, "mec": INK}
    return own | {"ls": "none", "mfc": face, "mew": 1.2, "zorder": 4, "clip_on": False}
