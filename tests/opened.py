"""Which files of a folder a call opens, whoever opens them: Python, Rust or C (Linux)."""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

IN_OPEN, IN_ISDIR = 0x20, 0x40000000


def opened(root: Path, call: Callable[[], Any]) -> set[str]:
    """Names below ``root`` of the files that ``call`` opens, from the kernel (inotify)."""
    libc = ctypes.CDLL(None, use_errno=True)
    queue = libc.inotify_init1(os.O_NONBLOCK)
    folders = [root, *(path for path in root.rglob("*") if path.is_dir())]
    watched = {libc.inotify_add_watch(queue, bytes(f), IN_OPEN): f for f in folders}
    assert -1 not in watched, os.strerror(ctypes.get_errno())
    try:
        call()
        events = b""
        try:
            while more := os.read(queue, 1 << 20):
                events += more
        except BlockingIOError:
            pass
    finally:
        os.close(queue)
    found, begin = set(), 0
    while begin < len(events):
        watch, mask, _, size = struct.unpack_from("iIII", events, begin)
        name = events[begin + 16 : begin + 16 + size].rstrip(b"\0").decode()
        assert watch in watched, "too many events: the kernel dropped some"
        if not mask & IN_ISDIR:
            found.add((watched[watch] / name).relative_to(root).as_posix())
        begin += 16 + size
    return found
