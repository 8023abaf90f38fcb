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
from egrpo.report.render import escaped, pipes
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
HOW_TO_READ = (
    "Held-out prompts, paired by prompt and sample. In brackets: 95% interval of the "
    "difference over prompts (Student's t). It holds for this trained model; how much another "
    "training seed would differ needs runs with other seeds. Rewards that a run was trained "
    "on are bold. diversity: mean RMS pixel distance between the samples of one prompt; "
    "distance_to_base: mean RMS pixel distance to the base model's image of the same prompt "
    "and noise; both in [0, 1]."
)
"""What a reader of the comparison must know."""


# --- numbers --------------------------------------------------------------------------------------


def decimals(low: float | None, high: float | None) -> int:
    """Decimals that show two digits of an interval's width; 4 where there is none."""
    if low is None or high is None or math.isclose(low, high, rel_tol=1e-12):
        return 4  # a width of rounding errors is none
    return min(max(1 - math.floor(math.log10(high - low)), 0), 6)


def readable(row: Row) -> dict[str, str]:
    """Text of a row's numbers.

    Returns:
        ``base``, ``mean``, ``difference`` and its ``interval``, by the width of that interval;
        ``own`` and ``own_interval``, the mean and its interval by the latter's width; what training
        cost by the names of COSTS. A dash where a number is missing; ``own_interval`` is empty.
    """
    digits, own = decimals(row["low"], row["high"]), decimals(row["mean_low"], row["mean_high"])
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
    return (
        f"{prompts} {what}{'' if prompts == 1 else 's'}, "
        f"{samples} sample{'' if samples == 1 else 's'} each"
    )


# --- runs against their base model ----------------------------------------------------------------


def read_rows(comparison: str | Path) -> list[Row]:
    """Rows of a comparison in the order of :func:`in_order`.

    Raises:
        UserError: if the file is missing or damaged.
    """
    return in_order(read_table(comparison, RESULTS).to_pylist())


def in_order(rows: Sequence[Row]) -> list[Row]:
    """By run: trained rewards first, then the others, then what images measure."""
    order = list(dict.fromkeys(row["run"] for row in rows))
    place = [
        (order.index(row["run"]), row["reward"] in MEASURED, not row["trained_on"], row["reward"])
        for row in rows
    ]
    return [row for _, row in sorted(zip(place, rows, strict=True), key=lambda pair: pair[0])]


