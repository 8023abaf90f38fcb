"""What the networks of rewards take on the model's GPU, by the shapes in their local files."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from egrpo.config.models import RunConfig
from egrpo.errors import UserError
from egrpo.rewards.torchscript import is_torchscript
from egrpo.store.weights import read_header

WEIGHTS = ("path", "clip")
"""Settings of rewards that name weights; others name tokenizers and the like."""

HALF = 2
"""Bytes of a number in files whose shapes are not read: TorchScript, as OpenAI's in 16 bit."""


def reward_bytes(run: RunConfig) -> dict[str, float]:
    """Name -> bytes of the rewards that share the model's GPU: float32 weights.

    Files that are not there, as of hub ids, count nothing; nor do activations, which are small.
    """
    found = {}
    for name, reward in run.rewards.items():
        if getattr(reward, "device", "elsewhere") is None:
            paths = [Path(path) for key, path in reward.files.items() if key in WEIGHTS]
            found[name] = 4.0 * sum(map(_numbers_of, paths))
    return found


def _numbers_of(path: Path) -> int:
    """Of a file, or of those in a folder."""
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    files = files or sorted(path.glob("*.bin"))
    return sum(_numbers(file, file.stat().st_mtime_ns) for file in files)


@cache
def _numbers(file: Path, changed: int) -> int:
    """Floating-point numbers in a file of weights; ``changed`` tells another one apart."""
    try:
        if file.suffix == ".safetensors":
            return sum(prod(shape) for shape in read_header(file).values())
        if is_torchscript(str(file)):
            return file.stat().st_size // HALF
        state = torch.load(file, map_location="meta", weights_only=True, mmap=True)
    except UserError:
        return 0  # said where rewards are loaded
    except Exception:  # torch's older format, which cannot be mapped, or no weights at all
        return file.stat().st_size // HALF
    state = state.get("state_dict", state) if isinstance(state, Mapping) else {}
    values = state.values() if isinstance(state, Mapping) else ()
    return sum(v.numel() for v in values if isinstance(v, Tensor) and v.is_floating_point())
