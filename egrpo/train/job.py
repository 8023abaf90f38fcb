"""The training job: resume, loop, and the outputs at the end."""

from __future__ import annotations

import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

from egrpo.config.models import RunConfig
from egrpo.core.plan import Plan
from egrpo.errors import say
from egrpo.measure.monitors import PROMPTS, load_grid, save_grid, whole_grid
from egrpo.models.conditioning import Embeddings
from egrpo.progress import Progress
from egrpo.store import checkpoint as checkpoints
from egrpo.store import journal
from egrpo.store.files import checkpoints_in, write_json
from egrpo.store.tables import ROLLOUTS, TRAIN_METRICS, write_table
from egrpo.train.records import Metrics, metric_rows, rollout_columns
from egrpo.train.state import State, only_one
from egrpo.train.trainer import Trainer
from egrpo.train.warnings import DISTANCE, beyond_bounds, training_warnings


class Tracker(Protocol):
    """What is told of a run while it trains: kinds of what is wrong with it so far."""

    warnings: tuple[str, ...]


Live = Callable[[str, Path, Path], AbstractContextManager[Tracker]]
"""From the key of a trajectory, its journal, and the folder of its monitors' images."""


def train(
    run: RunConfig,
    plan: Plan | None,
    embeddings: Embeddings,
    *,
    state: Path,
    output: Path,
    live: Live | None = None,
) -> None:
    """Train one run to its end, from wherever its state is.

    ``state``, a folder named by what the weights of each iteration are computed from, is gone on
    from; adapter/, monitor/, snapshots/, train.json and two tables come into ``output``. Raises
    UserError for bad input, a full disk, an iteration without any valid reward, or weights that
    make no images; SystemExit after SIGTERM or SIGINT, with everything saved.
    """
    trainer, t = Trainer(run, plan, embeddings), run.train
    processes, steps = trainer.processes, t.iterations * t.updates
    if t.ema_decay and steps < t.ema_every - 1 and processes.main:
        say(
            f"{run.run}: train.ema_every: the averaged weights, which are kept and evaluated, "
            f"first move after optimizer step {t.ema_every - 1}, and this run takes {steps}: "
            "its result is the untrained model"
        )
    # the state of a longer training stays for one that is wanted longer again
    longer = any(n > t.iterations for n in checkpoints_in(state))
    folder = state / f"until-{t.iterations}" if longer else state
    folder.mkdir(parents=True, exist_ok=True)
    with preemption() as wanted, only_one(folder, run.run, processes):
        job = Job(trainer, State(run, folder), wanted)
        fresh = not job.resume()
        track = live if processes.main and run.tracking.enabled else None
        images = folder / "monitor"
        with track(state.name, job.state.log, images) if track else nullcontext() as tracker:
            job.finish(tracker, fresh=fresh)
        job.write_outputs(state.name, output)


