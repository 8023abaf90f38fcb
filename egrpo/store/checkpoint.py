"""Checkpoints: one self-checking safetensors file each, written whole or not at all.

Tensors and a few numbers; no pickle. The last two are kept, and a damaged one is passed over for
the one before, said in one line.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from egrpo.errors import UserError
from egrpo.store.files import replacing

KEEP = 2
_NAME = re.compile(r"checkpoint-(\d{6,})\.safetensors")


@dataclass(frozen=True)
class Checkpoint:
    """What a run needs to go on as if it had never stopped.

    Attributes:
        iteration: the last one that is complete.
        tensors: weights, optimizer state, averaged weights, by name.
        numbers: JSON-like counters: time spent, evaluations.
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
    from safetensors.torch import save_file

    head = json.dumps({"iteration": checkpoint.iteration, **checkpoint.numbers}, sort_keys=True)
    tensors = {k: v.detach().cpu().contiguous() for k, v in checkpoint.tensors.items()}
    path = _path(folder, checkpoint.iteration)
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={"head": head, "sha256": checksum(tensors, head)})
    for old in _ordered(folder)[:-KEEP]:
        old.unlink(missing_ok=True)
    return path


def latest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that is whole; None if the folder has none.

    Damaged ones that are passed over are renamed to ``*.damaged``.

    Raises:
        UserError: if there are checkpoints and none can be read. Nothing is removed then.
    """
    found = _ordered(folder)
    damaged: list[Path] = []
    for path in reversed(found):
        try:
            checkpoint = _read(path)
        except Exception as error:  # any reason not to trust it is the same: go one back
            reason = " ".join(str(error).split())[:200]
            say = f"{path}: damaged checkpoint passed over ({reason})"
            print(say, file=sys.stderr, flush=True)
            damaged.append(path)
            continue
        for bad in damaged:
            bad.rename(bad.with_suffix(".damaged"))
        return checkpoint
    if damaged:
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
    for path in _ordered(folder):
        path.unlink()


def _read(path: Path) -> Checkpoint:
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as handle:
        metadata = handle.metadata() or {}
        tensors = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
    head = metadata["head"]
    if checksum(tensors, head) != metadata["sha256"]:
        raise ValueError("checksum does not match")
    numbers = json.loads(head)
    return Checkpoint(numbers.pop("iteration"), tensors, numbers)


def _path(folder: Path, iteration: int) -> Path:
    return folder / f"checkpoint-{iteration:06d}.safetensors"


def _ordered(folder: Path) -> list[Path]:
    found = [p for p in folder.glob("checkpoint-*.safetensors") if _NAME.fullmatch(p.name)]
    return sorted(found, key=lambda p: int(p.stem.split("-")[1]))
