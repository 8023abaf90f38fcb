"""The page's gallery: the same prompts and noise, run by run and iteration by iteration.

The images are those of the monitors. Their noise depends on prompt and sample alone, so a
difference between two of them is what training made.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from egrpo.config.keys import digest
from egrpo.config.models import RunConfig
from egrpo.config.prompts import read_prompts
from egrpo.errors import UserError, command
from egrpo.page.images import data_uri, open_grid, thumbnail
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


@dataclass(frozen=True)
class Column:
    """One model of the gallery; lists are by position of the slider.

    Attributes:
        name, method: of the run; the base model has no method.
        at: the iteration shown.
        values: its mean monitored rewards as text, by reward.
        frames: index of the image, by prompt and sample.
    """

    name: str
    method: str
    at: list[int]
    values: list[list[str]]
    frames: list[list[list[int]]]


@dataclass
class Gallery:
    """What the template shows.

    Attributes:
        iterations: positions of the slider.
        prompts, samples: rows, and how many images each has of a model.
        monitored: prompts, and samples of each, that the mean rewards are over.
        rewards: names of the monitored rewards that are shown.
        width, height: of the image elements in pixels.
        small: whether images are kept pixel by pixel.
        columns: the base model, then the runs.
        images: data URIs, each once.
        left_out: sentences on what is not shown.
    """

    iterations: list[int]
    prompts: list[str]
    samples: int
    monitored: tuple[int, int]
    rewards: list[str]
    width: int
    height: int
    small: bool
    columns: list[Column] = field(default_factory=list)
    images: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    @property
    def over(self) -> str:
        """What the mean rewards are over, in words."""
        prompts, samples = self.monitored
        return counted(prompts, "monitored prompt", samples)

    @property
    def data(self) -> dict[str, Any]:
        """What the page's script needs."""
        columns = [{"at": c.at, "values": c.values, "frames": c.frames} for c in self.columns]
        return {"iterations": self.iterations, "images": self.images, "columns": columns}


def make_gallery(at: Layout, arms: Sequence[str]) -> Gallery | None:
    """The gallery of the first run of each arm; None where none was monitored.

    Args:
        at: the study and where its results lie.
        arms: in the order of the columns.

    Raises:
        UserError: if a grid, the metrics or the prompt file is missing or damaged.
    """
    firsts = [at.study.runs[at.arm(arm)[0]] for arm in arms]
    found = {run.run: grids_of(at.run(run.run) / "monitor") for run in firsts}
    monitored = [run for run in firsts if found[run.run]]
    if not monitored:
        return None
    alike: dict[str, list[RunConfig]] = {}
    for run in monitored:
        alike.setdefault(_comparable(run), []).append(run)
    comparable = max(alike.values(), key=len)
    runs = comparable[:MOST_ARMS]
    grids = {run.run: found[run.run] for run in runs}
    files, train = runs[0].prompts, runs[0].train
    prompts = read_prompts(files.heldout, files.column)[: train.monitor_prompts]
    gallery = _empty(runs, grids, [prompt.text for prompt in prompts])
    _fill(gallery, at, runs, grids, len(prompts))
    iterations = {iteration for own in grids.values() for iteration in own}
    unseen = [run.run for run in firsts if run not in monitored]
    others = [run.run for run in monitored if run not in comparable]
    apart = "because base model, image size or monitors differ from these runs'"
    several = any(len(at.arm(run.arm)) > 1 for run in runs)
    fewer = len(runs) < len(comparable)
    said: list[tuple[object, str]] = [
        (unseen, f"Not monitored (train.monitor_every): {', '.join(unseen)}."),
        (others, f"Not shown, {apart}: {', '.join(others)}."),
        (fewer, f"Shown are the first {len(runs)} of {len(comparable)} arms."),
        (several, "Of an arm with several seeds the first is shown."),
    ]
    for what, shown, there in (
        ("prompts", len(gallery.prompts), gallery.monitored[0]),
        ("samples of each prompt", gallery.samples, gallery.monitored[1]),
        ("iterations", len(gallery.iterations), len(iterations)),
    ):
        said.append((shown < there, f"Shown are {shown} of {there} monitored {what}."))
    gallery.left_out = [text for holds, text in said if holds]
    return gallery


