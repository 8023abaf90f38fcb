"""What stands on a study's page: each part read from its results, ready for the template."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from egrpo.config.study import TableSpec
from egrpo.core.plan import Plan
from egrpo.errors import UserError, command
from egrpo.page.images import open_grid, thumbnail, uri
from egrpo.planning.plan import load_plan
from egrpo.planning.trees import needs_plan
from egrpo.report import text
from egrpo.report.evaluations import train_record
from egrpo.report.provenance import facts
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
MARKS = {"base": "base", "best": "Bold", "second": "underlined", "trained": "*"}
"""Words of :func:`egrpo.report.text.how_to_read` where the page's style gives their look."""


class Picture(NamedTuple):
    """A figure: its data URI, what it shows, and whether it is drawn of lines alone."""

    uri: str
    caption: str
    lines: bool


def picture(stem: Path, kind: str, caption: str = "") -> Picture:
    """The smaller of a figure's SVG and PNG, by its path without ending; one with large images as
    WebP. ``kind`` as in ``FigureSpec``; without ``caption`` the template says what it shows.

    Raises:
        UserError: if there is neither.
    """
    png, lines = stem.with_suffix(".png"), kind not in ("branches", "images")
    files = [path for path in (stem.with_suffix(".svg"), png) if path.is_file()]
    if not files:
        raise UserError(f"{png}: no such figure; `{command((), png)}` makes it")
    file = min(files, key=lambda path: path.stat().st_size)
    if file.stat().st_size > LARGE and png in files:
        return Picture(thumbnail(open_grid(png), WIDE), caption, lines)
    content = "image/svg+xml" if file.suffix == ".svg" else "image/png"
    return Picture(uri(file.read_bytes(), content), caption, lines)


def plan_views(at: Layout) -> list[dict[str, Any]]:
    """Each plan once, with the arms that have it; a run whose arm has no other goes by its own
    name. UserError if a plan or its table is missing or damaged."""
    runs: dict[Plan, list[str]] = {}
    for name, run in at.study.runs.items():
        if needs_plan(run):
            runs.setdefault(load_plan(at.run(name) / "plan.json"), []).append(name)
    views = []
    for plan, names in runs.items():
        arms = {name: at.study.runs[name].arm for name in names}
        named = [arm if len(at.arm(arm)) > 1 else name for name, arm in arms.items()]
        rows = read_table(at.run(names[0]) / "merge_plan.parquet", MERGE_PLAN).to_pylist()
        view = {name: getattr(plan, name) for name in ("steps", "threshold", "warnings")}
        view |= {"names": list(dict.fromkeys(named)), "measure": MEASURES[plan.measure]}
        view["rows"] = sorted(rows, key=lambda row: row["step"])
        view["samples"] = dict(zip(plan.active, plan.samples or (), strict=False))
        views.append(view)
    return views


def result_view(name: str, spec: TableSpec, at: Layout) -> dict[str, Any]:
    """One table of results, as :func:`egrpo.report.text.parts` has it, and what is said of it.

    Raises:
        UserError: if the table is missing, damaged or lacks an arm or reward.
    """
    path = at.table(name)
    data = read_table(path, RESULTS)
    rows, head = data.to_pylist(), metadata_of(data)
    return {
        "name": name,
        "caption": spec.caption,
        "how": text.how_to_read(rows, MARKS),
        "rewards": spec.rewards,
        "parts": text.parts(path, spec, rows),
        "commit": head.get("git_commit", ""),
        "config_hash": head.get("config_hash", ""),
    }


def settings_rows(at: Layout) -> list[dict[str, Any]]:
    """``facts`` of each run, and in ``stopped`` what bound ended its training."""
    rows = []
    for name, run in at.study.runs.items():
        train = train_record(at.run(name) / "train.json")
        shown = facts(run, train)
        del shown["settings"]  # the link says more
        stopped = train.get("stopped") or {}
        rows.append({"facts": shown, "stopped": "; ".join(f"{k}: {v}" for k, v in stopped.items())})
    return rows
