"""Whole files or none: write to a temporary name beside the target, then ``os.replace``."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from stat import S_IMODE
from typing import Any

from egrpo.errors import UserError


def no_space(error: BaseException) -> bool:
    """Whether an error means a full disk; safetensors wraps the system's error in its own."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return f"os error {errno.ENOSPC}" in str(error) or f"os error {errno.EDQUOT}" in str(error)


def full_disk(path: str | Path) -> UserError:
    """What a user is told."""
    return UserError(
        f"{path}: no space left on the disk; free some and start again, finished work is kept"
    )


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path; on success it is synced and replaces ``path`` atomically.

    The file has the mode that the umask gives a new one, whoever wrote it: safetensors makes its
    files readable by their owner alone.

    Raises:
        UserError: if the disk is full. ``path`` then still holds what it held before.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        temporary.unlink(missing_ok=True)  # of a process that was killed
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        if temporary.stat().st_mode != mode:
            temporary.chmod(S_IMODE(mode))
        with open(temporary, "rb+") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, target)
    except Exception as error:
        if no_space(error):
            raise full_disk(target) from None
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_once(path: str | Path, make: Callable[[], str]) -> None:
    """Write a text whose name says what it holds, if it is not there.

    Whole or not at all, but not synced: a sweep has thousands. What a power failure leaves empty is
    written again.
    """
    target = Path(path)
    if target.exists() and target.stat().st_size:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(make(), encoding="utf-8")
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any) -> None:
    """Write indented JSON atomically; NaN is refused, readers elsewhere cannot parse it."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        UserError: if it is missing or damaged.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged JSON ({error}); delete it and run again") from None


def lock(path: str | Path) -> int | None:
    """Take an exclusive lock; the kernel gives it back when this process is gone, however it ends.

    Returns:
        A file descriptor: close it to give the lock back. None if somebody else has it.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    return handle
