"""The append-only record of a training run: one JSON line per iteration.

Snakemake deletes a rule's log before every attempt, so this file lives beside the state. A line:
``{"iteration": 7, "time": 1790000000.0, "nfe": 28112, "metrics": {"reward/verifier": 0.61, ...},
"rollouts": {"prompt_id": [...], ...}}``. Iteration 0 holds what was measured before training.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from egrpo.store.files import write_text

Line = dict[str, Any]


def read(path: str | Path) -> Iterator[Line]:
    """Complete lines in order, up to the first that is damaged or torn (power loss, kill)."""
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except FileNotFoundError:
        return
    for raw in lines[:-1]:
        try:
            line = json.loads(raw)
        except (ValueError, RecursionError):
            return
        if not isinstance(line, dict) or not isinstance(line.get("iteration"), int):
            return
        yield line


def append(path: str | Path, line: Line) -> None:
    """Append one line and sync it. NaN metrics are stored as null."""
    text = json.dumps(_plain(line), allow_nan=False)
    with open(path, "a", encoding="utf-8") as handle:
        handle.write(text + "\n")
        handle.flush()
        os.fsync(handle.fileno())


def rewind(path: str | Path, iteration: int) -> None:
    """Keep only the lines up to ``iteration``: what a resumed run will not repeat."""
    if not Path(path).exists():
        return
    kept = [line for line in read(path) if line["iteration"] <= iteration]
    write_text(path, "".join(json.dumps(line) + "\n" for line in kept))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
