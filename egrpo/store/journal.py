"""The append-only record of a training run: one JSON line per iteration.

Snakemake deletes a rule's log before every attempt, so this file lives beside the state. A line:
``{"iteration": 7, "time": 1790000000.0, "nfe": 28112, "metrics": {"reward/verifier": 0.61, ...},
"rollouts": {"prompt_id": [...], ...}, "crc32": "0e1c45f3"}``. Iteration 0 holds what was measured
before training. The checksum is of the bytes before it; lines of earlier versions have none.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from pathlib import Path
from typing import Any

from egrpo.errors import UserError, say
from egrpo.store.files import replacing, write_text

Line = dict[str, Any]

_LINE = re.compile(rb'(\{"iteration": \d+\b.*), "crc32": "([0-9a-f]{8})"\}')
_BEGIN = re.compile(rb'\n|(?=\{"iteration": )')
"""Lines begin here, also where the end of the one before was lost."""
_UNSUMMED = {"iteration": int, "nfe": int, "metrics": dict, "rollouts": dict}
"""Keys of a line of earlier versions beside its time, and of what kind they are."""


def read(path: str | Path) -> list[Line]:
    """Whole lines in order of iteration, wherever damaged ones are; of two of one the last.

    Raises UserError if the file is there and the system cannot read it.
    """
    return _whole(path)[0]


def line_of(text: bytes) -> Line | None:
    """The line that a piece of the file is; None where it is damaged or torn."""
    if summed := _LINE.match(text):
        whole = f"{zlib.crc32(summed[1]):08x}".encode() == summed[2]
        return dict(json.loads(summed[1] + b"}")) if whole else None
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict) or line.keys() != {"time", *_UNSUMMED}:
        return None
    return line if all(type(line[key]) is kind for key, kind in _UNSUMMED.items()) else None


def append(path: str | Path, line: Line) -> None:
    """Append one line and sync it. NaN metrics are stored as null."""
    with open(path, "a", encoding="utf-8") as handle:
        handle.write(_text(line))
        handle.flush()
        os.fsync(handle.fileno())


def rewind(path: str | Path, iteration: int) -> None:
    """Keep the whole lines up to ``iteration``: what a resumed run will not repeat.

    Damage is said in one line, and the file as it was found stays beside as ``*.damaged``.
    """
    if not Path(path).exists():
        return
    lines, damaged, doubled = _whole(path)
    if damaged or doubled:
        aside = Path(path).with_suffix(".damaged")
        with replacing(aside) as temporary:
            temporary.write_bytes(Path(path).read_bytes())
        say(
            f"{path}: damaged journal: {damaged} lines cannot be read, {doubled} are there twice; "
            f"mended from the {len(lines)} whole ones, the file as it was is {aside.name}"
        )
    write_text(path, "".join(_text(line) for line in lines if line["iteration"] <= iteration))


def _whole(path: str | Path) -> tuple[list[Line], int, int]:
    """The whole lines by iteration, and how many are damaged and how many there again.

    What a kill leaves, a torn end, is no damage.
    """
    try:
        pieces = _BEGIN.split(Path(path).read_bytes())
    except FileNotFoundError:
        return [], 0, 0
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); move it away: training goes on, and its "
            "curves lack what it held"
        ) from None
    whole: dict[int, Line] = {}
    damaged = doubled = 0
    for number, piece in enumerate(pieces):
        if line := line_of(piece):
            doubled += line["iteration"] in whole
            whole[line["iteration"]] = line
        else:
            damaged += bool(piece) and number < len(pieces) - 1
    return [whole[n] for n in sorted(whole)], damaged, doubled


def _text(line: Line) -> str:
    plain = json.loads(json.dumps(line), parse_constant=lambda number: None)  # NaN, Infinity
    text = json.dumps({"iteration": plain["iteration"], **plain})[:-1]
    return f'{text}, "crc32": "{zlib.crc32(text.encode()):08x}"}}\n'
