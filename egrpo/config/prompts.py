"""Prompt files. Needs no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from egrpo.core.seeds import shuffled
from egrpo.errors import UserError


@dataclass(frozen=True)
class Prompt:
    """One line of a prompt file; its id is its row."""

    text: str
    negative: str = ""


def read_prompts(path: str | Path) -> list[Prompt]:
    """A .txt file (one prompt a line) or .jsonl file (`prompt`, optional `negative_prompt`).

    Empty lines are left out, so ids count prompts.

    Raises:
        UserError: if the file is missing, empty, or a line cannot be read.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError:
        raise UserError(f"{path}: no such prompt file (prompts.train, prompts.heldout)") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: prompt file cannot be read as UTF-8: {error}") from None
    prompts = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if Path(path).suffix != ".jsonl":
            prompts.append(Prompt(line.strip()))
            continue
        try:
            prompts.append(prompt_of(json.loads(line)))
        except (ValueError, RecursionError):
            raise UserError(
                f'{path}, line {number}: expected a JSON object whose "prompt" is text, and '
                '"negative_prompt" text or null'
            ) from None
    if not prompts:
        raise UserError(f"{path}: holds no prompt")
    return prompts


def prompt_of(record: Any) -> Prompt:
    """The prompt of one line of JSON.

    Raises:
        ValueError: if it holds none.
    """
    if not isinstance(record, dict):
        raise ValueError
    text, negative = record.get("prompt"), record.get("negative_prompt")
    negative = "" if negative is None else negative
    if not (isinstance(text, str) and isinstance(negative, str)):
        raise ValueError
    (text + negative).encode()  # half a character, as JSON can spell it, is a UnicodeEncodeError
    return Prompt(text, negative)


def train_prompts(path: str | Path, limit: int | None) -> list[Prompt]:
    """The prompts of a file that are trained on: ``limit`` of them, the same in every run.

    Raises:
        UserError: as :func:`read_prompts`.
    """
    found = read_prompts(path)
    if limit is None or limit >= len(found):
        return found
    return [found[row] for row in sorted(shuffled(range(len(found)), "prompts", "limit")[:limit])]
