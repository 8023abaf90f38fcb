"""The training job: resume, loop, journal, checkpoint, and the outputs at the end."""

from __future__ import annotations

import os
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
from egrpo.errors import UserError
from egrpo.measure.monitors import PROMPTS, load_grid, save_grid, whole_grid
from egrpo.models.conditioning import Embeddings
from egrpo.progress import Progress
from egrpo.sampling.processes import Processes
from egrpo.store import checkpoint as checkpoints
from egrpo.store import journal
from egrpo.store.checkpoint import Checkpoint
from egrpo.store.files import checkpoints_in, lock, write_json
from egrpo.store.tables import ROLLOUTS, TRAIN_METRICS, write_table
from egrpo.train.records import Metrics, metric_rows, rollout_columns
from egrpo.train.trainer import Trainer
from egrpo.train.warnings import DISTANCE, History, beyond_bounds, training_warnings


class Tracker(Protocol):
    """What is told of a run while it trains.

    Attributes:
        warnings: kinds of what is wrong with it so far.
    """

    warnings: tuple[str, ...]


Live = Callable[[str, Path, Path], AbstractContextManager[Tracker]]
"""From the key of a trajectory, its journal, and the folder of its monitors' images."""

LEASE_WAIT = 60.0
"""Seconds that a job waits for another one to leave its state folder."""

EVALUATIONS = ("forward", "train", "reference")
"""Counters of network evaluations that belong to training."""


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

    Args:
        run, plan: resolved settings, and the merge plan if the method has one.
        embeddings: files of the embedded prompts to train on and to monitor.
        state: folder of checkpoints and journal, named by what the weights of each iteration are
            computed from: whatever lies there is gone on from.
        output: folder for adapter/, monitor/, snapshots/, train.json and the two tables.
        live: tracks the run while it trains; None: nothing does.

    Raises:
        UserError: for bad input, a full disk, an iteration without any valid reward, or weights
            that make no images.
        SystemExit: after SIGTERM, with everything saved.
    """
    trainer = Trainer(run, plan, embeddings)
    t = run.train
    if (
        trainer.average.weights is not None
        and t.iterations * t.updates < t.ema_every - 1
        and trainer.processes.main
    ):
        print(
            f"{run.run}: train.ema_every: the averaged weights, which are kept and evaluated, "
            f"first move after optimizer step {t.ema_every - 1}, and this run takes "
            f"{t.iterations * t.updates}: its result is the untrained model",
            file=sys.stderr,
            flush=True,
        )
    folder = _folder(state, t.iterations)
    folder.mkdir(parents=True, exist_ok=True)
    with preemption() as wanted, only_one(folder, run.run, trainer.processes):
        _resume_and_train(trainer, folder, state.name, output, live, wanted)


def _folder(state: Path, iterations: int) -> Path:
    """Where the state lies; that of a longer training stays for one that is wanted longer again."""
    longer = any(n > iterations for n in checkpoints_in(state))
    return state / f"until-{iterations}" if longer else state


@contextmanager
def preemption() -> Iterator[Callable[[], bool]]:
    """Within it SIGTERM asks to save at the end of the iteration.

    Further ones change nothing: SLURM and a launcher both send one to each process. SIGINT and
    SIGKILL end at once.

    Yields:
        Whether it was asked for.
    """
    asked = False

    def ask(number: int, frame: object) -> None:
        nonlocal asked
        if not asked:
            print("SIGTERM: saving at the end of this iteration", file=sys.stderr, flush=True)
        asked = True

    before = signal.signal(signal.SIGTERM, ask)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def only_one(folder: Path, run: str, processes: Processes) -> Iterator[None]:
    """The lease of a job on its state folder; a dead owner holds nothing.

    A job that is started again while its first copy still saves waits for it.

    Raises:
        UserError: if another job is still training the run after that time.
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
            print(f"{run}: waiting for another process to leave {folder}", file=sys.stderr)
            told = True
        time.sleep(0.5)
    try:
        yield
    finally:
        os.close(held)


