"""The comparison of trained runs with their base model, as Parquet, CSV and Markdown.

Scores are paired by prompt and sample: both models drew that image from the same noise. Intervals
resample prompts (:mod:`egrpo.core.bootstrap`). Beside the rewards stand two early signs of reward
hacking: ``diversity`` and ``distance_to_base``.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from egrpo.config.load import load_run
from egrpo.config.models import RunConfig
from egrpo.core.bootstrap import paired_interval
from egrpo.errors import UserError
from egrpo.page.render import escaped, write_texts
from egrpo.store.files import read_json
from egrpo.store.tables import COMPARISON, IMAGES, SCORES, read_table, write_table
from egrpo.study.keys import digest, run_key
from egrpo.train.warnings import warnings_in

Row = dict[str, Any]
Key = tuple[int, int, str]
"""(prompt id, sample, prompt): the same prompt id must also mean the same text."""
Pixels = npt.NDArray[np.float32]

TRAIN_KEYS = ("iterations", "nfe_forward", "nfe_train", "nfe_reference", "seconds")
MEASURED = ("diversity", "distance_to_base")
"""Rows of the comparison that are measured on the images instead of scored by a reward."""

HOW_TO_READ = (
    "Held-out prompts, paired by prompt and sample. In brackets: 95% interval of the "
    "difference, bootstrap over prompts. It holds for this trained model; how much another "
    "training seed would differ needs runs with other seeds. Rewards that a run was trained "
    "on are bold. diversity: mean RMS pixel distance between the samples of one prompt; "
    "distance_to_base: mean RMS pixel distance to the base model's image of the same prompt "
    "and noise; both in [0, 1]."
)
"""What a reader of the comparison must know."""


@dataclass(frozen=True)
class RunFiles:
    """What the comparison reads of one run: its settings and results, and those of its base."""

    config: RunConfig
    scores: Path
    images: Path
    base_scores: Path
    base_images: Path
    train: Path
    metrics: Path

    @classmethod
    def at(cls, run: str | Path, base: str | Path) -> RunFiles:
        """The files of ``runs/<run>`` and ``base/<key>`` under their usual names."""
        run, base = Path(run), Path(base)
        return cls(
            config=load_run(run / "config.yaml"),
            scores=run / "scores.parquet",
            images=run / "images.parquet",
            base_scores=base / "scores.parquet",
            base_images=base / "images.parquet",
            train=run / "train.json",
            metrics=run / "train_metrics.parquet",
        )


def make_comparison(runs: Mapping[str, RunFiles], output: str | Path) -> None:
    """Write the comparison as Parquet to ``output``, and CSV, Markdown and HTML beside it.

    Args:
        runs: files by run id; rows keep this order in CSV and Markdown.
        output: the Parquet file; its folder is made if missing.

    Raises:
        UserError: if a file is missing or damaged, or if trained and base results are not of the
            same prompts, samples, rewards and image size.
    """
    if not runs:
        raise UserError("comparison: no run is given; the runs table needs at least one")
    rows = [row for run, files in runs.items() for row in compare_run(run, files)]
    path = Path(output)
    settings = {run: run_key(files.config) for run, files in runs.items()}
    metadata = {"config_hash": digest(settings), "interval_level": "0.95"}
    write_table(path, COMPARISON, rows, metadata=metadata)
    write_texts(path, COMPARISON, rows, markdown(rows))


def compare_run(run: str, files: RunFiles) -> list[Row]:
    """Rows of COMPARISON of one run: trained rewards, other rewards, then the measured rows."""
    config = files.config
    train = train_record(files.train)
    common = {
        "run": run,
        "method": config.method.name,
        "iterations": train["iterations"],
        "nfe": evaluations(train),
        "seconds": train["seconds"],
        "warnings": "; ".join(warnings_in(files.metrics, config).values()) or None,
    }
    pairs = {**_paired_scores(files), **_paired_images(files)}
    on = config.train.rewards
    rows = []
    for name in sorted(pairs, key=lambda n: (n in MEASURED, n not in on, n)):
        base, trained, prompts = pairs[name]
        interval = asdict(
            paired_interval(
                base, trained, prompts, resamples=config.evaluate.bootstrap, seed=config.seed
            )
        )
        interval["base"] = interval.pop("mean_base")
        interval["trained"] = interval.pop("mean_trained")
        nulled = {k: None if v != v else v for k, v in interval.items()}  # NaN travels as null
        rows.append({**common, "reward": name, "trained_on": name in on, **nulled})
    return rows


Paired = dict[str, tuple[Sequence[float], Sequence[float], Sequence[int]]]
"""Name -> (base values, trained values, prompt ids), all [n]."""


def _paired_scores(files: RunFiles) -> Paired:
    base, trained = read_scores(files.base_scores), read_scores(files.scores)
    if set(base) != set(trained):
        raise UserError(
            f"{files.scores}: rewards {', '.join(sorted(trained))}, but {files.base_scores} has "
            f"{', '.join(sorted(base))}; evaluate both again with the same rewards"
        )
    out: Paired = {}
    for reward, values in trained.items():
        keys = same_keys(base[reward], values, files.base_scores, files.scores)
        before = base[reward]
        out[reward] = [before[k] for k in keys], [values[k] for k in keys], [k[0] for k in keys]
    return out


def read_scores(path: Path) -> dict[str, dict[Key, float]]:
    """Scores by reward and by (prompt id, sample, prompt); NaN where scoring failed."""
    out = scores_of(read_table(path, SCORES).to_pylist(), path)
    if not out:
        raise UserError(f"{path}: holds no score; delete it and run again")
    return out


def scores_of(rows: Iterable[Row], path: Path) -> dict[str, dict[Key, float]]:
    """Scores by reward and key from rows with the columns of SCORES; ``path`` for messages."""
    out: dict[str, dict[Key, float]] = {}
    for row in rows:
        scores = out.setdefault(row["reward"], {})
        key = (row["prompt_id"], row["sample"], row["prompt"])
        if key in scores:
            raise UserError(
                f"{path}: prompt {key[0]}, sample {key[1]}, reward {row['reward']!r} occurs twice; "
                "delete the file and run again"
            )
        scores[key] = math.nan if row["value"] is None else row["value"]
    return out


def same_keys(base: Iterable[Key], trained: Iterable[Key], at: Path, other: Path) -> list[Key]:
    """Sorted keys that both sides have; UserError where one side has another."""
    mine, theirs = set(base), set(trained)
    different = sorted(mine ^ theirs)
    if different:
        prompt_id, sample, prompt = different[0]
        where, lacking = (at, other) if different[0] in mine else (other, at)
        raise UserError(
            f"{where}: prompt {prompt_id} ({prompt!r}), sample {sample} is missing from {lacking}; "
            "trained and base model must be evaluated on the same prompts and samples"
        )
    return sorted(mine)


def _paired_images(files: RunFiles) -> Paired:
    """``diversity``, one pair a prompt, and ``distance_to_base``, one pair an image.

    NaN where images are none.
    """
    base, trained = read_images(files.base_images), read_images(files.images)
    keys = same_keys(base, trained, files.base_images, files.images)
    by_prompt: dict[int, list[Key]] = {}
    for key in keys:
        by_prompt.setdefault(key[0], []).append(key)
    distance: list[float] = []
    spreads: dict[int, tuple[float, float]] = {}
    for prompt, group in by_prompt.items():  # prompt by prompt: large images need not all fit
        before = [measurable(base[k], files.base_images) for k in group]
        after = [measurable(trained[k], files.images) for k in group]
        shapes = {image.shape for image in before + after}
        if len(shapes) > 1:
            raise UserError(
                f"{files.images}: images of prompt {prompt} differ in size from each other or from "
                f"{files.base_images}; evaluate both again"
            )
        distance += [rms(a, b) for a, b in zip(after, before, strict=True)]
        if len(group) > 1:
            spreads[prompt] = diversity(before), diversity(after)
    out: Paired = {"distance_to_base": ([0.0] * len(keys), distance, [k[0] for k in keys])}
    if spreads:
        first, second = zip(*spreads.values(), strict=True)
        out["diversity"] = first, second, list(spreads)
    return out


def read_images(path: Path) -> dict[Key, bytes]:
    """PNG files by (prompt id, sample, prompt)."""
    return {
        (row["prompt_id"], row["sample"], row["prompt"]): row["png"]
        for row in read_table(path, IMAGES).to_pylist()
    }


def decode_png(png: bytes, path: Path) -> Pixels:
    """Pixels to look at in [0, 1], float32 [h, w, 3]; of what is no image a grey cross.

    Raises:
        UserError: naming ``path`` if the PNG is damaged.
    """
    return _rgba(png, path)[..., :3]


def measurable(png: bytes, path: Path) -> Pixels:
    """The same to measure: NaN where there is no image, which is transparent all over."""
    pixels = _rgba(png, path)
    return pixels[..., :3] if pixels[..., 3].any() else np.full_like(pixels[..., :3], np.nan)


def is_image(png: bytes, path: Path) -> bool:
    """Whether a PNG of ours holds an image."""
    return bool(_rgba(png, path)[..., 3].any())


def _rgba(png: bytes, path: Path) -> Pixels:
    try:
        image = Image.open(io.BytesIO(png)).convert("RGBA")
    except (UnidentifiedImageError, OSError):
        raise UserError(f"{path}: holds a damaged image; delete it and run again") from None
    return np.asarray(image, dtype=np.float32) / np.float32(255.0)


def rms(first: Pixels, second: Pixels) -> float:
    """Root mean square difference over pixels and channels, in [0, 1]."""
    return float(np.sqrt(np.mean((first - second) ** 2, dtype=np.float64)))


def diversity(images: Sequence[Pixels]) -> float:
    """Mean RMS distance over all pairs, in [0, 1]; NaN of fewer than two that are images."""
    there = [image for image in images if np.isfinite(image).all()]
    pairs = [rms(a, b) for a, b in combinations(there, 2)]
    return float(np.mean(pairs)) if pairs else math.nan


def train_record(path: Path) -> Mapping[str, Any]:
    """What training spent, from ``train.json``."""
    record = read_json(path)
    missing = [key for key in TRAIN_KEYS if key not in record]
    if missing:
        raise UserError(f"{path}: has no {missing[0]!r}; delete it and run the training again")
    return record


def evaluations(train: Mapping[str, Any]) -> int:
    """Network evaluations of a training: forward, forward+backward and reference passes."""
    return int(train["nfe_forward"] + train["nfe_train"] + train["nfe_reference"])


def decimals(low: float | None, high: float | None) -> int:
    """Decimals that show two digits of an interval's width; 4 where there is none."""
    width = 0.0 if low is None or high is None else high - low
    return min(max(1 - math.floor(math.log10(width)), 0), 6) if width > 0 else 4


