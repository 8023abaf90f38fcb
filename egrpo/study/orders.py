"""Orders: what the workflow tells a job, and how a job reads it.

An order is a file of settings and identities, named by a digest of them, so that a job does what
was planned when it was planned, whatever is edited since. One for each run that has something to
do, which all its jobs read; one for each table, figure, page or delivery, which names the orders of
its runs.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from egrpo.config.keys import digest
from egrpo.config.load import load_run_settings
from egrpo.config.models import RunConfig
from egrpo.config.study import FigureSpec, TableSpec
from egrpo.errors import UserError
from egrpo.planning.trees import needs_plan
from egrpo.store.files import read_json, write_once
from egrpo.study.identity import SETS, Record
from egrpo.study.layout import Layout
from egrpo.study.resolve import Study

STAGES = (*(f"embed-{which}" for which in SETS), "trajectory", "train", "evaluate", "base")
PLANNED = ("plan", "profile", "suffixes")
"""Further stages of runs whose method merges steps."""


def order_of_run(at: Layout, run: str, *, write: bool = True) -> Path:
    """Where a run's order lies; ``write``: and there it is."""
    settings = at.study.runs[run]
    stages = STAGES + (PLANNED if needs_plan(settings) else ())
    order = {
        "results": at.study.results,
        "libraries": at.study.libraries,
        "settings": settings.model_dump(),
        "identities": {stage: at.identity(stage, run) for stage in stages},
    }
    return _order(at, run, order, write)


def order_of_target(
    at: Layout, name: str, runs: Iterable[str], record: Record, *, write: bool = True
) -> Path:
    """The order of a table, figure, page ..., which tells of several runs, by what it is made from.

    The tables and figures that it shows, ``targets`` of its record, go along; ``write``: and there
    it is, with those of its runs.
    """
    shown = record.get("targets", ())
    order = {
        "runs": [order_of_run(at, run, write=write).name for run in runs],
        "record": record,
        "tables": {n: s.model_dump() for n, s in at.study.tables.items() if n in shown},
        "figures": {n: s.model_dump() for n, s in at.study.figures.items() if n in shown},
    }
    return _order(at, name, order, write)


def _order(at: Layout, name: str, order: Mapping[str, Any], write: bool) -> Path:
    path = at.root / "settings" / f"{name}-{digest(order)}.json"
    if write:
        write_once(path, lambda: json.dumps(order))
    return path


@dataclass(frozen=True)
class Order:
    """What a job was told: its file, its runs and where they lie, and the record of a target."""

    path: Path
    at: Layout
    record: Record

    @property
    def run(self) -> RunConfig:
        """The run of an order of one."""
        return next(iter(self.at.study.runs.values()))


def read_order(path: Path) -> Order:
    """Read an order; UserError if a file is missing or damaged."""
    order = read_json(path)
    try:
        told = [order]
        if "runs" in order:
            told = [read_json(path.with_name(name)) for name in order["runs"]]
        runs = {one["settings"]["run"]: load_run_settings(one["settings"], path) for one in told}
        known = {name: one["identities"] for name, one in zip(runs, told, strict=True)}
        first = next(iter(runs.values()))
        study = Study(
            first.study,
            told[0]["results"],
            runs,
            tables={n: TableSpec.model_validate(s) for n, s in order.get("tables", {}).items()},
            figures={n: FigureSpec.model_validate(s) for n, s in order.get("figures", {}).items()},
            libraries=told[0]["libraries"],
        )
    except (KeyError, TypeError, ValueError, StopIteration) as error:
        raise UserError(
            f"{path}: damaged order of a job ({error}); start the workflow again"
        ) from None
    return Order(path, Layout(study, lambda stage, run: known[run][stage]), order.get("record", {}))


def check_inputs(order: Order, stage: str) -> Record:
    """What a job's result is computed from now, which must be what it was planned from.

    Raises UserError naming what changed since.
    """
    at, run = order.at, order.run
    now = at.identities.record(stage, run)
    at.identities.digests.save()
    if digest(now) == at.identity(stage, run.run):
        return now
    raise UserError(
        f"{order.path}: run {run.run}: files or code changed since this job was planned ({stage}); "
        "start the workflow again"
    )
