"""The training job: resume, loop, journal, checkpoint, and the outputs at the end."""

from __future__ import annotations

import fcntl
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor

from egrpo.config.models import RunConfig
from egrpo.core.plan import Plan
from egrpo.errors import UserError
from egrpo.stages.fingerprint import state_key
from egrpo.stages.progress import Progress
from egrpo.stages.train import Trainer, peak_memory_mib
from egrpo.store import checkpoint as checkpoints
from egrpo.store import journal
from egrpo.store.files import replacing, write_json
from egrpo.store.tables import ROLLOUTS, TRAIN_METRICS, write_table


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
        UserError: for bad input, a full disk, or an iteration without any valid reward.
    """
    trainer = Trainer(run, plan, embeddings)
    key = state_key(run, plan, embeddings)
    folder = state / key
    folder.mkdir(parents=True, exist_ok=True)
    with only_one(folder, run.run):
        _resume_and_train(trainer, folder, key, output, store)


@contextmanager
def only_one(folder: Path, run: str) -> Iterator[None]:
    """Refuse a second process on one state folder; a dead owner holds nothing.

    Raises:
        UserError: if another process is training the run.
    """
    with open(folder / "lock", "w", encoding="utf-8") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"run {run}: {folder}: another process is training it; wait for it or end it"
            ) from None
        yield


def _resume_and_train(
    trainer: Trainer, folder: Path, key: str, output: Path, store: Path | None
) -> None:
    run = trainer.run
    log = folder / "journal.jsonl"
    found = checkpoints.latest(folder)
    if found is not None:
        trainer.restore(found)
        print(f"{run.run}: going on after iteration {found.iteration}", file=sys.stderr)
    journal.rewind(log, trainer.iteration if found else -1)
    with _live(run, key, store, log, folder / "monitor"):
        _loop(trainer, folder, log)
    trainer.check_counts()
    _write_outputs(trainer, key, folder, log, output)


def _live(
    run: RunConfig, key: str, store: Path | None, log: Path, images: Path
) -> AbstractContextManager[Any]:
    if store is None or not run.tracking.enabled:
        return nullcontext()
    from egrpo.store.live import LiveTracker

    return LiveTracker(run, key, store, log, images)


def _loop(trainer: Trainer, folder: Path, log: Path) -> None:
    run, t = trainer.run, trainer.run.train
    if trainer.iteration == 0 and t.monitor_every:
        metrics, images = trainer.monitor()
        _save_grid(folder, 0, images, t.monitor_samples)
        _record(trainer, log, metrics, {})
        checkpoints.save(folder, trainer.checkpoint())
    with Progress(t.iterations, run.run, trainer.iteration) as progress:
        while trainer.iteration < t.iterations:
            metrics, rows = trainer.step()
            n = trainer.iteration
            last = n == t.iterations
            if t.monitor_every and (n % t.monitor_every == 0 or last):
                measured, images = trainer.monitor()
                metrics |= measured
                _save_grid(folder, n, images, t.monitor_samples)
            _record(trainer, log, metrics, rows)
            if n % t.checkpoint_every == 0 or last:
                checkpoints.save(folder, trainer.checkpoint())
            progress.step(
                "  ".join(f"{name} {metrics[f'reward/{name}']:.4f}" for name in t.rewards)
                + f"  grad_norm {metrics['grad_norm']:.3g}"
            )


def _record(
    trainer: Trainer, log: Path, metrics: dict[str, float], rows: dict[str, list[Any]]
) -> None:
    nfe = sum(trainer.counts[name] for name in ("forward", "train", "reference"))
    journal.append(
        log,
        {
            "iteration": trainer.iteration,
            "time": time.time(),
            "nfe": nfe,
            "metrics": metrics,
            "rollouts": rows,
        },
    )


def _save_grid(folder: Path, iteration: int, images: Tensor, samples: int) -> None:
    """One PNG: a column per prompt, its samples below each other."""
    from PIL import Image

    n, c, h, w = images.shape
    grid = images.reshape(n // samples, samples, c, h, w).permute(1, 3, 0, 4, 2)
    picture = Image.fromarray(grid.reshape(samples * h, n // samples * w, c).numpy())
    with replacing(folder / "monitor" / f"iteration-{iteration:06d}.png") as temporary:
        picture.save(temporary, format="PNG")


def _write_outputs(trainer: Trainer, key: str, folder: Path, log: Path, output: Path) -> None:
    """Declared outputs appear only here, at the end."""
    run = trainer.run
    for name in ("adapter", "monitor"):
        shutil.rmtree(output / name, ignore_errors=True)
    with trainer.averaged():
        trainer.model.save(output / "adapter")
    (output / "monitor").mkdir(parents=True, exist_ok=True)
    for line in journal.read(log):
        grid = folder / "monitor" / f"iteration-{line['iteration']:06d}.png"
        if grid.exists():
            shutil.copy2(grid, output / "monitor" / grid.name)
    head = {"config_hash": key}
    metrics = _metric_rows(run.run, log)
    write_table(output / "train_metrics.parquet", TRAIN_METRICS, metrics, metadata=head)
    columns = _rollout_columns(run.run, log)
    write_table(output / "rollouts.parquet", ROLLOUTS, columns, metadata=head)
    write_json(
        output / "train.json",
        {
            "run": run.run,
            "key": key,
            "iterations": trainer.iteration,
            "nfe_forward": trainer.counts["forward"],
            "nfe_train": trainer.counts["train"],
            "nfe_reference": trainer.counts["reference"],
            "nfe_monitor": trainer.counts["monitor"],
            "seconds": round(trainer.seconds, 3),
            "trainable_parameters": sum(p.numel() for p in trainer.parameters),
            "peak_memory_mib": round(peak_memory_mib(), 1),
        },
    )


def _metric_rows(run: str, log: Path) -> list[dict[str, Any]]:
    return [
        {
            "run": run,
            "iteration": line["iteration"],
            "nfe": line["nfe"],
            "metric": name,
            "value": value,
        }
        for line in journal.read(log)
        for name, value in line["metrics"].items()
    ]


def _rollout_columns(run: str, log: Path) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {name: [] for name, *_ in ROLLOUTS.columns}
    for line in journal.read(log):
        rows = line["rollouts"]
        count = len(rows.get("step", []))
        for reward in (name for name in rows if name.startswith("reward/")):
            columns["run"] += [run] * count
            columns["iteration"] += [line["iteration"]] * count
            columns["nfe"] += [line["nfe"]] * count
            columns["reward"] += [reward.removeprefix("reward/")] * count
            columns["value"] += rows[reward]
            for name in ("prompt_id", "step", "span", "sample", "advantage", "log_prob"):
                columns[name] += rows[name]
    return columns
