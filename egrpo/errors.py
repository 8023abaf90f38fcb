"""How errors reach a user: as a single line, or with a note of what was being done."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Bad input, said in one line: which file and key, what is wrong, what would be right.

    The command line prints the message without a traceback and exits with status 2.
    """


@contextmanager
def during(what: str) -> Iterator[None]:
    """Note on any error what was being done; the innermost note comes first."""
    try:
        yield
    except Exception as error:
        error.add_note(f"while {what}")
        raise
