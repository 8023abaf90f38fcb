"""Progress for people: a bar with rate and time left on a terminal, one line a step elsewhere.

Where several jobs share a terminal (under Snakemake) bars would overwrite each other: each job
writes its lines to its log, and now and then one to the file descriptor EGRPO_PROGRESS_FD.
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from typing import Self

from tqdm import tqdm

from egrpo.errors import say

SHARED_EVERY = 10.0
"""Seconds between the lines that one job writes to a shared terminal."""


class Progress:
    """``with Progress(total, "train", done) as progress: progress.step("reward 0.61")``."""

    def __init__(
        self, total: int, title: str, done: int = 0, unit: str = "it", *, shown: bool = True
    ) -> None:
        self.total, self.title, self.done, self.first = total, title, done, done
        self.unit, self.shown = unit, shown
        self.begun = self.told = time.monotonic()
        self.shared = int(os.environ.get("EGRPO_PROGRESS_FD", "-1"))
        self.bar = (
            tqdm(total=total, initial=done, desc=title, unit=unit, dynamic_ncols=True)
            if shown and sys.stderr.isatty()
            else None
        )

    def step(self, text: str = "", count: int = 1) -> None:
        """``count`` more units are done; ``text`` says what they gave."""
        self.done += count
        if not self.shown:
            return
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(count)
            return
        now = time.monotonic()
        rate = (self.done - self.first) / max(now - self.begun, 1e-9)
        left = (self.total - self.done) / rate
        head = f"{self.title} {self.done}/{self.total}  {rate:.2f} {self.unit}/s"
        line = f"{head}  {left:.0f} s left  {text}".rstrip()
        say(line)
        if self.shared >= 0 and (now - self.told > SHARED_EVERY or self.done == self.total):
            self.told = now
            with suppress(OSError):  # the terminal went away; the work goes on
                os.write(self.shared, f"{line}\n".encode())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.close()
