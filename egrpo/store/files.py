"""Whole files or none: write to a temporary name beside the target, then ``os.replace``."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from stat import S_IMODE
from typing import Any

from egrpo.errors import UserError

NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
"""What a file system without a kind of lock answers."""


def no_space(error: BaseException) -> bool:
    """Whether an error means a full disk."""
    return _number(error) in (errno.ENOSPC, errno.EDQUOT)


def full_disk(path: str | Path) -> UserError:
    """What a user is told."""
    return UserError(
        f"{path}: no space left on the disk; free some and start again, finished work is kept"
    )


def refused(error: BaseException, path: str | Path | None = None) -> UserError | None:
    """What a user is told of a full disk, of rights or of a read-only file system; else None.

    ``path``: where the error does not name its file.
    """
    if no_space(error):
        return full_disk(path or getattr(error, "filename", None) or "results")
    number, path = _number(error), getattr(error, "filename", None) or path
    if number not in (errno.EROFS, errno.EACCES, errno.EPERM) or path is None:
        return None
    return UserError(
        f"{path}: {os.strerror(number)}; give this user the right to it, or use a folder that can "
        "be written (`results` names that of the results)"
    )


def _number(error: BaseException) -> int | None:
    """The system's number of an error; safetensors and shutil wrap its error in their own."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    found = re.search(r"os error (\d+)|\[Errno (\d+)\]", str(error))
    return int(found[1] or found[2]) if found else None


@contextmanager
def replacing(path: str | Path, *, synced: bool = True) -> Iterator[Path]:
    """Yields a temporary path; on success it is synced and replaces ``path`` atomically.

    The file has the mode that the umask gives a new one, whoever wrote it: safetensors makes its
    files readable by their owner alone. Raises UserError if the disk is full or may not be written;
    ``path`` then still holds what it held before.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)  # of a process that was killed
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        if temporary.stat().st_mode != mode:
            temporary.chmod(S_IMODE(mode))
        if synced:
            with open(temporary, "rb+") as handle:
                os.fsync(handle.fileno())
        os.replace(temporary, target)
    except Exception as error:
        if told := refused(error, target):
            raise told from None
        raise
    finally:
        with suppress(OSError):  # where nothing could be written it says so once
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
    if not (target.exists() and target.stat().st_size):
        with replacing(target, synced=False) as temporary:
            temporary.write_text(make(), encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write indented JSON atomically; NaN is refused, readers elsewhere cannot parse it."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Read a JSON file; UserError if it is missing or damaged."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged JSON ({error}); delete it and run again") from None


def checksums(folder: Path, but: str) -> dict[str, str]:
    """SHA-256 of each file below a folder, but of the one that will hold them."""
    out = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path != folder / but:
            with open(path, "rb") as handle:
                digest = hashlib.file_digest(handle, "sha256")
            out[path.relative_to(folder).as_posix()] = digest.hexdigest()
    return out


def checkpoints_in(folder: Path) -> list[int]:
    """Iterations that a training's state has checkpoints of, ascending."""
    names = (path.name for path in folder.glob("checkpoint-*.safetensors"))
    found = (re.fullmatch(r"checkpoint-(\d{6,})\.safetensors", name) for name in names)
    return sorted(int(match[1]) for match in found if match)


def lock(path: str | Path, *, wait: bool = False) -> int | None:
    """Take an exclusive lock; the kernel gives it back when this process is gone, however it ends.

    Where the file system has no ``flock``, by ``lockf``. That one is the process's: it cannot keep
    out the same process, and is given back when any descriptor of the file is closed.

    Returns a file descriptor, to be closed to give the lock back; None if somebody else has it and
    we do not ``wait``. Raises UserError if the file system has no locks at all.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    how = fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB)
    try:
        try:
            fcntl.flock(handle, how)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            fcntl.lockf(handle, how)
    except OSError as error:
        os.close(handle)
        if isinstance(error, BlockingIOError | PermissionError):  # EACCES is lockf's other word
            return None
        if error.errno not in NO_LOCKS:
            raise
        raise UserError(
            f"{path}: its file system has no locks ({error.strerror}), which keep two processes "
            "from writing the same files; mount it with them (Lustre: -o flock), or use a folder "
            "on another file system"
        ) from None
    return handle


@contextmanager
def alone(path: str | Path) -> Iterator[None]:
    """Within it no other process is within the same; waits for its turn."""
    handle = lock(path, wait=True)
    assert handle is not None
    try:
        yield
    finally:
        os.close(handle)