@contextmanager
def preemption() -> Iterator[Callable[[], int]]:
    """Within it SIGTERM, and SIGINT of the keyboard, ask to save at the end of the iteration.

    Yields the signal's number, 0 before one came. Further ones change nothing: SLURM, the terminal
    and a launcher send one each to every process. But a SIGINT after a second ends at once.
    """
    asked, since = 0, 0.0

    def ask(number: int, frame: object) -> None:
        nonlocal asked, since
        if not asked:
            say(f"{signal.Signals(number).name}: saving at the end of this iteration")
            asked, since = number, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() > since + 1.0:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Job:
    """One start of a training."""

    def __init__(self, trainer: Trainer, state: State, preempted: Callable[[], int]) -> None:
        self.trainer, self.state, self.preempted = trainer, state, preempted
        self.run, self.processes, self.main = trainer.run, trainer.processes, trainer.processes.main
        self.said: dict[str, str] = {}  # warnings that its log holds, by kind
        self.stopped: dict[str, str] = {}  # bounds that ended the training, and what happened

    def resume(self) -> bool:
        """Go on from the state; False if there is none."""
        state, processes = self.state, self.processes
        found = state.where_to_go_on() if self.main else None
        iteration = processes.from_main(lambda: found.iteration if found else None)
        if self.main:
            journal.rewind(state.log, -1 if iteration is None else iteration)
        if iteration is None:
            return False
        if self.run.train.monitor_every:
            self._recall_untrained()
        self.trainer.restore(found or checkpoints.at(state.folder, iteration))
        if self.main:
            say(f"{self.run.run}: going on after iteration {iteration}")
            state.say_lost(iteration)
        return True

    def _recall_untrained(self) -> None:
        """What the monitor showed of the untrained model, which this still is; or look again."""
        state, run, first = self.state, self.run, self.state.grid(0)
        line, grid = self.processes.from_main(
            lambda: (0 in dict(state.history()), whole_grid(first))
        )
        if line and grid:
            size = run.model.height, run.model.width
            self.trainer.monitor.base = load_grid(first, run.train.monitor_samples, *size)
            return
        if self.main:
            say(
                f"{run.run}: {state.folder}: the journal's first line or {first.name} was damaged "
                "or lost: the untrained model is measured again"
            )
        metrics = self._look()
        if self.main and not line:
            state.record(self.trainer, metrics, {})

    def _look(self) -> Metrics:
        """What the monitor says now; its images are kept."""
        iteration = self.trainer.iteration
        metrics, images = self.trainer.monitor.look(iteration)
        if self.main:
            save_grid(self.state.grid(iteration), images, self.run.train.monitor_samples)
        return metrics

    def finish(self, tracker: Tracker | None, *, fresh: bool) -> None:
        """Train to the last iteration, or until a bound stops it; SystemExit after a signal."""
        run, t, trainer, state = self.run, self.run.train, self.trainer, self.state
        if fresh and t.monitor_every:
            metrics = self._look()
            if self.main:
                state.record(trainer, metrics, {})
            self._save()
        history = self.processes.from_main(state.history)
        self._check_bounds(history)
        if trainer.iteration == t.iterations and not self.stopped:
            self._look_at_the_end(history)
        stop = 0
        with Progress(t.iterations, run.run, trainer.iteration, shown=self.main) as progress:
            while trainer.iteration < t.iterations and not self.stopped and not stop:
                metrics = self._iterate(history, tracker)
                stop = max(self.processes.gather(self.preempted()))
                n = trainer.iteration
                if n % t.checkpoint_every == 0 or n == t.iterations or self.stopped or stop:
                    self._save()
                progress.step(
                    "  ".join(f"{name} {metrics[f'reward/{name}']:.4f}" for name in t.rewards)
                    + f"  grad_norm {metrics['grad_norm']:.3g}"
                )
        if trainer.iteration < t.iterations and not self.stopped:
            if self.main:
                say(f"{run.run}: saved after iteration {trainer.iteration}")
            sys.exit(128 + stop)
        state.keep_snapshots(trainer, None)
        self._warn(history, tracker, ended=True)

    def _look_at_the_end(self, history: list[tuple[int, Metrics]]) -> None:
        """Of a state that a longer training left, the last iteration need not be monitored yet."""
        number, metrics = history[-1] if history else (-1, {})
        if not self.run.train.monitor_every or number != self.trainer.iteration:
            return
        if DISTANCE in metrics:
            return
        rows = self.processes.from_main(lambda: journal.read(self.state.log)[-1]["rollouts"])
        metrics |= self._look()
        self._check_bounds(history)
        if self.main:
            journal.rewind(self.state.log, number - 1)  # a line of each iteration
            self.state.record(self.trainer, metrics, rows)
        self._save()

    def _iterate(self, history: list[tuple[int, Metrics]], tracker: Tracker | None) -> Metrics:
        """One iteration: trained, monitored, warned of and recorded."""
        t, trainer = self.run.train, self.trainer
        if t.snapshots:
            self.state.keep_snapshots(trainer, trainer.cost(trainer.iteration + 1).total)
        metrics, rows = trainer.step()
        n, last = trainer.iteration, trainer.iteration == t.iterations
        if t.monitor_every and (n % t.monitor_every == 0 or last):
            metrics |= self._look()
        elif last:
            trainer.monitor.check_weights(n)
        history.append((n, metrics))
        self._check_bounds(history)
        self._warn(history, tracker)
        if self.main:
            self.state.record(trainer, metrics, rows)
        return metrics

    def _save(self) -> None:
        checkpoint = self.trainer.checkpoint()  # by all processes: sharded weights are gathered
        if self.main:
            checkpoints.save(self.state.folder, checkpoint)

    def _check_bounds(self, history: list[tuple[int, Metrics]]) -> None:
        beyond, bounds = beyond_bounds(self.run, history), self.run.bounds
        self.stopped = {k: text for k, text in beyond.items() if bounds[k].action == "stop"}

    def _warn(
        self, history: list[tuple[int, Metrics]], tracker: Tracker | None, *, ended: bool = False
    ) -> None:
        """Say each kind of warning when it begins, and at the end what has become of it."""
        if not self.main:
            return
        found = training_warnings(self.run, history)
        for kind, text in found.items():
            if self.said.get(kind) == text or (kind in self.said and not ended):
                continue
            self.said[kind] = text
            what = "stops" if kind.removeprefix("bound/") in self.stopped else "goes on"
            line = f"iteration {history[-1][0]}: {text}; training {what}"
            say(f"{self.run.run}: {f'at the end: {text}' if ended else line}")
        if tracker is not None:
            tracker.warnings = tuple(found)

    def write_outputs(self, key: str, output: Path) -> None:
        """Declared outputs appear only here, at the end; of the trajectory ``key``."""
        run, t, trainer, state = self.run, self.run.train, self.trainer, self.state
        if self.main:
            for name in ("adapter", "monitor", "snapshots"):
                shutil.rmtree(output / name, ignore_errors=True)
        trainer.save(output / "adapter")
        if not self.main:
            return
        lost, every, last = state.say_lost(trainer.iteration), t.monitor_every, trainer.iteration
        # the monitors of a training of so many iterations, went it on or not
        looked = sorted({*range(0, last + 1, every), last}) if every else []
        (output / "monitor").mkdir(parents=True, exist_ok=True)
        for grid in filter(whole_grid, map(state.grid, looked)):
            shutil.copyfile(grid, output / "monitor" / grid.name)
        shown = {"prompts": list(trainer.monitor.texts), "samples": t.monitor_samples}
        write_json(output / "monitor" / PROMPTS, shown)
        (output / "snapshots").mkdir()
        for limit in t.snapshots:
            copy = output / "snapshots" / str(limit)
            shutil.copytree(state.snapshot(limit), copy, copy_function=shutil.copyfile)
            checkpoints.read_snapshot(copy)
        head, metrics = {"config_hash": key}, metric_rows(run, state.log, looked)
        write_table(output / "train_metrics.parquet", TRAIN_METRICS, metrics, metadata=head)
        rows = rollout_columns(run.run, state.log)
        write_table(output / "rollouts.parquet", ROLLOUTS, rows, metadata=head)
        record: dict[str, Any] = {
            "run": run.run,
            "key": key,
            "iterations": last,
            "iterations_lost": lost,
            "stopped": self.stopped,
            **{f"nfe_{name}": count for name, count in trainer.counts.items()},
            "seconds": round(trainer.seconds, 3),
            "trainable_parameters": sum(p.numel() for p in trainer.parameters),
            "peak_memory_mib": round(trainer.peak_mib, 1),
        }
        write_json(output / "train.json", record)
