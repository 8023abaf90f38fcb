"""A table of results in Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from egrpo.config.models import TableSpec
from egrpo.report.tables import Row, decimals
from egrpo.study.targets import BASE

COSTS = {
    "iterations": "iterations",
    "nfe": "network evaluations",
    "seconds": "seconds",
    "peak_memory_mib": "peak memory (MiB)",
}
"""Columns of what training cost, and their headings."""


def markdown(name: str, spec: TableSpec, rows: Sequence[Row], origin: str = "") -> str:
    """The table in Markdown, below its caption and what a reader must know.

    ``origin`` says where the numbers come from, one sentence for the end.
    """
    lines = [f"# {name}", "", _line(spec.caption), "", how_to_read(rows)]
    for when, (title, note) in times(spec).items():
        lines += ["", f"## {title}"]
        lines += ["", note] if note else []
        for heading in spec.sections:
            found = [row for row in rows if (row["at"], row["section"]) == (when, heading)]
            lines += ["", f"### {_line(heading)}", "", *_pipes(found, spec.rewards)]
    lines += ["", origin] if origin else []
    return "\n".join(lines) + "\n"


def times(spec: TableSpec) -> dict[str, tuple[str, str]]:
    """When arms are compared, as the column ``at`` names it: a title and what to know of it."""
    found = {"end": ("At the end of training", "")}
    if spec.evaluations is not None:
        found["evaluations"] = (
            f"At equal network evaluations ({spec.evaluations:,})",
            f"The last weights within {spec.evaluations:,} network evaluations of training; "
            "an arm whose training ended before shows its own, smaller cost.",
        )
    return found


def counted(prompts: int, what: str, samples: int) -> str:
    """Prompts and samples in words."""
    return (
        f"{prompts} {what}{'' if prompts == 1 else 's'}, "
        f"{samples} sample{'' if samples == 1 else 's'} each"
    )


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
    if counts[-1] == 1:
        over = "held-out prompts"
        seeds = (
            "Each arm was trained once: intervals hold for these trained models; how much another "
            "training seed would differ is not known, so no arm is marked."
        )
        marked = ""
    else:
        over = "training seeds and held-out prompts"
        seeds = f"Training seeds of an arm: {number}."
        marked = (
            f"{best}: shown to be better than every other row of its section; {second}: than every "
            "other row but one (differences paired by prompt, 95% for all rows together, "
            "Bonferroni). Without a mark, the data do not show it. "
        )
        if counts[0] == 1:
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


def _pipes(rows: Sequence[Row], rewards: Sequence[str]) -> list[str]:
    """Pipe table of one section, and a line on failures where there are any."""
    lines = [
        "| " + " | ".join(["arm", "method", *map(_line, rewards), *COSTS.values()]) + " |",
        "|---|---|" + "--:|" * (len(rewards) + len(COSTS)),
    ]
    for arm in dict.fromkeys(row["arm"] for row in rows):
        of_arm = {row["reward"]: row for row in rows if row["arm"] == arm}
        first = of_arm[rewards[0]]
        cells = [arm, first["method"] or "-", *(_cell(of_arm[reward]) for reward in rewards)]
        cells += costs(first)
        lines.append("| " + " | ".join(cells) + " |")
    failed = failures(rows)
    return lines + (["", _line(failed)] if failed else [])


def costs(row: Row) -> list[str]:
    """Text of what training cost, in the order of COSTS."""
    return ["-" if row[key] is None else f"{row[key]:,.0f}" for key in COSTS]


def failures(rows: Sequence[Row]) -> str:
    """A sentence on the images without a score; empty where there are none."""
    failed = [f"{r['arm']}, {r['reward']}: {r['invalid']}" for r in rows if r["invalid"]]
    return f"Images without a score, left out: {'; '.join(failed)}." if failed else ""


def numbers(row: Row) -> tuple[str, str]:
    """Mean and interval as text, rounded to two digits of the width; the latter may be empty."""
    low, high, digits = row["low"], row["high"], decimals(row["low"], row["high"])
    mean = "-" if row["mean"] is None else f"{row['mean']:.{digits}f}"
    return mean, "" if low is None else f"[{low:.{digits}f}, {high:.{digits}f}]"


def _cell(row: Row) -> str:
    """``mean [low, high]`` with its marks."""
    number, interval = numbers(row)
    mean = {"best": "**{}**", "second": "<u>{}</u>", None: "{}"}[row["mark"]].format(number)
    return f"{mean} {interval}".rstrip() + ("\\*" if row["trained_on"] else "")


def _line(text: str) -> str:
    """Text as one line that may stand in a pipe table."""
    return " ".join(text.split()).replace("|", "\\|")
