"""Prompt files. Needs no torch."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from egrpo.core.seeds import shuffled
from egrpo.errors import UserError

COLUMN, NEGATIVE = "prompt", "negative_prompt"
"""Columns, or keys, of a prompt file; the first is a setting."""

_QUOTED = re.compile(r'"(?:[^"]|"")*"')

Records = Iterator[tuple[str, Any]]
"""Where a record stands, for messages, and the record: a text, or values by column."""


@dataclass(frozen=True)
class Prompt:
    """One prompt of a file; its id is its place there, counted from 0 without empty ones."""

    text: str
    negative: str = ""


def read_prompts(path: str | Path, column: str = COLUMN) -> list[Prompt]:
    """The prompts of a file, which is read as what its suffix says; empty ones are left out.

    UTF-8, with or without a byte-order mark. .txt: a prompt a line; .jsonl: an object a line;
    .json: a list of texts or of objects, or an object of lists; .csv and .tsv: with a header,
    quoted as in RFC 4180. What is not .txt may hold ``negative_prompt`` beside ``column``.

    Raises:
        UserError: if the file is missing, holds no prompt, or cannot be read.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in FORMATS:
        raise UserError(
            f"{path}: {suffix or 'a file without suffix'} is not read as a prompt file; "
            f"{', '.join(FORMATS)} are"
        )
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such prompt file (prompts.train, prompts.heldout)") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: prompt file cannot be read as UTF-8: {error}") from None
    records = FORMATS[suffix](text, path, column)
    found = [_prompt(record, column, where) for where, record in records]
    prompts = [prompt for prompt in found if prompt.text]
    if not prompts:
        raise UserError(f"{path}: holds no prompt")
    return prompts


def _prompt(record: Any, column: str, where: str) -> Prompt:
    """The prompt of a record, which is refused if it holds none."""
    text, negative = record, None
    if isinstance(record, Prompt):
        text = record.text
    elif isinstance(record, Mapping):
        text = record[_column(record, column, where)]
        negative = record.get(_found(record, NEGATIVE, where))
    parts = text, "" if negative is None else negative
    try:
        for part in parts:
            part.encode()  # half a character, as JSON can spell it, is a UnicodeEncodeError
    except (AttributeError, ValueError):
        raise _unexpected(where, column) from None
    if any("\0" in part for part in parts):
        raise UserError(f"{where}: holds a NUL character; is the file saved as UTF-8?")
    return Prompt(*(part.strip() for part in parts))


def _unexpected(where: str, column: str) -> UserError:
    return UserError(
        f'{where}: expected a JSON object whose "{column}" is text, and "{NEGATIVE}" text or null'
    )


def _found(names: Collection[str], wanted: str, where: str) -> str | None:
    """The name that is meant: spelt so, or else with other capitals; one of several is refused."""
    found = [name for name in names if name == wanted] or [
        name for name in names if name.casefold() == wanted.casefold()
    ]
    if len(found) > 1:
        raise UserError(f"{where}: which column is {wanted}? There are {found!r:.200}")
    return found[0] if found else None


def _column(names: Collection[str], column: str, where: str) -> str:
    """The name of the prompts' column among those of a file, which must have one."""
    name = _found(names, column, where)
    if name is None:
        there = ", ".join(map(repr, names)) or "none"
        raise UserError(
            f"{where}: no column {column!r}; there are {there:.300}: name one in prompts.column"
        )
    return name


def _lines(text: str, path: str | Path, column: str) -> Records:
    for number, line in enumerate(text.split("\n"), start=1):
        yield f"{path}, line {number}", line


def _texts(text: str, path: str | Path, column: str) -> Records:
    for where, line in _lines(text, path, column):
        yield where, Prompt(line.strip())


def _json_lines(text: str, path: str | Path, column: str) -> Records:
    for where, line in _lines(text, path, column):
        if line.strip():
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                raise _unexpected(where, column) from None
            yield where, record if isinstance(record, dict) else None


def _json(text: str, path: str | Path, column: str) -> Records:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path}: not valid JSON: {error}; a file of one object a line is named .jsonl"
        ) from None
    if isinstance(data, dict):
        used = (_column(data, column, str(path)), _found(data, NEGATIVE, str(path)))
        lists = {name: data[name] for name in used if name is not None}
        lengths = {len(v) if isinstance(v, list) else None for v in lists.values()}
        if None in lengths or len(lengths) > 1:
            raise UserError(f"{path}: {', '.join(lists)}: expected lists, of one length")
        data = [dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True)]
    if not isinstance(data, list):
        raise UserError(f"{path}: expected a list of texts or of objects, or an object of lists")
    for number, record in enumerate(data, start=1):
        yield f"{path}, entry {number}", record


def _rows(text: str, path: str | Path, column: str, delimiter: str) -> Records:
    header: list[str] = []
    for number, cells in _cells(text, path, delimiter):
        where = f"{path}, line {number}"
        if not any(cells):
            continue
        if not header:
            header = [name.strip() for name in cells]
            _column(header, column, where)
            _found(header, NEGATIVE, where)
            continue
        if len(cells) != len(header):
            raise UserError(
                f"{where}: {len(cells)} cells, and the header has {len(header)}; a text that "
                f"holds {delimiter!r} needs quotes around it"
            )
        yield where, dict(zip(header, cells, strict=True))


def _cells(text: str, path: str | Path, delimiter: str) -> list[tuple[int, list[str]]]:
    """Last line and cells of each row.

    Tab-separated files come without any quoting too (PartiPrompts), where a quote is a quote: read
    so if they are not well quoted, and no cell looks as if it were.
    """
    rows = csv.reader(io.StringIO(text), delimiter=delimiter, strict=True)
    try:
        return [(rows.line_num, cells) for cells in rows]
    except csv.Error as error:
        plain = [line.split(delimiter) for line in text.split("\n")]
        if delimiter != "\t" or any(_QUOTED.fullmatch(c) for cells in plain for c in cells):
            raise UserError(f"{path}, line {rows.line_num}: {error}") from None
        return list(enumerate(plain, start=1))


FORMATS: dict[str, Callable[[str, str | Path, str], Records]] = {
    ".txt": _texts,
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": partial(_rows, delimiter=","),
    ".tsv": partial(_rows, delimiter="\t"),
}
"""What reads a prompt file, by its suffix in small letters."""


def train_prompts(path: str | Path, limit: int | None, column: str = COLUMN) -> list[Prompt]:
    """The prompts of a file that are trained on: ``limit`` of them, the same in every run.

    Raises:
        UserError: as :func:`read_prompts`.
    """
    found = read_prompts(path, column)
    if limit is None or limit >= len(found):
        return found
    return [found[row] for row in sorted(shuffled(range(len(found)), "prompts", "limit")[:limit])]
