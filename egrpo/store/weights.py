"""How large a model is, by the headers of its files: nothing is loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from egrpo.errors import UserError, one_line


@dataclass(frozen=True)
class Part:
    """One part of a pipeline, as its files say: its config.json, and each weight's shape."""

    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return sum(prod(shape) for shape in self.shapes.values())


def read_header(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors in a safetensors file; UserError if it is not a whole one."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path}: not a whole safetensors file ({one_line(error)}); download it again"
        ) from None


def _read_object(path: Path, remedy: str) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("not a JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: {error}; {remedy}") from None
    return found


def read_config(folder: Path) -> dict[str, Any]:
    """The settings of a local pipeline's part; UserError if there are none."""
    return _read_object(folder / "config.json", "is this a pipeline's folder?")


def read_part(pipeline: Path, part: str) -> Part:
    """Weights and settings of a local pipeline's part; UserError names a file that is not whole."""
    folder = pipeline / part
    config = read_config(folder)
    index = next(iter(sorted(folder.glob("*.safetensors.index.json"))), None)
    names: list[Any]
    if index is None:
        names = [path.name for path in folder.glob("*.safetensors")]
    else:
        found = _read_object(index, "download it again").get("weight_map")
        names = list(found.values()) if isinstance(found, dict) else [None]
        if not all(isinstance(n, str) and "\0" not in n and n == Path(n).name for n in names):
            raise UserError(f"{index}: no weight_map of file names; download it again")
    if not names:
        raise UserError(f"{folder}: holds no .safetensors weights; download them")
    shapes: dict[str, tuple[int, ...]] = {}
    for name in sorted(set(names)):
        if not (folder / name).exists():
            raise UserError(f"{folder}/{name}: no such file; download it")
        shapes |= read_header(folder / name)
    return Part(config, shapes)