def _resume_and_train(
    trainer: Trainer,
    folder: Path,
    key: str,
    output: Path,
    live: Live | None,
    preempted: Callable[[], bool],
) -> None:
    run, processes = trainer.run, trainer.processes
    log = folder / "journal.jsonl"
    found = _where_to_go_on(run, folder, log) if processes.main else None
    iteration = processes.from_main(lambda: found.iteration if found else None)
    if processes.main:
        journal.rewind(log, -1 if iteration is None else iteration)
    if iteration is not None:
        if run.train.monitor_every:
            _recall_untrained(trainer, folder, log)
        trainer.restore(found or checkpoints.at(folder, iteration))
        if processes.main:
            print(f"{run.run}: going on after iteration {iteration}", file=sys.stderr)
            _say_lost(run, folder, log, iteration)
    track = live if processes.main and run.tracking.enabled else None
    with track(key, log, folder / "monitor") if track else nullcontext() as tracker:
        stopped = _loop(trainer, folder, log, preempted, tracker, fresh=iteration is None)
        if trainer.iteration < run.train.iterations and not stopped:
            if processes.main:
                print(f"{run.run}: saved after iteration {trainer.iteration}", file=sys.stderr)
            sys.exit(128 + signal.SIGTERM)
    _write_outputs(trainer, key, folder, log, output, stopped)


def _where_to_go_on(run: RunConfig, folder: Path, log: Path) -> Checkpoint | None:
    """The newest checkpoint, or the one before where that makes again what was lost since.

    None: begin, also for a snapshot that was passed and is not there.
    """
    for limit in run.train.snapshots:
        kept = folder / "snapshots" / str(limit)
        try:
            if kept.is_dir():
                checkpoints.read_snapshot(kept)
        except UserError as error:
            print(f"{run.run}: {error}", file=sys.stderr, flush=True)
            shutil.rmtree(kept)
    newest = found = checkpoints.latest(folder)
    if newest is None or found is None:
        return None
    lost = [*_lost_lines(run, log, newest.iteration), *_lost_grids(run, folder, newest.iteration)]
    passed = _snapshot_missed(run, folder, newest)
    if lost or passed:
        before = checkpoints.latest(folder, before=newest.iteration)
        if before and (passed or max(lost) > before.iteration):
            found = before
    if _snapshot_missed(run, folder, found):
        print(f"{run.run}: starting over for a snapshot that it passed", file=sys.stderr)
        checkpoints.remove(folder)
        shutil.rmtree(folder / "snapshots", ignore_errors=True)  # of one trajectory, all of them
        return None
    if found is not newest:
        print(
            f"{run.run}: going back from iteration {newest.iteration} to {found.iteration}, to "
            "make again what was lost since",
            file=sys.stderr,
        )
    return found


def _snapshot_missed(run: RunConfig, folder: Path, found: Checkpoint) -> bool:
    """Whether a snapshot asked for now lies before the checkpoint and was not kept."""
    used = found.numbers["counts"]
    spent = sum(used[name] for name in EVALUATIONS)
    kept = folder / "snapshots"
    return any(limit < spent and not (kept / str(limit)).is_dir() for limit in run.train.snapshots)


def _lost_lines(run: RunConfig, log: Path, until: int) -> list[int]:
    """Iterations up to ``until`` of which the journal holds no whole line."""
    whole = journal.iterations(log)
    return [n for n in range(0 if run.train.monitor_every else 1, until + 1) if n not in whole]


def _lost_grids(run: RunConfig, folder: Path, until: int) -> list[int]:
    """Monitored iterations up to ``until`` without a whole grid of images."""
    found = {n: metrics for n, metrics in _history(folder / "journal.jsonl") if n <= until}
    monitored = [n for n, metrics in found.items() if DISTANCE in metrics]
    return [n for n in monitored if not whole_grid(_grid(folder, n))]


def _grid(folder: Path, iteration: int) -> Path:
    return folder / "monitor" / f"iteration-{iteration:06d}.png"


def _say_lost(run: RunConfig, folder: Path, log: Path, until: int) -> int:
    """Say what the results will lack; returns the number of lost iterations."""
    lines, grids = _lost_lines(run, log, until), _lost_grids(run, folder, until)
    lacks = []
    for what, lost in (("curves and tables", lines), ("images of the monitor", grids)):
        if lost:
            first = ", ".join(map(str, lost[:5])) + ", …" * (len(lost) > 5)
            lacks.append(f"{what} lack {len(lost)} iterations ({first})")
    if lacks:
        print(
            f"{run.run}: {folder}: journal or images damaged or lost: {' and '.join(lacks)}; "
            "delete the folder to train the run from the beginning",
            file=sys.stderr,
            flush=True,
        )
    return len(lines)