def by_run(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """Rows of each run below its heading: method, network evaluations and time of training."""
    out = []
    for run, part in groupby(rows, key=lambda row: str(row["run"])):
        found = list(part)
        method, t = found[0]["method"], readable(found[0])
        name = run if run == method else f"{run} ({method})"
        cost = f"{t['nfe']} network evaluations, {t['seconds']} s of training"
        out.append((f"{name}: {cost}", found))
    return out


def cells(row: Row) -> tuple[str, ...]:
    """Text in the order of HEADER."""
    t = readable(row)
    name = f"{row['reward']} {MARK}" if row["trained_on"] else row["reward"]
    return name, t["base"], t["mean"], t["difference"], t["interval"]


def outcome(row: Row) -> str:
    """``better``, ``worse`` or ``open``: which side of 0 the interval of a difference lies on."""
    low, high = row["low"], row["high"]
    if low is None or low <= 0 <= high:
        return "open"
    return "better" if low > 0 else "worse"


def verdict(row: Row) -> str:
    """On which side of 0 the interval of a row lies, in words."""
    if row["low"] is None:
        text = "has no interval (fewer than two prompts with valid scores)."
    else:
        text = (
            f"95% interval over prompts {readable(row)['interval']} "
            + {
                "better": "lies above 0: better than the base model.",
                "worse": "lies below 0: worse than the base model.",
                "open": "contains 0: no difference from the base is shown.",
            }[outcome(row)]
        )
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
    lines = ["# Trained runs against their base model", "", HOW_TO_READ, ""]
    if warned := [f"- {escaped(line)}" for line in warning_lines(rows)]:
        lines += [*warned, ""]
    table = []
    for row in rows:
        reward, t = _line(row["reward"]), readable(row)
        reward = f"**{reward}**" if row["trained_on"] else reward
        counts = str(row["pairs"]), str(row["invalid"])
        shown = [t[key] for key in ("base", "mean", "difference", "interval")]
        spent = [t[key] for key in ("iterations", "nfe", "seconds")]
        table.append([row["run"], row["method"], reward, *shown, *counts, *spent])
    head = ["run", "method", *HEADER, "pairs", "failed", *list(COSTS.values())[:3]]
    return "\n".join([*lines, *pipes(head, table, left=3), "", origin]) + "\n"


# --- tables of a study ----------------------------------------------------------------------------


def table_text(name: str, spec: TableSpec, rows: Sequence[Row], origin: str) -> str:
    """A table of a study in Markdown, below its caption; ``origin`` is its last sentence."""
    lines = [f"# {name}", "", _line(spec.caption), "", how_to_read(rows)]
    heads = ["arm", "method", *map(_line, spec.rewards), *COSTS.values()]
    for part in parts(name, spec, rows):
        lines += ["", f"## {part['title']}"]
        lines += ["", part["note"]] if part["note"] else []
        for section in part["sections"]:
            body = [
                [arm["arm"], arm["method"] or "-", *map(_cell, arm["cells"]), *arm["costs"]]
                for arm in section["arms"]
            ]
            lines += ["", f"### {_line(section['heading'])}", "", *pipes(heads, body, left=2)]
            lines += ["", _line(section["failures"])] if section["failures"] else []
    return "\n".join([*lines, "", origin]) + "\n"


def parts(source: str | Path, spec: TableSpec, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """A table as it is shown: ``title`` and ``note`` of each time of the comparison, and its
    ``sections``: ``heading``, ``failures`` and ``arms`` (``arm``, ``method``, ``cells``: rows with
    their texts in ``text``, and texts of ``costs``).

    Raises:
        UserError: naming ``source`` if an arm or reward is missing.
    """
    out: list[dict[str, Any]] = [{"title": "At the end of training", "note": "", "at": "end"}]
    if spec.evaluations is not None:
        title = f"At equal network evaluations ({spec.evaluations:,})"
        note = (
            f"The last weights within {spec.evaluations:,} network evaluations of training; "
            "an arm whose training ended before shows its own, smaller cost."
        )
        out.append({"title": title, "note": note, "at": "evaluations"})
    for part in out:
        own = [row for row in rows if row["at"] == part["at"]]
        part["sections"] = [_section(source, h, spec, own) for h in spec.sections]
    return out


def _section(
    source: str | Path, heading: str, spec: TableSpec, rows: Sequence[Row]
) -> dict[str, Any]:
    rows = [row for row in rows if row["section"] == heading]
    found = {(row["arm"], row["reward"]): row | {"text": readable(row)} for row in rows}
    arms = []
    for arm in (BASE, *spec.sections[heading]):
        lacking = [reward for reward in spec.rewards if (arm, reward) not in found]
        if lacking:
            what = f"section {heading!r} has no {lacking[0]} of {arm}"
            raise UserError(f"{source}: {what}; delete it and run again")
        own = [found[arm, reward] for reward in spec.rewards]
        costs = [own[0]["text"][key] for key in COSTS]
        arms.append({"arm": arm, "method": own[0]["method"], "cells": own, "costs": costs})
    failed = [f"{r['arm']}, {r['reward']}: {r['invalid']}" for r in rows if r["invalid"]]
    said = f"Image pairs without both scores, left out: {'; '.join(failed)}." if failed else ""
    return {"heading": heading, "arms": arms, "failures": said}


def how_to_read(
    rows: Sequence[Row],
    *,
    base: str = f"`{BASE}`",
    best: str = "**Bold**",
    second: str = "<u>underlined</u>",
    trained: str = "\\*",
) -> str:
    """What a reader must know; the words in the look of what they stand for."""
    counts = sorted({row["seeds"] for row in rows if row["arm"] != BASE})
    number = " to ".join(str(n) for n in dict.fromkeys((counts[0], counts[-1])))
    over, marked = (
        "training seeds and held-out prompts",
        (
            f"{best}: shown to be better than every other row of its section; {second}: than every "
            "other row but one (differences paired by prompt, 95% for all rows together, "
            "Bonferroni). Without a mark, the data do not show it. "
        ),
    )
    seeds = f"Training seeds of an arm: {number}."
    if counts[-1] == 1:
        over, marked = "held-out prompts", ""
        seeds = (
            "Each arm was trained once: intervals hold for these trained models; how much another "
            "training seed would differ is not known, so no arm is marked."
        )
    elif counts[0] == 1:
        seeds += (
            " Where it is 1, the interval covers other prompts, not other seeds, and the "
            "section has no marks."
        )
    return (
        f"Mean reward over {over}, higher is better; in brackets its 95% interval over {over}. "
        f"{seeds} {base} is the untrained model. {marked}"
        "Rows share their prompts: a difference may be clear where intervals overlap. "
        f"{trained}: the arm was trained on this reward. Iterations, network evaluations and "
        "seconds of training are means over seeds, peak memory is the largest."
    )


def _cell(row: Mapping[str, Any]) -> str:
    """``mean [low, high]`` with its marks."""
    text = row["text"]
    mean = {"best": "**{}**", "second": "<u>{}</u>", None: "{}"}[row["mark"]].format(text["own"])
    return f"{mean} {text['own_interval']}".rstrip() + ("\\*" if row["trained_on"] else "")


def _line(text: str) -> str:
    """Text as one line that may stand in a pipe table."""
    return " ".join(text.split()).replace("|", "\\|")
