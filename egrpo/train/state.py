"""A run's state on disk: checkpoints, journal, grids, snapshots; and what of it is lost."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from egrpo.config.models import RunConfig
from egrpo.errors import UserError, say
from egrpo.measure.monitors import whole_grid
from egrpo.sampling.processes import Processes
from egrpo.store import checkpoint as checkpoints
from egrpo.store import journal
from egrpo.store.checkpoint import Checkpoint
from egrpo.store.files import lock
from egrpo.train.records import Metrics, spent_on_training
from egrpo.train.trainer import Trainer
from egrpo.train.warnings import DISTANCE

LEASE_WAIT = 60.0
"""Seconds that a job waits for another one to leave its state folder."""


@contextmanager
def only_one(folder: Path, run: str, processes: Processes) -> Iterator[None]:
    """The lease of a job on its state folder; a dead owner holds nothing.

    A job that is started again while its first copy still saves waits for it, so long; then a
    UserError.
    """
    if not processes.main:
        yield
        return
    until, told = time.monotonic() + LEASE_WAIT, False
    while (held := lock(folder / "lock")) is None:
        if time.monotonic() > until:
            raise UserError(
                f"run {run}: {folder}: another process is training it; wait for it or end it"
            )
        if not told:
            say(f"{run}: waiting for another process to leave {folder}")
            told = True
        time.sleep(0.5)
    try:
        yield
    finally:
        os.close(held)


@dataclass(frozen=True)
class State:
    """What a training goes on from, in a folder."""

    run: RunConfig
    folder: Path

    @property
    def log(self) -> Path:
        """The journal."""
        return self.folder / "journal.jsonl"

    def grid(self, iteration: int) -> Path:
        """Images of an iteration's monitor."""
        return self.folder / "monitor" / f"iteration-{iteration:06d}.png"

    def snapshot(self, limit: int) -> Path:
        """Weights that stay within so many evaluations."""
        return self.folder / "snapshots" / str(limit)

    def history(self) -> list[tuple[int, Metrics]]:
        """(iteration, metrics) so far; a resumed run warns and stops as one at a time."""
        return [(line["iteration"], line["metrics"]) for line in journal.read(self.log)]

    def record(self, trainer: Trainer, metrics: Metrics, rows: dict[str, list[Any]]) -> None:
        """Add the line of an iteration to the journal."""
        line = {
            "iteration": trainer.iteration,
            "time": time.time(),
            "nfe": spent_on_training(trainer.counts),
            "metrics": metrics,
            "rollouts": rows,
        }
        journal.append(self.log, line)

    def keep_snapshots(self, trainer: Trainer, ahead: int | None) -> None:
        """Keep the weights for each budget that ``ahead`` more evaluations exceed (None: all)."""
        spent = spent_on_training(trainer.counts)
        for limit in self.run.train.snapshots:
            target = self.snapshot(limit)
            within = ahead is not None and spent + ahead <= limit
            if trainer.processes.from_main(target.is_dir) or within:
                continue
            unfinished = target.with_name(f"{limit}.unfinished")
            if trainer.processes.main:
                shutil.rmtree(unfinished, ignore_errors=True)
            trainer.save(unfinished)
            if trainer.processes.main:
                checkpoints.seal_snapshot(unfinished, trainer.iteration, spent, trainer.seconds)
                unfinished.rename(target)

    # -- what is lost ------------------------------------------------------------------------

    def where_to_go_on(self) -> Checkpoint | None:
        """The newest checkpoint, or the one before where that makes again what was lost since.

        None: begin, also for a snapshot that was passed and is not there.
        """
        name = self.run.run
        for kept in filter(Path.is_dir, map(self.snapshot, self.run.train.snapshots)):
            try:
                checkpoints.read_snapshot(kept)
            except UserError as error:
                say(f"{name}: {error}")
                shutil.rmtree(kept)
        newest = found = checkpoints.latest(self.folder)
        if newest is None or found is None:
            return None
        lines, grids = self._lost(newest.iteration)
        passed = self._snapshot_missed(newest)
        if lines or grids or passed:
            before = checkpoints.latest(self.folder, before=newest.iteration)
            if before and (passed or max(lines + grids) > before.iteration):
                found = before
        if self._snapshot_missed(found):
            say(f"{name}: starting over for a snapshot that it passed")
            checkpoints.remove(self.folder)
            # of one trajectory, all of them
            shutil.rmtree(self.folder / "snapshots", ignore_errors=True)
            return None
        if found is not newest:
            say(
                f"{name}: going back from iteration {newest.iteration} to {found.iteration}, to "
                "make again what was lost since"
            )
        return found

    def say_lost(self, until: int) -> int:
        """Say what the results will lack; returns the number of lost lines."""
        lines, grids = self._lost(until)
        lacks = [
            f"{what} lack {len(lost)} iterations "
            f"({', '.join(map(str, lost[:5]))}{', …' * (len(lost) > 5)})"
            for what, lost in (("curves and tables", lines), ("images of the monitor", grids))
            if lost
        ]
        if lacks:
            say(
                f"{self.run.run}: {self.folder}: journal or images damaged or lost: "
                f"{' and '.join(lacks)}; delete the folder to train the run from the beginning"
            )
        return len(lines)

    def _lost(self, until: int) -> tuple[list[int], list[int]]:
        """Iterations without a whole line in the journal, and without a whole grid."""
        found = {n: metrics for n, metrics in self.history() if n <= until}
        first = 0 if self.run.train.monitor_every else 1
        lines = [n for n in range(first, until + 1) if n not in found]
        monitored = [n for n, metrics in found.items() if DISTANCE in metrics]
        return lines, [n for n in monitored if not whole_grid(self.grid(n))]

    def _snapshot_missed(self, found: Checkpoint) -> bool:
        """Whether a snapshot asked for now lies before the checkpoint and was not kept."""
        spent = spent_on_training(found.numbers["counts"])
        return any(
            limit < spent and not self.snapshot(limit).is_dir()
            for limit in self.run.train.snapshots
        )