def _recall_untrained(trainer: Trainer, folder: Path, log: Path) -> None:
    """What the monitor showed of the untrained model; measured again where that was lost.

    Before a checkpoint is restored: until then the weights are the untrained ones.
    """
    run, t, first = trainer.run, trainer.run.train, _grid(folder, 0)
    line, grid = trainer.processes.from_main(
        lambda: (0 in journal.iterations(log), whole_grid(first)),
    )
    if line and grid:
        size = run.model.height, run.model.width
        trainer.monitor.base = load_grid(first, t.monitor_samples, *size)
        return
    metrics, images = trainer.monitor.look(trainer.iteration)
    if trainer.processes.main:
        print(
            f"{run.run}: {folder}: the journal's first line or {first.name} was damaged or lost: "
            "the untrained model is measured again",
            file=sys.stderr,
            flush=True,
        )
        save_grid(first, images, t.monitor_samples)
        if not line:
            _record(trainer, log, metrics, {})


def _loop(
    trainer: Trainer,
    folder: Path,
    log: Path,
    preempted: Callable[[], bool],
    tracker: Tracker | None,
    *,
    fresh: bool,
) -> dict[str, str]:
    """Train to the last iteration, or until a bound or a signal stops it; returns which bound."""
    run, t, processes = trainer.run, trainer.run.train, trainer.processes
    if fresh and t.monitor_every:
        metrics, images = trainer.monitor.look(trainer.iteration)
        if processes.main:
            save_grid(_grid(folder, 0), images, t.monitor_samples)
            _record(trainer, log, metrics, {})
        _save(trainer, folder)
    history = processes.from_main(lambda: _history(log))
    said: dict[str, str] = {}
    reasons = _stops(run, history)
    stop = False
    with Progress(t.iterations, run.run, trainer.iteration, shown=processes.main) as progress:
        while trainer.iteration < t.iterations and not reasons and not stop:
            if t.snapshots:
                _keep_snapshots(trainer, folder, trainer.cost(trainer.iteration + 1).total)
            metrics, rows = trainer.step()
            n = trainer.iteration
            last = n == t.iterations
            if t.monitor_every and (n % t.monitor_every == 0 or last):
                measured, images = trainer.monitor.look(trainer.iteration)
                metrics |= measured
                if processes.main:
                    save_grid(_grid(folder, n), images, t.monitor_samples)
            elif last:
                trainer.monitor.check_weights(trainer.iteration)
            history.append((n, metrics))
            reasons = _stops(run, history)
            if processes.main:
                _say(run, history, said, reasons, tracker)
                _record(trainer, log, metrics, rows)
            stop = any(processes.gather(preempted()))
            if n % t.checkpoint_every == 0 or last or reasons or stop:
                _save(trainer, folder)
            progress.step(
                "  ".join(f"{name} {metrics[f'reward/{name}']:.4f}" for name in t.rewards)
                + f"  grad_norm {metrics['grad_norm']:.3g}"
            )
    if not stop or trainer.iteration == t.iterations:
        _keep_snapshots(trainer, folder, None)
        if processes.main:
            _say(run, history, said, reasons, tracker, ended=True)
    return reasons


def _save(trainer: Trainer, folder: Path) -> None:
    checkpoint = trainer.checkpoint()  # by all processes: sharded weights are gathered
    if trainer.processes.main:
        checkpoints.save(folder, checkpoint)


def _history(log: Path) -> list[tuple[int, Metrics]]:
    """Metrics so far; from the journal, so that a resumed run warns and stops as one at a time."""
    return [(line["iteration"], line["metrics"]) for line in journal.read(log)]


def _stops(run: RunConfig, history: History) -> dict[str, str]:
    """Bounds that end the run."""
    beyond = beyond_bounds(run, history)
    return {k: text for k, text in beyond.items() if run.bounds[k].action == "stop"}


def _say(
    run: RunConfig,
    history: History,
    said: dict[str, str],
    stops: dict[str, str],
    tracker: Tracker | None,
    *,
    ended: bool = False,
) -> None:
    """Say each kind of warning when it begins, and at the end what has become of it.

    ``said`` is what this job's log holds; it grows.
    """
    found = training_warnings(run, history)
    for kind, text in found.items():
        if said.get(kind) == text or (kind in said and not ended):
            continue
        said[kind] = text
        what = "stops" if kind.removeprefix("bound/") in stops else "goes on"
        line = f"iteration {history[-1][0]}: {text}; training {what}"
        if ended:
            line = f"at the end: {text}"
        print(f"{run.run}: {line}", file=sys.stderr, flush=True)
    if tracker is not None:
        tracker.warnings = tuple(found)


