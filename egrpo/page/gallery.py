"""The page's gallery: the same prompts and noise, run by run and iteration by iteration.

The images are those of the monitors. Their noise depends on prompt and sample alone, so a
difference between two of them is what training made.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from egrpo.config.keys import digest
from egrpo.config.models import RunConfig
from egrpo.config.prompts import read_prompts
from egrpo.errors import UserError, command
from egrpo.page.images import data_uri, open_grid, thumbnail
from egrpo.page.scored import Pixels, pixels_of, score_texts
from egrpo.report.text import counted, decimals
from egrpo.store.tables import TRAIN_METRICS, read_table
from egrpo.study.identity import TUNED
from egrpo.study.layout import Layout

MOST_ARMS, MOST_PROMPTS, MOST_REWARDS = 8, 8, 3
SMALL, ENLARGED, THUMBNAIL = 64, 96, 256
"""Pixels across: of images that are kept pixel by pixel, how large these are shown, and how large
others are kept at most."""
MOST_SMALL, MOST_LARGE = 1000, 480
"""Images on one page: up to 2 MB of small ones, 8 MB of photographs."""
POSITIONS = 7
"""Iterations that go before further samples."""

Grids = dict[int, Path]
"""Files of a run by iteration."""


def make_gallery(at: Layout, arms: Sequence[str]) -> dict[str, Any] | None:
    """What the template shows of the first run of each arm; None where none was monitored.

    Beside :func:`_frame` the base model and the runs as ``columns``, ``images`` as data URIs, each
    once, sentences on what is ``left_out``, and ``data`` for the page's script.

    Raises:
        UserError: if a grid, the metrics or the prompt file is missing or damaged.
    """
    firsts = [at.study.runs[at.arm(arm)[0]] for arm in arms]
    grids = {run.run: grids_of(at.run(run.run) / "monitor") for run in firsts}
    monitored = [run for run in firsts if grids[run.run]]
    if not monitored:
        return None
    kinds = [_comparable(run) for run in monitored]
    most = max(kinds, key=kinds.count)
    comparable = [run for run, kind in zip(monitored, kinds, strict=True) if kind == most]
    runs = comparable[:MOST_ARMS]
    files, train = runs[0].prompts, runs[0].train
    read = read_prompts(files.heldout, files.column)[: train.monitor_prompts]
    iterations = sorted({iteration for run in runs for iteration in grids[run.run]})
    frame = _frame(runs, iterations, [prompt.text for prompt in read])
    images: dict[str, int] = {}
    columns = _columns(frame, at, runs, grids, len(read), images)
    positions = [{k: c[k] for k in ("at", "values", "frames", "scores")} for c in columns]
    unseen = ", ".join(run.run for run in firsts if run not in monitored)
    others = ", ".join(run.run for run in monitored if run not in comparable)
    apart = "because base model, image size or monitors differ from these runs'"
    several = any(len(at.arm(run.arm)) > 1 for run in runs)
    said: list[tuple[object, str]] = [
        (unseen, f"Not monitored (train.monitor_every): {unseen}."),
        (others, f"Not shown, {apart}: {others}."),
        (comparable[MOST_ARMS:], f"Shown are the first {len(runs)} of {len(comparable)} arms."),
        (several, "Of an arm with several seeds the first is shown."),
    ]
    for what, shown, there in (
        ("prompts", len(frame["prompts"]), len(read)),
        ("samples of each prompt", frame["samples"], train.monitor_samples),
        ("iterations", len(frame["iterations"]), len(iterations)),
    ):
        said.append((shown < there, f"Shown are {shown} of {there} monitored {what}."))
    data = {"iterations": frame["iterations"], "images": list(images), "columns": positions}
    left_out = [text for holds, text in said if holds]
    return frame | {"columns": columns, "images": list(images), "left_out": left_out, "data": data}


def grids_of(folder: Path) -> Grids:
    """The monitors' images of a run by iteration; nothing where it was not monitored."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; `{command((), folder)}` makes it")
    found = {path.stem.removeprefix("iteration-"): path for path in folder.glob("iteration-*.png")}
    return {int(number): path for number, path in found.items() if number.isdecimal()}


def _comparable(run: RunConfig) -> str:
    """Equal for runs whose monitors started from the same model and noise."""
    settings = {
        "model": run.model.model_dump(exclude=set(TUNED)),
        "schedule": run.schedule.model_dump(),
        "steps": run.evaluate.steps,
        "prompts": [run.prompts.heldout, run.prompts.column],
        "monitors": run.train.model_dump(include={"monitor_prompts", "monitor_samples"}),
    }
    return digest(settings)


