"""`egrpo lease`: a command with GPUs of its own, where jobs know nothing of each other.

Each GPU has a lock file. A job takes all the locks that it needs or none, so no two jobs wait for
each other, and becomes the command: the locks are open files of that very process, and the kernel
gives them back when it is gone, however it ends. Workers of a launcher die with it
(``processes.die_with_parent``).
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from egrpo.errors import UserError, say
from egrpo.store.files import alone, lock

PAUSE = 0.5
"""Seconds between two looks at the locks."""


def present() -> list[str]:
    """GPUs that this process may use: CUDA_VISIBLE_DEVICES, or all that nvidia-smi lists.

    Raises:
        UserError: if there is neither.
    """
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name.strip() for name in given.split(",") if name.strip()]
    command = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        raise UserError(
            "egrpo lease: nvidia-smi lists no GPUs; name them by --ids or CUDA_VISIBLE_DEVICES"
        ) from None
    return found.stdout.split()


def take(count: int, ids: Sequence[str], folder: Path) -> list[tuple[str, int]] | None:
    """``count`` free GPUs with the descriptors of their locks, or None; never some of them."""
    held: list[tuple[str, int]] = []
    with alone(folder / "all.lock"):  # one job looks at a time
        for name in ids:
            if (handle := lock(folder / f"{name}.lock")) is not None:
                held.append((name, handle))
            if len(held) == count:
                return held
        for _, handle in held:
            os.close(handle)
    return None


def lease(count: int, command: Sequence[str], ids: Sequence[str] = ()) -> NoReturn:
    """Wait for ``count`` GPUs and become ``command`` with CUDA_VISIBLE_DEVICES set to them.

    ``ids`` are GPUs to choose from; none means :func:`present`.

    Raises:
        UserError: if there are fewer GPUs than that, or the command does not exist.
    """
    names = list(dict.fromkeys(ids)) or present()
    if count > len(names):
        raise UserError(f"egrpo lease: --gpus {count}, but there are {len(names)}")
    # the lock files are on this machine, not on a shared file system
    root = os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()
    where = Path(root) / f"egrpo-gpus-{os.getuid()}"
    where.mkdir(mode=0o700, parents=True, exist_ok=True)
    if (held := take(count, names, where)) is None:
        say(f"waiting for {count} of {len(names)} GPUs")
    while held is None:
        time.sleep(PAUSE)
        held = take(count, names, where)
    for _, handle in held:
        os.set_inheritable(handle, True)  # they live as long as the command
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(name for name, _ in held)
    try:
        os.execvp(command[0], list(command))
    except OSError as error:
        raise UserError(f"egrpo lease: {command[0]}: {error.strerror}") from None
