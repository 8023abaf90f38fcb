"""Results in words: numbers, verdicts, and tables in Markdown.

Numbers show two digits of their interval's width; what a reader must know stands above a table.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from egrpo.config.study import TableSpec
from egrpo.errors import UserError
from egrpo.report.evaluations import MEASURED, Row
from egrpo.report.render import render
from egrpo.store.tables import RESULTS, read_table
from egrpo.study.targets import BASE

COSTS = {
    "iterations": "iterations",
    "nfe": "network evaluations",
    "seconds": "seconds",
    "peak_memory_mib": "peak memory (MiB)",
}
"""Columns of what training cost, and their headings."""
MARK = "*"
HEADER = ("reward", "base", "trained", "difference", "95% over prompts")
"""Columns of :func:`cells`."""
HOURS = 7200
"""Seconds of training from which hours are shown."""
HOW_TO_READ = (
    "Held-out prompts, paired by prompt and sample. In brackets: 95% interval of the "
    "difference over prompts (Student's t). It holds for this trained model; how much another "
    "training seed would differ needs runs with other seeds. Rewards that a run was trained "
    "on are bold. " + "; ".join(f"{name}: {what}" for name, what in MEASURED.items())
) + "; both in [0, 1]."

"""What a reader of the comparison must know."""


# --- numbers --------------------------------------------------------------------------------------


def decimals(low: float | None, high: float | None) -> int:
    """Decimals that show two digits of an interval's width; 4 where there is none."""
    if low is None or high is None or math.isclose(low, high, rel_tol=1e-12):
        return 4  # a width of rounding errors is none
    return min(max(1 - math.floor(math.log10(high - low)), 0), 6)


def readable(row: Row, digits: int | None = None) -> dict[str, str]:
    """Text of a row's numbers, a dash where one is missing.

    ``base``, ``mean``, ``difference`` and its ``interval``, by the width of that interval or with
    ``digits`` decimals; ``own`` and ``own_interval`` (may be empty), the mean and its interval by
    the latter's width; what training cost by the names of COSTS.
    """
    own = decimals(row["mean_low"], row["mean_high"])
    if digits is None:
        digits = decimals(row["low"], row["high"])
    return {
        "base": _number(row["base"], digits),
        "mean": _number(row["mean"], digits),
        "difference": _number(row["difference"], digits, "+"),
        "interval": _interval(row["low"], row["high"], digits, "+") or "-",
        "own": _number(row["mean"], own),
        "own_interval": _interval(row["mean_low"], row["mean_high"], own),
        **{key: _number(row[key], 0, ",") for key in COSTS},
    }


def _number(value: float | None, digits: int, sign: str = "") -> str:
    return "-" if value is None else f"{value:{sign}.{digits}f}"


def _interval(low: float | None, high: float | None, digits: int, sign: str = "") -> str:
    return "" if low is None else f"[{_number(low, digits, sign)}, {_number(high, digits, sign)}]"


def counted(prompts: int, what: str, samples: int) -> str:
    """Prompts and samples in words."""
    several = ["" if number == 1 else "s" for number in (prompts, samples)]
    return f"{prompts} {what}{several[0]}, {samples} sample{several[1]} each"


# --- runs against their base model ----------------------------------------------------------------


def read_rows(comparison: str | Path) -> list[Row]:
    """Rows of a comparison in the order of :func:`in_order`; UserError if the file is none."""
    return in_order(read_table(comparison, RESULTS).to_pylist())


def in_order(rows: Sequence[Row]) -> list[Row]:
    """By run: trained rewards first, then the others, then what images measure."""
    place = {run: number for number, run in enumerate(dict.fromkeys(row["run"] for row in rows))}

    def order(row: Row) -> tuple[int, bool, bool, str]:
        name = row["reward"]
        return place[row["run"]], name in MEASURED, not row["trained_on"], name

    return sorted(rows, key=order)