def _keep_snapshots(trainer: Trainer, folder: Path, ahead: int | None) -> None:
    """Keep the weights for each budget that the next iteration would exceed (None: for all)."""
    spent = sum(trainer.counts[name] for name in EVALUATIONS)
    for limit in trainer.run.train.snapshots:
        target = folder / "snapshots" / str(limit)
        if trainer.processes.from_main(target.is_dir) or (
            ahead is not None and spent + ahead <= limit
        ):
            continue
        unfinished = folder / "snapshots" / f"{limit}.unfinished"
        if trainer.processes.main:
            shutil.rmtree(unfinished, ignore_errors=True)
        trainer.save(unfinished)
        if not trainer.processes.main:
            continue
        checkpoints.seal_snapshot(unfinished, trainer.iteration, spent, trainer.seconds)
        unfinished.rename(target)


def _record(
    trainer: Trainer, log: Path, metrics: dict[str, float], rows: dict[str, list[Any]]
) -> None:
    journal.append(
        log,
        {
            "iteration": trainer.iteration,
            "time": time.time(),
            "nfe": sum(trainer.counts[name] for name in EVALUATIONS),
            "metrics": metrics,
            "rollouts": rows,
        },
    )


def _write_outputs(
    trainer: Trainer, key: str, folder: Path, log: Path, output: Path, stopped: dict[str, str]
) -> None:
    """Declared outputs appear only here, at the end."""
    run = trainer.run
    if trainer.processes.main:
        for name in ("adapter", "monitor", "snapshots"):
            shutil.rmtree(output / name, ignore_errors=True)
    trainer.save(output / "adapter")
    if not trainer.processes.main:
        return
    (output / "monitor").mkdir(parents=True, exist_ok=True)
    lost = _say_lost(run, folder, log, trainer.iteration)
    looked = _looked(run, trainer.iteration)
    for n in looked:
        if whole_grid(_grid(folder, n)):
            shutil.copyfile(_grid(folder, n), output / "monitor" / _grid(folder, n).name)
    texts = list(trainer.monitor.texts)
    write_json(
        output / "monitor" / PROMPTS, {"prompts": texts, "samples": run.train.monitor_samples}
    )
    (output / "snapshots").mkdir()
    for limit in run.train.snapshots:
        copy = output / "snapshots" / str(limit)
        shutil.copytree(folder / "snapshots" / str(limit), copy, copy_function=shutil.copyfile)
        checkpoints.read_snapshot(copy)
    head = {"config_hash": key}
    metrics = [row for row in metric_rows(run.run, log) if _told(run, row, looked)]
    write_table(output / "train_metrics.parquet", TRAIN_METRICS, metrics, metadata=head)
    columns = rollout_columns(run.run, log)
    write_table(output / "rollouts.parquet", ROLLOUTS, columns, metadata=head)
    write_json(
        output / "train.json",
        {
            "run": run.run,
            "key": key,
            "iterations": trainer.iteration,
            "iterations_lost": lost,
            "stopped": stopped,
            **{f"nfe_{name}": trainer.counts[name] for name in (*EVALUATIONS, "monitor")},
            "seconds": round(trainer.seconds, 3),
            "trainable_parameters": sum(p.numel() for p in trainer.parameters),
            "peak_memory_mib": round(trainer.peak_mib, 1),
        },
    )


def _looked(run: RunConfig, last: int) -> list[int]:
    """Iterations whose monitors a training of so many iterations has, went it on or not."""
    every = run.train.monitor_every
    return sorted({*range(0, last + 1, every), last}) if every else []


def _told(run: RunConfig, row: dict[str, Any], looked: list[int]) -> bool:
    """Whether a metric is one of the training: what other rewards say of the monitored images is
    computed where they are evaluated."""
    what, _, name = row["metric"].partition("/")
    if not what.startswith("monitor"):
        return True
    stops = {name for name, bound in run.bounds.items() if bound.action == "stop"}
    of = name.removeprefix("reward/")
    own = of == name or of in run.train.rewards or name in stops
    return own and row["iteration"] in looked
