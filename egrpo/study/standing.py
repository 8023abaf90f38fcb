"""Whether a result that stands is the one that today's settings, files and code would give.

Beside its results each stage leaves a receipt: the record that they were computed from, its digest
(their identity), the files with their sizes. A result stands if its receipt has the identity that
is wanted and its files are whole. Times play no part.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from egrpo.config.keys import digest
from egrpo.errors import UserError
from egrpo.planning.trees import needs_plan
from egrpo.store.files import alone, checkpoints_in, checksums, read_json, write_json
from egrpo.study.identity import Record, changes, versions
from egrpo.study.layout import Layout

Receipt = dict[str, Any]


def read_receipt(at: Layout, stage: str, name: str) -> Receipt | None:
    """What a result was computed from; None where there is none that can be read."""
    try:
        found = json.loads(at.receipt(stage, name).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    known = isinstance(found, dict) and {"identity", "record", "made"} <= found.keys()
    return found if known else None


def sizes(root: Path, paths: Iterable[Path]) -> dict[str, int]:
    """Bytes of each file of some outputs, by its path below the study's folder."""
    found = {}
    for path in paths:
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        for file in files:
            if file.is_file() and file.name != ".snakemake_timestamp":
                found[file.relative_to(root).as_posix()] = file.stat().st_size
    return found


def whole(at: Layout, receipt: Receipt) -> bool:
    """Whether the files of a result are as they were made, by their sizes."""
    for name, size in receipt["made"].items():
        try:
            if os.stat(at.root / name).st_size != size:
                return False
        except OSError:
            return False
    return True


def stands(at: Layout, stage: str, name: str, identity: str) -> bool:
    """Whether a stage's result is the one wanted, and whole.

    Of an evaluation also whether it is of the very weights that lie there.
    """
    receipt = read_receipt(at, stage, name)
    if receipt is None or receipt["identity"] != identity or not whole(at, receipt):
        return False
    return stage != "evaluate" or receipt.get("weights") == weights_of(at, name)


def weights_of(at: Layout, run: str) -> str | None:
    """Digest of the weights that a run's training left."""
    receipt = read_receipt(at, "train", run)
    return receipt.get("weights") if receipt else None


def state_of(at: Layout, run: str) -> Path:
    """Where a run's training goes on from: its state or, if it has none, another run's of the same
    trajectory, as of a run that has a new name."""
    own = at.state(run) / at.identity("trajectory", run)
    others = sorted(own.parent.parent.glob(f"*/{own.name}"))
    return next((state for state in (own, *others) if checkpoints_in(state)), own)


def same_weights(at: Layout, run: str) -> list[Path]:
    """Folders of the runs whose training left the weights of this one, itself first."""
    weights = weights_of(at, run)
    names = sorted(path.stem for path in at.receipt("train", run).parent.glob("*.json"))
    others = [name for name in names if name != run and weights_of(at, name) == weights]
    return [at.run(name) for name in (run, *others)]


def require(at: Layout, stage: str, name: str, identity: str) -> Receipt:
    """The receipt of a result that a job reads.

    Raises UserError if what lies there is of other settings, files or code than the job is for.
    """
    receipt = read_receipt(at, stage, name)
    if receipt is not None and receipt["identity"] == identity:
        return receipt
    raise UserError(
        f"{at.folder(stage, name)}: holds no result of these settings ({stage} {name}: wanted "
        f"{identity}, there is {receipt['identity'] if receipt else 'none'}); start the workflow "
        "again, which makes it"
    )


def write_receipt(
    at: Layout, stage: str, name: str, record: Record, outputs: Iterable[Path], **more: Any
) -> None:
    """Say what a result was computed from; the last thing that a stage does."""
    receipt = {
        "identity": digest(record),
        "record": record,
        "libraries": versions(),
        "made": sizes(at.root, outputs),
        **more,
    }
    write_json(at.receipt(stage, name), receipt)


def deliver(at: Layout, stage: str, name: str, record: Record, made: Path, **more: Any) -> None:
    """Put a finished result into its place at once, with its receipt.

    The one before stays readable until then. ``made``, a folder on the same file system, holds the
    outputs; ``more`` are further entries of the receipt. Of a job that newer settings have left
    behind it stays where it is: UserError if newer settings want another result there.
    """
    folder = at.folder(stage, name)
    for place in (folder, at.receipt(stage, name).parent):
        place.mkdir(parents=True, exist_ok=True)
    with alone(at.receipt(stage, name).parent / f".{name}.lock"):
        wanted = _wanted(at).get(stage, {}).get(name)
        if wanted is not None and wanted != digest(record):
            raise UserError(
                f"{folder}: newer settings want another result there ({stage} {name}: "
                f"{digest(record)} was made, {wanted} is wanted); nothing was overwritten"
            )
        at.receipt(stage, name).unlink(missing_ok=True)
        outputs = at.outputs(stage, name)
        for path in outputs:
            _replace(made / path.name, path)
        write_receipt(at, stage, name, record, outputs, **more)


def _replace(new: Path, old: Path) -> None:
    """Move a file or folder to where another may be."""
    aside = old.with_name(f".{old.name}.{os.getpid()}.old")
    if old.is_dir() and not old.is_symlink():
        shutil.rmtree(aside, ignore_errors=True)
        old.rename(aside)
    os.replace(new, old)
    shutil.rmtree(aside, ignore_errors=True)


def want(at: Layout) -> None:
    """Say which results today's settings want: no job of earlier settings writes there any more."""
    before = _wanted(at)
    after = dict(before)
    for stage, of in (("plan", needs_plan), ("train", None), ("evaluate", None)):
        runs = [name for name, run in at.study.runs.items() if of is None or of(run)]
        after[stage] = {**before.get(stage, {}), **{run: at.identity(stage, run) for run in runs}}
    if after != before:
        write_json(at.wanted, after)


def _wanted(at: Layout) -> dict[str, dict[str, str]]:
    with suppress(UserError):
        found = read_json(at.wanted)
        return found if isinstance(found, dict) else {}
    return {}


def reasons(at: Layout, stage: str, name: str, record: Record) -> list[str] | None:
    """Why a result does not stand: what changed, one short text each; None where it does."""
    receipt = read_receipt(at, stage, name)
    if receipt is None:
        there = any(path.exists() for path in at.outputs(stage, name))
        return ["it does not say what it was computed from"] if there else ["it is not there"]
    found = changes(receipt["record"], json.loads(json.dumps(record)))  # lists for tuples
    if found:
        return found
    if not whole(at, receipt):
        return ["files of it are missing or damaged"]
    if stage == "evaluate" and receipt.get("weights") != weights_of(at, name):
        return ["the weights were trained again since"]
    return None


def tree_digest(folder: Path) -> str:
    """Digest of every file below a folder."""
    return digest(checksums(folder, ".none"))