def _frame(
    runs: Sequence[RunConfig], every: Sequence[int], prompts: Sequence[str]
) -> dict[str, Any]:
    """What is shown of these iterations, as far as a page bears it: ``iterations``, the positions
    of the slider; ``prompts`` and ``samples``; ``rewards``, and what their means are ``over``;
    ``width`` and ``height`` of an image, kept pixel by pixel if ``small``."""
    train, width, height = runs[0].train, runs[0].model.width, runs[0].model.height
    small = max(width, height) <= SMALL
    rows = min(len(prompts), MOST_PROMPTS)
    most = (MOST_SMALL if small else MOST_LARGE) // (rows * len(runs))
    samples = min(max(most // min(len(every), POSITIONS), 1), train.monitor_samples)
    scale = max(1, ENLARGED // width) if small else min(1.0, THUMBNAIL / max(width, height))
    return {
        "iterations": _spread(every, max(most // samples, 2)),
        "prompts": list(prompts[:rows]),
        "samples": samples,
        "over": counted(len(prompts), "monitored prompt", train.monitor_samples),
        "rewards": list(dict.fromkeys(r for run in runs for r in run.train.rewards))[:MOST_REWARDS],
        "width": round(width * scale),
        "height": round(height * scale),
        "small": small,
    }


def _spread(values: Sequence[int], count: int) -> list[int]:
    """At most ``count`` of the values, evenly, with both ends."""
    last = len(values) - 1
    if count > last:
        return list(values)
    return [values[round(i * last / (count - 1))] for i in range(count)]


def _columns(
    frame: Mapping[str, Any],
    at: Layout,
    runs: Sequence[RunConfig],
    grids: Mapping[str, Grids],
    monitored: int,
    images: dict[str, int],
) -> list[dict[str, Any]]:
    """The base model, which has no method, and the runs: by position of the slider the iteration
    shown, texts of the mean rewards, and by prompt and sample the indices of ``images``, and texts
    of the image's ``scores``, empty where it has none."""
    shown = {run.run: [_latest(grids[run.run], i) for i in frame["iterations"]] for run in runs}
    texts = _texts(at, shown, frame["rewards"])
    base = runs[0].run
    folders = at.base(base), *(at.run(run.run) for run in runs)
    scored = score_texts(folders, frame["prompts"], frame["samples"], frame["rewards"])
    models = [("base", "", base, [min(grids[base])])]  # 0, before anything was trained
    models += [(run.run, run.method.name, run.run, shown[run.run]) for run in runs]
    columns: list[dict[str, Any]] = []
    for name, method, source, own in models:
        files = {i: grids[source][i] for i in own}
        cut = {i: _cut(path, runs[0], monitored, frame, images) for i, path in files.items()}
        column = {"name": name, "method": method, "at": own}
        column["values"] = [texts[source][i] for i in own]
        column["frames"] = [[[index for index, _ in row] for row in cut[i]] for i in own]
        column["scores"] = [[[scored.get(p, "") for _, p in row] for row in cut[i]] for i in own]
        columns.append(column)
    return columns


def _latest(grids: Grids, wanted: int) -> int:
    """The latest iteration until ``wanted``, or the first."""
    return max((i for i in grids if i <= wanted), default=min(grids))


def _cut(
    path: Path, run: RunConfig, monitored: int, frame: Mapping[str, Any], images: dict[str, int]
) -> list[list[tuple[int, Pixels]]]:
    """Indices of a grid's images by prompt and sample, and what each is; new ones are added to
    ``images``."""
    width, height = run.model.width, run.model.height
    size = monitored * width, run.train.monitor_samples * height
    grid = open_grid(path)
    if grid.size != size:
        raise UserError(
            f"{path}: is {grid.width} x {grid.height} pixels, and the run's settings make "
            f"{size[0]} x {size[1]}; delete it and run again"
        )

    def image(row: int, sample: int) -> tuple[int, Pixels]:
        left, top = row * width, sample * height
        tile = grid.crop((left, top, left + width, top + height))
        small = frame["small"]
        uri = data_uri(tile, "PNG", optimize=True) if small else thumbnail(tile, THUMBNAIL)
        return images.setdefault(uri, len(images)), (row, sample, pixels_of(tile))

    rows, samples = range(len(frame["prompts"])), range(frame["samples"])
    return [[image(row, sample) for sample in samples] for row in rows]


def _texts(
    at: Layout, shown: Mapping[str, Sequence[int]], rewards: Sequence[str]
) -> dict[str, dict[int, list[str]]]:
    """By run and iteration the mean monitored rewards as text: three digits of what a reward spans
    over all that is shown, a dash where there is none."""
    out: dict[str, dict[int, list[str]]] = {run: {i: [] for i in own} for run, own in shown.items()}
    found: dict[tuple[str, int, str], float] = {}
    for run in shown:
        rows = read_table(at.run(run) / "metrics.parquet", TRAIN_METRICS).to_pylist()
        values = {(run, r["iteration"], r["metric"]): r["value"] for r in rows}
        found |= {key: v for key, v in values.items() if v is not None and not math.isnan(v)}
    for reward in rewards:
        name = f"monitor/reward/{reward}"
        cells = {(run, i): found.get((run, i, name)) for run, own in out.items() for i in own}
        finite = [v for v in cells.values() if v is not None]
        digits = decimals(min(finite), max(finite)) + 1 if finite else 0
        for (run, i), v in cells.items():
            out[run][i].append("-" if v is None else f"{v:.{digits}f}")
    return out
