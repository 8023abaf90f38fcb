"""The runs table of a study: its arms, and what each overrides."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from egrpo.config.explain import shown
from egrpo.config.load import numbers, parse
from egrpo.errors import UserError


@dataclass(frozen=True)
class Row:
    """One line of the runs table."""

    run: str
    overrides: dict[str, Any]


def read_runs(path: str | Path) -> list[Row]:
    """The runs table: tab-separated, column ``run`` and one column per overridden dotted key.

    An empty cell overrides nothing; lines that start with # are comments.

    Raises:
        UserError: naming the line and what is wrong with it.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # spreadsheets write a byte-order mark
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or no name of a file
        raise UserError(f"{path}: runs table cannot be read: {error}") from None
    lines = [ln for ln in text.split("\n") if ln.strip() and not ln.startswith("#")]
    if not lines:
        raise UserError(f"{path}: the runs table is empty; its first line must name the columns")
    header, *body = (line.split("\t") for line in lines)
    for problem in _problems(header, body):
        raise UserError(f"{path}: {problem}")
    rows: dict[str, Row] = {}
    for first, *cells in body:
        run = first.strip()
        if run in rows:
            raise UserError(f"{path}: run id {run!r} occurs twice; ids must be unique")
        rows[run] = Row(run, {})
        for key, cell in zip(header[1:], cells, strict=False):
            if cell.strip():
                where = f"{path}: run {run!r}, column {key}"
                rows[run].overrides[key] = _cell(cell, where)
    return list(rows.values())


def sweep_rows(sweep: Mapping[str, Sequence[Any]]) -> list[Row]:
    """The runs of a grid: dotted key -> values, first key slowest.

    A run is named by its values, each after the last part of its key where that tells it apart.
    """
    last = [key.rpartition(".")[2] for key in sweep]
    heads = [
        "" if key == "method.name" else name if last.count(name) == 1 else key.replace(".", "_")
        for key, name in zip(sweep, last, strict=True)
    ]
    rows = []
    for values in product(*sweep.values()):
        told = (f"{head}{value}" for head, value in zip(heads, values, strict=True))
        name = "_".join(re.sub(r"[^A-Za-z0-9._]+", "-", each).strip("-") for each in told)
        rows.append(Row(name, dict(zip(sweep, values, strict=True))))
    return rows


def _problems(header: list[str], body: list[list[str]]) -> Iterator[str]:
    """What is wrong with the shape of a runs table."""
    if header[0] != "run":
        yield "the first column must be `run` (columns are split by tabs)"
    if not all(name.strip() for name in header):
        yield "a column has no name (is there a tab at the end of the header?)"
    if len(set(header)) != len(header):
        yield "a column is named twice"
    for key, section in product(header, header):
        if key.startswith(f"{section}."):
            yield f"column {section} holds column {key}; keep one of them"
    if not body:
        yield "the runs table has no run"
    for cells in body:
        if len(cells) > len(header):
            yield f"run {cells[0]!r} has {len(cells)} cells, the header {len(header)}"


def _cell(text: str, where: str) -> Any:
    try:
        return numbers(parse(text))
    except ValueError as error:
        raise UserError(f"{where}: cannot read {shown(text)}: {error}") from None
