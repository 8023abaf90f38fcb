"""How errors reach a user: as a single line, or with a note of what was being done."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

LONGEST = 1500
"""Characters of a message; what is longer loses its middle."""


class UserError(Exception):
    """Bad input, said in one line: which file and key, what is wrong, what would be right.

    The command line prints the message without a traceback and exits with status 2.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


def printable(text: str) -> str:
    """One line that any terminal can show: names and values come from files."""
    if len(text) > LONGEST:
        text = f"{text[: LONGEST - 500]} … {text[-490:]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def say(text: str) -> None:
    """One line for whoever watches a job."""
    print(text, file=sys.stderr, flush=True)


def one_line(error: BaseException, most: int = 300) -> str:
    """An error's text on one line."""
    return " ".join(str(error).split())[:most]


@contextmanager
def during(what: str) -> Iterator[None]:
    """Note on any error what was being done; the innermost note comes first."""
    try:
        yield
    except Exception as error:
        error.add_note(f"while {what}")
        raise


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """Turn whatever a library raises about a file or a setting into one line after ``what``.

    What it raises where memory is short stays as it is.
    """
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:  # of many kinds, and all mean: not usable
        if type(error).__name__ == "OutOfMemoryError":  # torch's, which this room does not import
            raise
        raise UserError(f"{what}: {one_line(error) or type(error).__name__}") from None


DEFAULT = Path("config/config.yaml")
"""The study of whoever names none."""


def command(configs: Sequence[str | Path], *targets: str | Path) -> str:
    """What makes results of the study in these files, to be shown as a remedy.

    ``configs`` is empty where the caller does not know them.
    """
    words = ["snakemake", "--cores", "all", *map(str, targets)]
    if configs and list(map(Path, configs)) != [DEFAULT]:
        words += ["--configfile", *map(str, configs)]
    return shlex.join(words)