def by_run(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """Rows of each run below its heading: method, network evaluations and time of training."""
    out = []
    for run, part in groupby(rows, key=lambda row: str(row["run"])):
        found = list(part)
        method = found[0]["method"]
        name = run if run == method else f"{run} ({method})"
        out.append((f"{name}: {spent(found[0])}", found))
    return out


def spent(row: Row) -> str:
    """Network evaluations and time of training in words; a dash where one is missing."""
    seconds = row["seconds"]
    time = f"{_number(seconds, 0, ',')} s"
    if seconds is not None and seconds >= HOURS:
        time = f"{seconds / 3600:,.1f} h"
    return f"{_number(row['nfe'], 0, ',')} network evaluations, {time} of training"


def cells(row: Row) -> tuple[str, ...]:
    """Text in the order of HEADER."""
    t = readable(row)
    name = f"{row['reward']} {MARK}" if row["trained_on"] else row["reward"]
    return name, t["base"], t["mean"], t["difference"], t["interval"]


VERDICTS = {
    "better": "lies above 0: better than the base model.",
    "worse": "lies below 0: worse than the base model.",
    "open": "contains 0: no difference from the base is shown.",
}


def outcome(row: Row) -> str:
    """Which side of 0 the interval of a difference lies on, as a key of VERDICTS."""
    low, high = row["low"], row["high"]
    if low is None or low <= 0 <= high:
        return "open"
    return "better" if low > 0 else "worse"


MOVED = {"better": "rose", "worse": "fell", "open": "not shown"}
"""What :func:`outcome` says of a number that has no better or worse."""


def verdict(row: Row, digits: int | None = None) -> str:
    """The same in words; ``digits`` as in :func:`readable`."""
    text = "has no interval (fewer than two prompts with valid scores)."
    if row["low"] is not None:
        over = "seeds and prompts" if (row["seeds"] or 1) > 1 else "prompts"
        interval = readable(row, digits)["interval"]
        text = f"95% interval over {over} {interval} {VERDICTS[outcome(row)]}"
    left = f" {row['invalid']} pairs without a score are left out." if row["invalid"] else ""
    return text + left


def verdicts(rows: Iterable[Row]) -> list[str]:
    """One line for each trained reward: on which side of 0 its interval lies."""
    return [f"{r['run']}, {r['reward']}: {verdict(r)}" for r in rows if r["trained_on"]]


def warning_lines(rows: Iterable[Row]) -> list[str]:
    """One line for each run whose training had something wrong."""
    found = {r["run"]: r["warnings"] for r in rows if r["warnings"]}
    return [f"{run}: warning: {text}" for run, text in found.items()]


def comparison_text(rows: Sequence[Row], origin: str) -> str:
    """A comparison of runs in Markdown, a row each reward; ``origin`` is its last sentence."""
    return render(
        "comparison.md.j2",
        how_to_read=HOW_TO_READ,
        warnings=warning_lines(rows),
        header=HEADER,
        rows=[row | {"text": readable(row)} for row in rows],
        origin=origin,
    )


# --- tables of a study ----------------------------------------------------------------------------


def table_text(name: str, spec: TableSpec, rows: Sequence[Row], origin: str) -> str:
    """A table of a study in Markdown, below its caption; ``origin`` is its last sentence."""
    return render(
        "table.md.j2",
        name=name,
        spec=spec,
        how_to_read=how_to_read(rows),
        parts=parts(name, spec, rows),
        cost_heads=list(COSTS.values()),
        marks={"best": "**%s**", "second": "<u>%s</u>", None: "%s"},
        origin=origin,
    )


def parts(source: str | Path, spec: TableSpec, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """A table as it is shown: ``title`` and ``note`` of each time of the comparison, and its
    ``sections``: ``heading``, ``failures`` and ``arms`` (``arm``, ``method``, ``cells``: rows with
    their texts in ``text``, and texts of ``costs``).

    Raises UserError naming ``source`` if an arm or reward is missing.
    """
    times = [("end", "At the end of training", "")]
    if spec.evaluations is not None:
        budget = f"{spec.evaluations:,}"
        note = (
            f"The last weights within {budget} network evaluations of training; "
            "an arm whose training ended before shows its own, smaller cost."
        )
        times.append(("evaluations", f"At equal network evaluations ({budget})", note))
    out = []
    for at, title, note in times:
        own = [row for row in rows if row["at"] == at]
        sections = [_section(source, heading, spec, own) for heading in spec.sections]
        out.append({"title": title, "note": note, "sections": sections})
    return out


def _section(
    source: str | Path, heading: str, spec: TableSpec, rows: Sequence[Row]
) -> dict[str, Any]:
    rows = [row for row in rows if row["section"] == heading]
    found = {(row["arm"], row["reward"]): row | {"text": readable(row)} for row in rows}
    arms = []
    for arm in (BASE, *spec.sections[heading]):
        for reward in spec.rewards:
            if (arm, reward) not in found:
                what = f"section {heading!r} has no {reward} of {arm}"
                raise UserError(f"{source}: {what}; delete it and run again")
        own = [found[arm, reward] for reward in spec.rewards]
        costs = [own[0]["text"][key] for key in COSTS]
        arms.append({"arm": arm, "method": own[0]["method"], "cells": own, "costs": costs})
    failed = [f"{r['arm']}, {r['reward']}: {r['invalid']}" for r in rows if r["invalid"]]
    said = f"Image pairs without both scores, left out: {'; '.join(failed)}." if failed else ""
    return {"heading": heading, "arms": arms, "failures": said}


MARKDOWN = {
    "base": f"`{BASE}`",
    "best": "**Bold**",
    "second": "<u>underlined</u>",
    "trained": "\\*",
}


def how_to_read(rows: Sequence[Row], look: Mapping[str, str] = MARKDOWN) -> str:
    """What a reader must know; ``look`` holds its words in the look of what they stand for."""
    seeds = [row["seeds"] for row in rows if row["arm"] != BASE]
    text = render("how_to_read.txt.j2", least=min(seeds), most=max(seeds), **look)
    return " ".join(text.split())
