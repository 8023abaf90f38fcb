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
        if not isinstance(header, dict):
            raise ValueError("no header")
        header.pop("__metadata__", None)
        shapes = {name: _whole_numbers(entry["shape"]) for name, entry in header.items()}
        ends = [_whole_numbers(entry["data_offsets"])[1] for entry in header.values()]
    except (OSError, ValueError, TypeError, LookupError, RecursionError, struct.error) as error:
        raise UserError(
            f"{path}: not a whole safetensors file ({error}); download it again"
        ) from None
    expected = 8 + length + max(ends, default=0)
    if path.stat().st_size != expected:
        raise UserError(
            f"{path}: {path.stat().st_size} bytes, {expected} expected; download it again"
        )
    return shapes


def _whole_numbers(values: Any) -> tuple[int, ...]:
    if not isinstance(values, list) or not all(type(n) is int and n >= 0 for n in values):
        raise ValueError(f"{values!r:.60} are not sizes")
    return tuple(values)


def _is_plain(name: object) -> bool:
    """Whether it is the name of a file in the same folder."""
    return isinstance(name, str) and "\0" not in name and name == Path(name).name


def _read_object(path: Path, remedy: str) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("not a JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: {error}; {remedy}") from None
    return found


def read_config(folder: Path) -> dict[str, Any]:
    """The settings of a local pipeline's part.

    Raises:
        UserError: if there are none.
    """
    return _read_object(folder / "config.json", "is this a pipeline's folder?")


def read_part(pipeline: Path, part: str) -> Part:
    """Weights and settings of a local pipeline's part.

    Raises:
        UserError: naming the file that is missing or damaged.
    """
    folder = pipeline / part
    config = read_config(folder)
    index = sorted(folder.glob("*.safetensors.index.json"))
    if index:
        names = _read_object(index[0], "download it again").get("weight_map")
        if not isinstance(names, dict) or not all(_is_plain(n) for n in names.values()):
            raise UserError(f"{index[0]}: no weight_map of file names; download it again")
        files = set(names.values())
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
