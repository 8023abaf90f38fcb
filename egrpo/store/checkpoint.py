"""Checkpoints: one self-checking safetensors file each, written whole or not at all.

Tensors and a few numbers; no pickle. The last two are kept, and a damaged one is passed over for
the one before, said in one line. Snapshots, the weights kept on the way, have checksums too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from egrpo.errors import UserError, one_line, say
from egrpo.store.files import checkpoints_in, checksums, read_json, replacing, write_json
from egrpo.store.weights import read_header

KEEP = 2
SNAPSHOT = "snapshot.json"
"""What is known of kept weights, beside them."""


@dataclass(frozen=True)
class Checkpoint:
    """What a run needs to go on as if it had never stopped, after its last complete iteration.

    Tensors are weights, optimizer state and averaged weights; numbers counters like time spent.
    """

    iteration: int
    tensors: dict[str, Tensor]
    numbers: dict[str, Any]


def checksum(tensors: Mapping[str, Tensor], head: str) -> str:
    """SHA-256 over names, types, shapes and bytes, in order of name."""
    sha = hashlib.sha256(head.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        sha.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def save(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write atomically, then remove all but the last two."""
    head = json.dumps({"iteration": checkpoint.iteration, **checkpoint.numbers}, sort_keys=True)
    tensors = {k: v.detach().cpu().contiguous() for k, v in checkpoint.tensors.items()}
    path = _path(folder, checkpoint.iteration)
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={"head": head, "sha256": checksum(tensors, head)})
    for old in checkpoints_in(folder)[:-KEEP]:
        _path(folder, old).unlink(missing_ok=True)
    return path


def latest(folder: Path, before: int | None = None) -> Checkpoint | None:
    """The newest checkpoint that is whole, of those ``before`` an iteration; None without any.

    Damaged ones that are passed over are renamed to ``*.damaged``. Raises UserError if there are
    checkpoints and none can be read; nothing is removed then.
    """
    found = [n for n in checkpoints_in(folder) if before is None or n < before]
    damaged: list[Path] = []
    for path in (_path(folder, n) for n in reversed(found)):
        try:
            checkpoint = _read(path)
        except Exception as error:  # any reason not to trust it is the same: go one back
            say(f"{path}: damaged checkpoint passed over ({one_line(error, 200)})")
            damaged.append(path)
            continue
        for bad in damaged:
            bad.rename(bad.with_suffix(".damaged"))
        return checkpoint
    if damaged and before is None:
        raise UserError(
            f"{folder}: none of its {len(damaged)} checkpoints can be read; restore one from a "
            "backup, or delete the folder to train this run from the beginning"
        )
    return None


def at(folder: Path, iteration: int) -> Checkpoint:
    """The checkpoint of one iteration, which is known to be whole."""
    return _read(_path(folder, iteration))


def remove(folder: Path) -> None:
    """Remove all checkpoints of a folder."""
    for iteration in checkpoints_in(folder):
        _path(folder, iteration).unlink()


def seal_snapshot(folder: Path, iteration: int, nfe: int, seconds: float) -> None:
    """Note beside kept weights what training had spent by then, and their files' checksums."""
    record = {"iteration": iteration, "nfe": nfe, "seconds": round(seconds, 3)}
    write_json(folder / SNAPSHOT, {**record, "files": checksums(folder, SNAPSHOT)})


def read_snapshot(folder: Path) -> dict[str, Any]:
    """``iteration``, ``nfe`` and ``seconds`` of kept weights; UserError if these are not whole."""
    record = read_json(folder / SNAPSHOT)
    remedy = "delete the folder and run the training again"
    if not isinstance(record, dict) or not {"iteration", "nfe", "seconds"} <= record.keys():
        raise UserError(f"{folder / SNAPSHOT}: damaged; {remedy}")
    known = record.pop("files", None)
    if known is None:  # of earlier versions
        for path in folder.glob("*.safetensors"):
            read_header(path)
        return record
    there = checksums(folder, SNAPSHOT)
    for name, checksum in known.items():
        if there.get(name) != checksum:
            raise UserError(f"{folder / name}: damaged snapshot, its checksum differs; {remedy}")
    return record


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file, as they are."""
    with safe_open(str(path), framework="pt") as handle:
        tensors = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
        return tensors, handle.metadata() or {}


def _read(path: Path) -> Checkpoint:
    tensors, metadata = read_tensors(path)
    head = metadata["head"]
    if checksum(tensors, head) != metadata["sha256"]:
        raise ValueError("checksum does not match")
    numbers = json.loads(head)
    return Checkpoint(numbers.pop("iteration"), tensors, numbers)


def _path(folder: Path, iteration: int) -> Path:
    return folder / f"checkpoint-{iteration:06d}.safetensors"