def readable(row: Row) -> Row:
    """Text of a row's numbers, rounded to two digits of the width of its interval.

    Returns:
        ``base``, ``trained``, ``difference``, ``interval``, ``nfe``, ``seconds``; a dash where a
        number is missing.
    """
    low, high = row["low"], row["high"]
    digits = decimals(low, high)

    def text(value: float | None, sign: str = "") -> str:
        return "-" if value is None else f"{value:{sign}.{digits}f}"

    return {
        "base": text(row["base"]),
        "trained": text(row["trained"]),
        "difference": text(row["difference"], "+"),
        "interval": "-" if low is None else f"[{text(low, '+')}, {text(high, '+')}]",
        "nfe": f"{row['nfe']:,}",
        "seconds": f"{row['seconds']:,.0f}",
    }


def warning_lines(rows: Iterable[Row]) -> list[str]:
    """One line for each run whose training had something wrong."""
    found = {r["run"]: r["warnings"] for r in rows if r["warnings"]}
    return [f"{run}: warning: {text}" for run, text in found.items()]


def markdown(rows: Sequence[Row]) -> str:
    """The comparison as a Markdown table with what a reader must know above it."""
    warned = [f"- {escaped(line)}" for line in warning_lines(rows)]
    lines = [
        "# Trained runs against their base model",
        "",
        HOW_TO_READ,
        "",
        *([*warned, ""] if warned else []),
        "| run | method | reward | base | trained | difference | 95% over prompts | pairs | failed "
        "| iterations | network evaluations | seconds |",
        "|---|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        t = readable(row)
        reward = str(row["reward"]).replace("|", "\\|")
        reward = f"**{reward}**" if row["trained_on"] else reward
        cells = [
            row["run"],
            row["method"],
            reward,
            t["base"],
            t["trained"],
            t["difference"],
            t["interval"],
            row["pairs"],
            row["invalid"],
            row["iterations"],
            t["nfe"],
            t["seconds"],
        ]
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(lines) + "\n"
