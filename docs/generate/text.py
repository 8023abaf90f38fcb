"""Pieces of Markdown that generated pages share."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence


def cell(text: str) -> str:
    """A text that a cell of a table can hold, its code spans untouched."""
    parts = text.split("`")
    plain = (part.replace("<", "&lt;").replace("*", "\\*") for part in parts[::2])
    out = [*parts]
    out[::2] = plain
    return "`".join(out).replace("|", "\\|")


def rows(head: Sequence[str], body: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    lines = [head, ["---"] * len(head), *body]
    return ["| " + " | ".join(line).strip() + " |" for line in lines]


def paragraph(text: str) -> list[str]:
    """Lines of one paragraph."""
    return textwrap.wrap(text, 100, break_long_words=False, break_on_hyphens=False)
