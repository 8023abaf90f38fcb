"""A table of results in Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from egrpo.config.models import TableSpec
from egrpo.config.targets import BASE
from egrpo.stages.tables import Row, decimals


def markdown(name: str, spec: TableSpec, rows: Sequence[Row], origin: str = "") -> str:
    """The table in Markdown, below its caption and what a reader must know.

    ``origin`` says where the numbers come from, one sentence for the end.
    """
    lines = [f"# {name}", "", _line(spec.caption), "", _how_to_read(rows)]
    titles = {"end": "## At the end of training"}
    if spec.evaluations is not None:
        titles["evaluations"] = f"## At equal network evaluations ({spec.evaluations:,})"
    for when, title in titles.items():
        lines += ["", title]
        if when == "evaluations":
            lines += [
                "",
                f"The last weights within {spec.evaluations:,} network evaluations of training; "
                "an arm whose training ended before shows its own, smaller cost.",
            ]
        for heading in spec.sections:
            found = [row for row in rows if (row["at"], row["section"]) == (when, heading)]
            lines += ["", f"### {_line(heading)}", "", *_pipes(found, spec.rewards)]
    lines += ["", origin] if origin else []
    return "\n".join(lines) + "\n"


def _how_to_read(rows: Sequence[Row]) -> str:
    counts = sorted({row["seeds"] for row in rows if row["arm"] != BASE})
    number = " to ".join(str(n) for n in dict.fromkeys((counts[0], counts[-1])))
    if counts[-1] == 1:
        over = "held-out prompts"
        seeds = (
            "Each arm was trained once: intervals and marks hold for these trained models; how "
            "much another training seed would differ is not known."
        )
    else:
        over = "training seeds and held-out prompts"
        seeds = f"Training seeds of an arm: {number}."
        if counts[0] == 1:
            seeds += " Where it is 1, the interval covers other prompts, not other seeds."
    return (
        f"Mean reward over {over}, higher is better; in brackets its 95% interval, over the same. "
        f"{seeds} `{BASE}` is the untrained model. **Bold**: shown to be better than every other "
        "row of its section; <u>underlined</u>: than every other row but one (differences paired "
        "by prompt, 95% for all rows together, Bonferroni). Without a mark, the data do not "
        "show it. Rows share their prompts: a difference may be clear where intervals overlap. "
        "\\*: the arm was trained on this reward. Iterations, network evaluations and seconds of "
        "training are means over seeds, peak memory is the largest."
    )


def _pipes(rows: Sequence[Row], rewards: Sequence[str]) -> list[str]:
    """Pipe table of one section, and a line on failures where there are any."""
    costs = ("iterations", "nfe", "seconds", "peak_memory_mib")
    heads = ("iterations", "network evaluations", "seconds", "peak memory (MiB)")
    lines = [
        "| " + " | ".join(["arm", "method", *map(_line, rewards), *heads]) + " |",
        "|---|---|" + "--:|" * (len(rewards) + len(heads)),
    ]
    for arm in dict.fromkeys(row["arm"] for row in rows):
        of_arm = {row["reward"]: row for row in rows if row["arm"] == arm}
        first = of_arm[rewards[0]]
        cells = [arm, first["method"] or "-", *(_cell(of_arm[reward]) for reward in rewards)]
        cells += ["-" if first[key] is None else f"{first[key]:,.0f}" for key in costs]
        lines.append("| " + " | ".join(cells) + " |")
    failed = [f"{r['arm']}, {_line(r['reward'])}: {r['invalid']}" for r in rows if r["invalid"]]
    if failed:
        lines += ["", f"Images left out because scoring failed: {'; '.join(failed)}."]
    return lines


def _cell(row: Row) -> str:
    """``mean [low, high]``, rounded to two digits of the width, with its marks."""
    low, high, digits = row["low"], row["high"], decimals(row["low"], row["high"])
    number = "-" if row["mean"] is None else f"{row['mean']:.{digits}f}"
    mean = {"best": "**{}**", "second": "<u>{}</u>", None: "{}"}[row["mark"]].format(number)
    interval = "" if low is None else f" [{low:.{digits}f}, {high:.{digits}f}]"
    return mean + interval + ("\\*" if row["trained_on"] else "")


def _line(text: str) -> str:
    """Text as one line that may stand in a pipe table."""
    return " ".join(text.split()).replace("|", "\\|")
