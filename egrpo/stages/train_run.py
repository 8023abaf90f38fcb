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
from typing import Any

from egrpo.config.models import RunConfig
from egrpo.core.plan import Plan
from egrpo.errors import UserError
from egrpo.stages.fingerprint import state_key
from egrpo.stages.monitor import crossed, load_grid, save_grid
from egrpo.stages.processes import Processes
from egrpo.stages.progress import Progress
from egrpo.stages.records import metric_rows, rollout_columns
from egrpo.stages.train import Trainer
from egrpo.store import checkpoint as checkpoints
from egrpo.store import journal
from egrpo.store.checkpoint import Checkpoint
from egrpo.store.files import lock, write_json
from egrpo.store.tables import ROLLOUTS, TRAIN_METRICS, write_table

LEASE_WAIT = 60.0
"""Seconds that a job waits for another one to leave its state folder."""

EVALUATIONS = ("forward", "train", "reference")
"""Counters of network evaluations that belong to training."""


def train(
    run: RunConfig,
    plan: Plan | None,
    embeddings: Path,
    *,
    state: Path,
    output: Path,
    store: Path | None = None,
) -> None:
    """Train one run to its end, from wherever its state is.

    Args:
        run, plan: resolved settings, and the merge plan if the method has one.
        embeddings: prompt embeddings of both prompt files.
        state: folder of checkpoints and journal of this run; one sub-folder per state key.
        output: folder for adapter/, monitor/, train.json and the two tables.
        store: tracking store made by ``prepare``; None for no live tracking.

    Raises:
        UserError: for bad input, a full disk, an iteration without any valid reward, or weights
            that make no images.
        SystemExit: after SIGTERM, with everything saved.
    """
    trainer = Trainer(run, plan, embeddings)
    key = state_key(run, plan, embeddings)
    folder = state / key
    folder.mkdir(parents=True, exist_ok=True)
    with preemption() as wanted, only_one(folder, run.run, trainer.world):
        _resume_and_train(trainer, folder, key, output, store, wanted)


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
def only_one(folder: Path, run: str, world: Processes) -> Iterator[None]:
    """The lease of a job on its state folder; a dead owner holds nothing.

    A job that is started again while its first copy still saves waits for it.

    Raises:
        UserError: if another job is still training the run after that time.
    """
    if not world.main:
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
    store: Path | None,
    preempted: Callable[[], bool],
) -> None:
    run, world = trainer.run, trainer.world
    log = folder / "journal.jsonl"
    found = checkpoints.latest(folder) if world.main else None
    if found is not None and _snapshot_missed(run, folder, found):
        print(f"{run.run}: starting over for a snapshot that it passed", file=sys.stderr)
        checkpoints.remove(folder)
        shutil.rmtree(folder / "snapshots", ignore_errors=True)  # of one trajectory, all of them
        found = None
    iteration = world.from_main(lambda: found.iteration if found else None)
    if iteration is not None:
        trainer.restore(found or checkpoints.at(folder, iteration))
        if world.main:
            print(f"{run.run}: going on after iteration {iteration}", file=sys.stderr)
    if world.main:
        journal.rewind(log, -1 if iteration is None else iteration)
    with _live(run, key, store if world.main else None, log, folder / "monitor"):
        stopped = _loop(trainer, folder, log, preempted, fresh=iteration is None)
        if trainer.iteration < run.train.iterations and not stopped:
            if world.main:
                print(f"{run.run}: saved after iteration {trainer.iteration}", file=sys.stderr)
            sys.exit(128 + signal.SIGTERM)
    _write_outputs(trainer, key, folder, log, output, stopped)


def _snapshot_missed(run: RunConfig, folder: Path, found: Checkpoint) -> bool:
    """Whether a snapshot asked for now lies before the checkpoint and was not kept."""
    used = found.numbers["counts"]
    spent = sum(used[name] for name in EVALUATIONS)
    kept = folder / "snapshots"
    return any(limit < spent and not (kept / str(limit)).is_dir() for limit in run.train.snapshots)


def _live(
    run: RunConfig, key: str, store: Path | None, log: Path, images: Path
) -> AbstractContextManager[Any]:
    if store is None or not run.tracking.enabled:
        return nullcontext()
    from egrpo.store.live import LiveTracker

    return LiveTracker(run, key, store, log, images)


