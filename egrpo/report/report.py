"""The table that a study ends with in the terminal, and what it says in words."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from egrpo.report.evaluations import MEASURED, Row
from egrpo.report.text import HEADER, MARK, by_run, cells, read_rows, verdicts, warning_lines

NOTE = f"{MARK} trained on this reward"
OPEN_UI = "Curves, images and settings of every run: `make ui` opens MLflow."


def short_table(comparison: str | Path) -> str:
    """``comparison.parquet`` as plain aligned lines, followed by its verdicts and warnings."""
    rows = read_rows(comparison)
    widths = _widths(rows)

    def line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        return "  ".join(["  " + first[0].ljust(first[1]), *(c.rjust(w) for c, w in others)])

    lines = [line(HEADER), line(["-" * w for w in widths])]
    for heading, part in by_run(rows):
        lines += [heading, *(line(cells(row)) for row in part)]
    return "\n".join([*lines, *_said(rows)]) + "\n"


def print_report(comparison: str | Path, console: Console | None = None) -> None:
    """Print the comparison: rich tables on a terminal, :func:`short_table` elsewhere."""
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
            table.add_row(*map(Text, cells(row)), style=style)
        console.print(table)
    for line in filter(None, _said(rows)):
        console.print(Text(line))


def _said(rows: Sequence[Row]) -> list[str]:
    return [NOTE, "", *verdicts(rows), *warning_lines(rows), OPEN_UI]


def _widths(rows: Sequence[Row]) -> list[int]:
    return [max(map(len, column)) for column in zip(HEADER, *map(cells, rows), strict=True)]