def _empty(
    runs: Sequence[RunConfig], grids: Mapping[str, Grids], prompts: Sequence[str]
) -> Gallery:
    """What is shown, as far as a page bears it, still without images."""
    train, width, height = runs[0].train, runs[0].model.width, runs[0].model.height
    every = sorted({iteration for own in grids.values() for iteration in own})
    small = max(width, height) <= SMALL
    rows = min(len(prompts), MOST_PROMPTS)
    most = (MOST_SMALL if small else MOST_LARGE) // (rows * len(runs))
    samples = min(max(most // min(len(every), POSITIONS), 1), train.monitor_samples)
    scale = max(1, ENLARGED // width) if small else min(1.0, THUMBNAIL / max(width, height))
    rewards = list(dict.fromkeys(name for run in runs for name in run.train.rewards))
    return Gallery(
        iterations=_spread(every, max(most // samples, 2)),
        prompts=list(prompts[:rows]),
        samples=samples,
        monitored=(len(prompts), train.monitor_samples),
        rewards=rewards[:MOST_REWARDS],
        width=round(width * scale),
        height=round(height * scale),
        small=small,
    )


def _fill(
    gallery: Gallery,
    at: Layout,
    runs: Sequence[RunConfig],
    grids: Mapping[str, Grids],
    prompts: int,
) -> None:
    """Add the columns; ``prompts`` are those that were monitored."""
    cutter = _Cutter(runs[0], prompts, gallery)
    shown = {run.run: _shown(grids[run.run], gallery.iterations) for run in runs}
    texts = _texts(at, shown, gallery.rewards)
    first, start = runs[0].run, min(grids[runs[0].run])  # 0, before anything was trained
    columns = [("base", "", first, [start])]
    columns += [(run.run, run.method.name, run.run, shown[run.run]) for run in runs]
    for name, method, source, iterations in columns:
        cut = {i: cutter.cut(grids[source][i]) for i in dict.fromkeys(iterations)}
        values = [texts[source][i] for i in iterations]
        gallery.columns.append(
            Column(name, method, iterations, values, [cut[i] for i in iterations])
        )
    gallery.images = list(cutter.images)


def grids_of(folder: Path) -> Grids:
    """The monitors' images of a run by iteration; nothing where it was not monitored.

    Raises:
        UserError: if there is no such folder.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; `{command((), folder)}` makes it")
    found = {path.stem.removeprefix("iteration-"): path for path in folder.glob("iteration-*.png")}
    return {int(number): path for number, path in found.items() if number.isdecimal()}


def _comparable(run: RunConfig) -> str:
    """Equal for runs whose monitors started from the same model and noise."""
    monitors = {"monitor_prompts", "monitor_samples"}
    settings = {
        "model": run.model.model_dump(exclude=set(TUNED)),
        "schedule": run.schedule.model_dump(),
        "steps": run.evaluate.steps,
        "prompts": [run.prompts.heldout, run.prompts.column],
        "monitors": run.train.model_dump(include=monitors),
    }
    return digest(settings)


def _spread(values: Sequence[int], count: int) -> list[int]:
    """At most ``count`` of the values, evenly, with both ends."""
    last = len(values) - 1
    if count > last:
        return list(values)
    return [values[round(i * last / (count - 1))] for i in range(count)]


def _shown(grids: Iterable[int], iterations: Iterable[int]) -> list[int]:
    """The run's latest iteration at or before each of ``iterations``; its first where none is."""
    own = sorted(grids)
    return [max((i for i in own if i <= wanted), default=own[0]) for wanted in iterations]


class _Cutter:
    """Cuts grids into the images that are shown; equal ones are kept once."""

    def __init__(self, run: RunConfig, prompts: int, gallery: Gallery):
        self.width, self.height, self.gallery = run.model.width, run.model.height, gallery
        self.size = prompts * self.width, run.train.monitor_samples * self.height
        self.images: dict[str, int] = {}

    def cut(self, path: Path) -> list[list[int]]:
        """Indices of a grid's images by prompt and sample.

        Raises:
            UserError: if it is damaged or of another size than the settings say.
        """
        grid = open_grid(path)
        if grid.size != self.size:
            raise UserError(
                f"{path}: is {grid.width} x {grid.height} pixels, and the run's settings make "
                f"{self.size[0]} x {self.size[1]}; delete it and run again"
            )
        rows, samples = range(len(self.gallery.prompts)), range(self.gallery.samples)
        return [[self._index(grid, prompt, sample) for sample in samples] for prompt in rows]

    def _index(self, grid: Image.Image, prompt: int, sample: int) -> int:
        left, top = prompt * self.width, sample * self.height
        tile = grid.crop((left, top, left + self.width, top + self.height))
        small = self.gallery.small
        uri = data_uri(tile, "PNG", optimize=True) if small else thumbnail(tile, THUMBNAIL)
        return self.images.setdefault(uri, len(self.images))


def _texts(
    at: Layout, shown: Mapping[str, Sequence[int]], rewards: Sequence[str]
) -> dict[str, dict[int, list[str]]]:
    """By run and iteration the mean monitored rewards as text: three digits of what a reward spans
    over all that is shown, a dash where there is none."""
    found: dict[str, dict[tuple[int, str], float]] = {}
    for run in shown:
        rows = read_table(at.run(run) / "metrics.parquet", TRAIN_METRICS).to_pylist()
        found[run] = {(r["iteration"], r["metric"]): r["value"] for r in rows}
    out: dict[str, dict[int, list[str]]] = {run: {i: [] for i in own} for run, own in shown.items()}
    for reward in rewards:
        name = f"monitor/reward/{reward}"
        values = {(run, i): found[run].get((i, name)) for run, own in out.items() for i in own}
        finite = [v for v in values.values() if v is not None and v == v]
        digits = decimals(min(finite), max(finite)) + 1 if finite else 0
        for (run, i), v in values.items():
            out[run][i].append("-" if v is None or v != v else f"{v:.{digits}f}")
    return out