def _loop(
    trainer: Trainer, folder: Path, log: Path, preempted: Callable[[], bool], *, fresh: bool
) -> dict[str, str]:
    """Train to the last iteration, or until a bound or a signal stops it; returns which bound."""
    run, t, world = trainer.run, trainer.run.train, trainer.world
    first = folder / "monitor" / "iteration-000000.png"
    if fresh and t.monitor_every:
        metrics, images = trainer.monitor()
        if world.main:
            save_grid(first, images, t.monitor_samples)
            _record(trainer, log, metrics, {})
        _save(trainer, folder)
    elif t.monitor_every:
        size = run.model.height, run.model.width
        trainer.base_images = load_grid(first, t.monitor_samples, *size)
    monitors = world.from_main(lambda: _monitors(log))
    reasons = _stops(run, _beyond_bounds(run, monitors))
    stop = False
    with Progress(t.iterations, run.run, trainer.iteration, shown=world.main) as progress:
        while trainer.iteration < t.iterations and not reasons and not stop:
            if t.snapshots:
                _keep_snapshots(trainer, folder, trainer.cost(trainer.iteration + 1).total)
            metrics, rows = trainer.step()
            n = trainer.iteration
            last = n == t.iterations
            if t.monitor_every and (n % t.monitor_every == 0 or last):
                measured, images = trainer.monitor()
                metrics |= measured
                if world.main:
                    grid = folder / "monitor" / f"iteration-{n:06d}.png"
                    save_grid(grid, images, t.monitor_samples)
                monitors.append(measured)
                reasons = _warn(run, n, _beyond_bounds(run, monitors), say=world.main)
            elif last:
                trainer.check_weights()
            if world.main:
                _record(trainer, log, metrics, rows)
            stop = any(world.gather(preempted()))
            if n % t.checkpoint_every == 0 or last or reasons or stop:
                _save(trainer, folder)
            progress.step(
                "  ".join(f"{name} {metrics[f'reward/{name}']:.4f}" for name in t.rewards)
                + f"  grad_norm {metrics['grad_norm']:.3g}"
            )
    if not stop or trainer.iteration == t.iterations:
        _keep_snapshots(trainer, folder, None)
    return reasons


def _save(trainer: Trainer, folder: Path) -> None:
    checkpoint = trainer.checkpoint()  # by all processes: sharded weights are gathered
    if trainer.world.main:
        checkpoints.save(folder, checkpoint)


def _monitors(log: Path) -> list[dict[str, float]]:
    """What the monitors showed so far; from the journal, so that a resumed run stops too."""
    metrics = (line["metrics"] for line in journal.read(log))
    return [m for m in metrics if "monitor/distance_to_base" in m]


def _beyond_bounds(run: RunConfig, monitors: list[dict[str, float]]) -> dict[str, str]:
    if len(monitors) < 2:  # the first is the untrained model's
        return {}
    return crossed(run.train.bounds, monitors[-1], monitors[0])


def _stops(run: RunConfig, beyond: dict[str, str]) -> dict[str, str]:
    """Those that end the run."""
    return {k: text for k, text in beyond.items() if run.train.bounds[k].action == "stop"}


def _warn(run: RunConfig, iteration: int, beyond: dict[str, str], *, say: bool) -> dict[str, str]:
    """Say which bounds were crossed; returns those that end the run."""
    stops = _stops(run, beyond)
    for name, text in beyond.items():
        what = "stops" if name in stops else "goes on"
        line = f"{run.run}: iteration {iteration}: monitor {name}: {text}; training {what}"
        if say:
            print(line, file=sys.stderr, flush=True)
    return stops


def _keep_snapshots(trainer: Trainer, folder: Path, ahead: int | None) -> None:
    """Keep the weights for each budget that the next iteration would exceed (None: for all)."""
    spent = sum(trainer.counts[name] for name in EVALUATIONS)
    for limit in trainer.run.train.snapshots:
        target = folder / "snapshots" / str(limit)
        if trainer.world.from_main(target.is_dir) or (ahead is not None and spent + ahead <= limit):
            continue
        unfinished = folder / "snapshots" / f"{limit}.unfinished"
        if trainer.world.main:
            shutil.rmtree(unfinished, ignore_errors=True)
        trainer.save(unfinished)
        if not trainer.world.main:
            continue
        write_json(
            unfinished / "snapshot.json",
            {
                "iteration": trainer.iteration,
                "nfe": spent,
                "seconds": round(trainer.seconds, 3),
            },
        )
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
    if trainer.world.main:
        for name in ("adapter", "monitor", "snapshots"):
            shutil.rmtree(output / name, ignore_errors=True)
    trainer.save(output / "adapter")
    if not trainer.world.main:
        return
    (output / "monitor").mkdir(parents=True, exist_ok=True)
    for line in journal.read(log):
        grid = folder / "monitor" / f"iteration-{line['iteration']:06d}.png"
        if grid.exists():
            shutil.copy2(grid, output / "monitor" / grid.name)
    (output / "snapshots").mkdir()
    for limit in run.train.snapshots:
        shutil.copytree(folder / "snapshots" / str(limit), output / "snapshots" / str(limit))
    head = {"config_hash": key}
    metrics = metric_rows(run.run, log)
    write_table(output / "train_metrics.parquet", TRAIN_METRICS, metrics, metadata=head)
    columns = rollout_columns(run.run, log)
    write_table(output / "rollouts.parquet", ROLLOUTS, columns, metadata=head)
    write_json(
        output / "train.json",
        {
            "run": run.run,
            "key": key,
            "iterations": trainer.iteration,
            "stopped": stopped,
            **{f"nfe_{name}": trainer.counts[name] for name in (*EVALUATIONS, "monitor")},
            "seconds": round(trainer.seconds, 3),
            "trainable_parameters": sum(p.numel() for p in trainer.parameters),
            "peak_memory_mib": round(trainer.peak_mib, 1),
        },
    )
