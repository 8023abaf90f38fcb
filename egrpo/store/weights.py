"""How large a model is, by the headers of its files: nothing is loaded."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from egrpo.errors import UserError


@dataclass(frozen=True)
class Part:
    """Weights of one part of a pipeline, as its files say.

    Attributes:
        config: its config.json.
        shapes: shape of each weight by name.
    """

    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return sum(prod(shape) for shape in self.shapes.values())


def read_header(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors in a safetensors file.

    Raises:
        UserError: if the file is not one, or shorter than its header says.
    """
    try:
        with open(path, "rb") as handle:
            (length,) = struct.unpack("<Q", handle.read(8))
            if length > 100 * 2**20:
                raise ValueError("no header")
            header = json.loads(handle.read(length))
    except (OSError, ValueError, struct.error) as error:
        raise UserError(
            f"{path}: not a whole safetensors file ({error}); download it again"
        ) from None
    header.pop("__metadata__", None)
    end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if path.stat().st_size != 8 + length + end:
        raise UserError(
            f"{path}: {path.stat().st_size} bytes, {8 + length + end} expected; download it again"
        )
    return {name: tuple(entry["shape"]) for name, entry in header.items()}


def read_part(pipeline: Path, part: str) -> Part:
    """Weights and settings of a local pipeline's part.

    Raises:
        UserError: naming the file that is missing or damaged.
    """
    folder = pipeline / part
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}/config.json: {error}; is this a pipeline's folder?") from None
    index = sorted(folder.glob("*.safetensors.index.json"))
    if index:
        files = set(json.loads(index[0].read_text(encoding="utf-8"))["weight_map"].values())
    else:
        files = {path.name for path in folder.glob("*.safetensors")}
    if not files:
        raise UserError(f"{folder}: holds no .safetensors weights; download them")
    shapes: dict[str, tuple[int, ...]] = {}
    for name in sorted(files):
        if not (folder / name).exists():
            raise UserError(f"{folder}/{name}: no such file; download it")
        shapes |= read_header(folder / name)
    return Part(config, shapes)
