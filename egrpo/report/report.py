"""The table that a study ends with in the terminal, and what it says in words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from egrpo.report.tables import MEASURED, Row, readable, warning_lines
from egrpo.store.tables import COMPARISON, read_table

HEADER = ("reward", "base", "trained", "difference", "95% over prompts")
MARK = "*"
NOTE = f"{MARK} trained on this reward"
OPEN_UI = "Curves, images and settings of every run: `make ui` opens MLflow."


def short_table(comparison: str | Path) -> str:
    """The comparison as plain aligned text, followed by its verdicts and warnings.

    Args:
        comparison: ``comparison.parquet``.

    Returns:
        Text that ends with a line break.

    Raises:
        UserError: if the file is missing or damaged.
    """
    rows = read_rows(comparison)
    widths = _widths(rows)

    def line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        return "  ".join(["  " + first[0].ljust(first[1]), *(c.rjust(w) for c, w in others)])

    lines = [line(HEADER), line(["-" * w for w in widths])]
    for heading, part in by_run(rows):
        lines += [heading, *(line(cells(row)) for row in part)]
    said = [*verdicts(rows), *warning_lines(rows)]
    return "\n".join([*lines, NOTE, "", *said, OPEN_UI]) + "\n"


def print_report(comparison: str | Path, console: Console | None = None) -> None:
    """Print the comparison: rich tables on a terminal, :func:`short_table` elsewhere.

    Raises:
        UserError: if the file is missing or damaged.
    """
    console = console or Console()
    if not console.is_terminal:
        console.file.write(short_table(comparison))
        return
    rows = read_rows(comparison)
    for heading, part in by_run(rows):
        table = Table(
            title=Text(heading),
            title_justify="left",
            title_style="bold",
            box=SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
        )
        for name, width in zip(HEADER, _widths(rows), strict=True):
            left = name == HEADER[0]
            table.add_column(name, justify="left" if left else "right", min_width=width)
        for row in part:
            style = "bold" if row["trained_on"] else "dim" if row["reward"] in MEASURED else ""
            table.add_row(*(Text(cell) for cell in cells(row)), style=style)
        console.print(table)
    for line in [NOTE, *verdicts(rows), *warning_lines(rows), OPEN_UI]:
        console.print(Text(line))


def read_rows(comparison: str | Path) -> list[Row]:
    """Rows of a comparison in the order of :func:`in_order`."""
    return in_order(read_table(comparison, COMPARISON).to_pylist())


def in_order(rows: Sequence[Row]) -> list[Row]:
    """By run: trained rewards first, then the others, then what images measure."""
    order = [r["run"] for r in rows]
    return sorted(
        rows,
        key=lambda r: (
            order.index(r["run"]),
            r["reward"] in MEASURED,
            not r["trained_on"],
            r["reward"],
        ),
    )


def verdicts(rows: Iterable[Row]) -> list[str]:
    """One line for each trained reward: on which side of 0 its interval lies."""
    return [f"{r['run']}, {r['reward']}: {verdict(r)}" for r in rows if r["trained_on"]]


def verdict(row: Row) -> str:
    """On which side of 0 the interval of a row lies, in words."""
    low, high = row["low"], row["high"]
    interval = f"95% interval over prompts {readable(row)['interval']}"
    if low is None:
        text = "has no interval (fewer than two prompts with valid scores)."
    elif low > 0:
        text = f"{interval} lies above 0: better than the base model."
    elif high < 0:
        text = f"{interval} lies below 0: worse than the base model."
    else:
        text = f"{interval} contains 0: no difference from the base is shown."
    return text + (
        f" {row['invalid']} pairs without a score are left out." if row["invalid"] else ""
    )


def by_run(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """Rows of each run below its heading: method, network evaluations and time of training."""
    out = []
    for run, part in groupby(rows, key=lambda row: str(row["run"])):
        found = list(part)
        first, t = found[0], readable(found[0])
        method = "" if run == first["method"] else f" ({first['method']})"
        out.append(
            (f"{run}{method}: {t['nfe']} network evaluations, {t['seconds']} s of training", found)
        )
    return out


def cells(row: Row) -> tuple[str, ...]:
    """Text in the order of HEADER."""
    t = readable(row)
    name = f"{row['reward']} {MARK}" if row["trained_on"] else row["reward"]
    return name, t["base"], t["trained"], t["difference"], t["interval"]


def _widths(rows: Sequence[Row]) -> list[int]:
    columns = zip(HEADER, *map(cells, rows), strict=True)
    return [max(map(len, column)) for column in columns]
