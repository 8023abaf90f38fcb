"""What stands on a study's page: each part read from its results, ready for the template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from egrpo.config.study import TableSpec
from egrpo.core.plan import Plan
from egrpo.errors import UserError, command
from egrpo.page.images import open_grid, thumbnail, uri
from egrpo.planning.plan import load_plan
from egrpo.planning.trees import needs_plan
from egrpo.report.evaluations import MEASURED, Row, train_record
from egrpo.report.provenance import facts
from egrpo.report.text import by_run, counted, how_to_read, outcome, parts, readable, verdict
from egrpo.store.tables import MERGE_PLAN, RESULTS, metadata_of, read_table
from egrpo.study.layout import Layout

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


def comparison(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """Rows of each run below its heading, with their texts (``text``), outcome, and the ends of
    their bar in percent; a reward has one scale on the whole page."""
    reach: dict[str, float] = {}
    for row in rows:
        ends = [abs(row[key]) for key in ("low", "high", "difference") if row[key] is not None]
        reach[row["reward"]] = max([reach.get(row["reward"], 0.0), *ends])

    def view(row: Row) -> Row:
        whole, bar = reach[row["reward"]], None
        if row["low"] is not None and whole > 0:
            ends = (row["low"], row["high"], row["difference"])
            bar = [round(50 + 48 * value / whole, 2) for value in ends]
        result = "measured" if row["reward"] in MEASURED else outcome(row)
        return {**row, "text": readable(row), "outcome": result, "bar": bar}

    return [(heading, [view(row) for row in part]) for heading, part in by_run(rows)]


def verdict_views(groups: Sequence[tuple[str, list[Row]]], at: Layout) -> list[Row]:
    """Of :func:`comparison` the trained rewards, with what they say, and of how many images, those
    included whose scoring failed."""
    out = []
    for row in (row for _, part in groups for row in part if row["trained_on"]):
        samples = at.study.runs[row["run"]].evaluate.samples
        over = counted((row["pairs"] + row["invalid"]) // samples, "held-out prompt", samples)
        out.append({**row, "says": verdict(row), "over": over})
    return out


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
        view = {name: getattr(plan, name) for name in ("steps", "threshold", "warnings")}
        view |= {"names": _arms(names, at), "measure": MEASURES[plan.measure]}
        view["rows"] = sorted(rows, key=lambda row: row["step"])
        view["samples"] = dict(zip(plan.active, plan.samples or (), strict=False))
        views.append(view)
    return views


def _arms(runs: Sequence[str], at: Layout) -> list[str]:
    """Arms of runs; a run whose arm has no other goes by its own name."""
    arms = [at.study.runs[run].arm for run in runs]
    named = [arm if len(at.arm(arm)) > 1 else run for arm, run in zip(arms, runs, strict=True)]
    return list(dict.fromkeys(named))


# --- tables ---------------------------------------------------------------------------------------


def result_view(name: str, spec: TableSpec, at: Layout) -> dict[str, Any]:
    """One table of results, as :func:`egrpo.report.text.parts` has it, and what is said of it.

    Raises:
        UserError: if the table is missing, damaged or lacks an arm or reward.
    """
    path = at.table(name)
    data = read_table(path, RESULTS)
    rows, head = data.to_pylist(), metadata_of(data)
    words = {"base": "base", "best": "Bold", "second": "underlined", "trained": "*"}
    return {
        "name": name,
        "caption": spec.caption,
        "how": how_to_read(rows, **words),
        "rewards": spec.rewards,
        "parts": parts(path, spec, rows),
        "commit": head.get("git_commit", ""),
        "config_hash": head.get("config_hash", ""),
    }


# --- settings -------------------------------------------------------------------------------------


def settings_rows(at: Layout) -> list[dict[str, Any]]:
    """``facts`` of each run, and in ``stopped`` what bound ended its training.

    Raises:
        UserError: if a run's ``train.json`` is missing or damaged.
    """
    rows = []
    for name, run in at.study.runs.items():
        train = train_record(at.run(name) / "train.json")
        shown = facts(run, train)
        del shown["settings"]  # the link says more
        stopped = train.get("stopped") or {}
        rows.append({"facts": shown, "stopped": "; ".join(f"{k}: {v}" for k, v in stopped.items())})
    return rows
