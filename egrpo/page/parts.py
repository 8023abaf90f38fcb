"""What stands on a study's page: each part read from its results, ready for the template."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from egrpo.config.models import TableSpec
from egrpo.core.plan import Plan
from egrpo.errors import UserError
from egrpo.page.images import open_grid, thumbnail, uri
from egrpo.planning.plan import load_plan
from egrpo.planning.trees import learning_rate, needs_plan
from egrpo.report.report import by_run, verdict
from egrpo.report.results_text import costs, counted, failures, how_to_read, numbers, times
from egrpo.report.tables import MEASURED, Row, evaluations, readable, train_record
from egrpo.store.tables import MERGE_PLAN, RESULTS, metadata_of, read_table
from egrpo.study.layout import Layout, command
from egrpo.study.targets import BASE

LARGE = 500_000
"""Bytes: a figure beyond them is one of photographs, which WebP holds in a tenth."""
WIDE = 2000
"""Pixels across that such a figure keeps."""
MEASURES = {
    "exp_per_dim": "exp(h/d) in latent units",
    "nats_per_dim": "h/d in nats per dimension",
    "variance": "(std/a)²",
}
"""Units of entropy in words."""


@dataclass(frozen=True)
class Picture:
    """A figure: its data URI, what it shows, and whether it is drawn of lines alone."""

    uri: str
    caption: str
    lines: bool


def picture(stem: Path, kind: str, caption: str = "") -> Picture:
    """The smaller of a figure's SVG and PNG; one with large images as WebP.

    Args:
        stem: path without ending.
        kind: as in ``FigureSpec``.
        caption: what it shows; empty where the template says it.

    Raises:
        UserError: if there is neither.
    """
    files = [path for ending in (".svg", ".png") if (path := stem.with_suffix(ending)).is_file()]
    if not files:
        wanted = f"{stem}.png"
        raise UserError(f"{wanted}: no such figure; `{command((), wanted)}` makes it")
    file = min(files, key=lambda path: path.stat().st_size)
    png, lines = stem.with_suffix(".png"), kind not in ("branches", "images")
    if file.stat().st_size > LARGE and png in files:
        return Picture(thumbnail(open_grid(png), WIDE), caption, lines)
    content = "image/svg+xml" if file.suffix == ".svg" else "image/png"
    return Picture(uri(file.read_bytes(), content), caption, lines)


# --- against the base model -----------------------------------------------------------------------


def outcome(row: Row) -> str:
    """``better``, ``worse`` or ``open``: which side of 0 the interval of a difference lies on."""
    low, high = row["low"], row["high"]
    if low is None or low <= 0 <= high:
        return "open"
    return "better" if low > 0 else "worse"


def _bars(rows: Iterable[Row]) -> dict[str, float]:
    """By reward, what half the width of a bar stands for: the same in all rows of the page."""
    reach: dict[str, float] = {}
    for row in rows:
        ends = [abs(row[key]) for key in ("low", "high", "difference") if row[key] is not None]
        reach[row["reward"]] = max([reach.get(row["reward"], 0.0), *ends])
    return reach


def _view(row: Row, reach: dict[str, float]) -> Row:
    """A row with its texts (``text``), outcome, and the ends of its bar in percent."""
    whole = reach[row["reward"]]
    bar = None
    if row["low"] is not None and whole > 0:
        ends = (row["low"], row["high"], row["difference"])
        bar = [round(50 + 48 * value / whole, 2) for value in ends]
    measured = row["reward"] in MEASURED
    result = "measured" if measured else outcome(row)
    return {**row, "text": readable(row), "outcome": result, "bar": bar, "measured": measured}


def verdict_views(rows: Sequence[Row], at: Layout) -> list[Row]:
    """Rows of the trained rewards with what they say, and of how many images."""
    reach = _bars(rows)
    return [
        {**_view(row, reach), "says": verdict(row), "over": _over(row, at)}
        for row in rows
        if row["trained_on"]
    ]


def _over(row: Row, at: Layout) -> str:
    """How many images a row's means are over, those included whose scoring failed."""
    samples = at.study.runs[row["run"]].evaluate.samples
    return counted((row["pairs"] + row["invalid"]) // samples, "held-out prompt", samples)


def comparison(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """Rows of each run below its heading."""
    reach = _bars(rows)
    return [(heading, [_view(row, reach) for row in part]) for heading, part in by_run(rows)]


# --- plans ----------------------------------------------------------------------------------------


def plan_views(at: Layout) -> list[dict[str, Any]]:
    """Each plan once, with the runs that have it.

    Raises:
        UserError: if a plan or its table is missing or damaged.
    """
    runs: dict[Plan, list[str]] = {}
    for name, run in at.study.runs.items():
        if needs_plan(run):
            runs.setdefault(load_plan(at.run(name) / "plan.json"), []).append(name)
    views = []
    for plan, names in runs.items():
        rows = read_table(at.run(names[0]) / "merge_plan.parquet", MERGE_PLAN).to_pylist()
        views.append(
            {
                "names": _arms(names, at),
                "steps": plan.steps,
                "rows": sorted(rows, key=lambda row: row["step"]),
                "threshold": plan.threshold,
                "measure": MEASURES[plan.measure],
                "warnings": plan.warnings,
                "samples": dict(zip(plan.active, plan.samples or (), strict=False)),
            }
        )
    return views


def _arms(runs: Sequence[str], at: Layout) -> list[str]:
    """Arms of runs; a run whose arm has no other goes by its own name."""
    arms = [at.study.runs[run].arm for run in runs]
    named = [arm if len(at.arm(arm)) > 1 else run for arm, run in zip(arms, runs, strict=True)]
    return list(dict.fromkeys(named))


# --- tables ---------------------------------------------------------------------------------------


def result_view(name: str, spec: TableSpec, at: Layout) -> dict[str, Any]:
    """One table of results: times of the comparison, sections, arms.

    Raises:
        UserError: if the table is missing, damaged or lacks an arm or reward.
    """
    path = at.table(name)
    data = read_table(path, RESULTS)
    rows = data.to_pylist()
    head = metadata_of(data)
    parts = [
        {
            "title": title,
            "note": note,
            "sections": [
                _section(path, heading, spec, [r for r in rows if (r["at"], r["section"]) == key])
                for heading in spec.sections
                for key in [(when, heading)]
            ],
        }
        for when, (title, note) in times(spec).items()
    ]
    words = {"base": "base", "best": "Bold", "second": "underlined", "trained": "*"}
    return {
        "name": name,
        "caption": spec.caption,
        "how": how_to_read(rows, **words),
        "rewards": spec.rewards,
        "parts": parts,
        "commit": head.get("git_commit", ""),
        "config_hash": head.get("config_hash", ""),
    }


def _section(path: Path, heading: str, spec: TableSpec, rows: Sequence[Row]) -> dict[str, Any]:
    arms = []
    for arm in (BASE, *spec.sections[heading]):
        found = {row["reward"]: row for row in rows if row["arm"] == arm}
        lacking = [reward for reward in spec.rewards if reward not in found]
        if lacking:
            raise UserError(
                f"{path}: section {heading!r} has no {lacking[0]} of {arm}; delete it and run again"
            )
        cells = [
            {**found[reward], "number": mean, "interval": interval}
            for reward in spec.rewards
            for mean, interval in [numbers(found[reward])]
        ]
        first = cells[0]
        arms.append({"arm": arm, "method": first["method"], "cells": cells, "costs": costs(first)})
    return {"heading": heading, "arms": arms, "failures": failures(rows)}


# --- settings -------------------------------------------------------------------------------------


def settings_rows(at: Layout) -> list[dict[str, Any]]:
    """What matters of each run's settings, and what its training cost.

    Raises:
        UserError: if a run's ``train.json`` is missing or damaged.
    """
    rows = []
    for name, run in at.study.runs.items():
        train = train_record(at.run(name) / "train.json")
        model = run.model
        stopped = train.get("stopped") or {}
        rows.append(
            {
                "run": name,
                "method": run.method.name,
                "model": f"{model.family}, {Path(model.path).name}",
                "size": f"{model.width} x {model.height}",
                "seed": run.seed,
                "rewards": ", ".join(
                    reward if weight == 1.0 else f"{reward} x {weight:g}"
                    for reward, weight in run.train.rewards.items()
                ),
                "rate": f"{learning_rate(run):.3g}",
                "iterations": train["iterations"],
                "wanted": run.train.iterations,
                "nfe": evaluations(train),
                "seconds": train["seconds"],
                "memory": train.get("peak_memory_mib"),
                "stopped": "; ".join(f"{k}: {v}" for k, v in stopped.items()),
            }
        )
    return rows
