"""Seeds as functions of what they are for, never of process rank or call order.

Choices need no torch, so that a run's cost is known without it; noise does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def seed_of(*parts: int | str) -> int:
    """A 63-bit seed from (run seed, purpose, iteration, prompt id, step, sample), in any mix.

    Stable across processes, machines and Python versions; a numpy integer counts as an int.
    """
    return _hashed(parts, 8) >> 1


def _hashed(parts: tuple[int | str, ...], size: int) -> int:
    text = "\x1f".join(f"{'str' if isinstance(p, str) else 'int'}:{p}" for p in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=size).digest(), "little")


def shuffled(items: Iterable[int], *parts: int | str) -> tuple[int, ...]:
    """``items`` in a random order that is a function of ``parts``: sorted by their seeds.

    Unlike a library's shuffle it is the same under every version of every library.
    """
    return tuple(sorted(items, key=lambda item: (seed_of(*parts, item), item)))


def normal(shape: tuple[int, ...], *parts: int | str) -> torch.Tensor:
    """Standard normal float32 tensor of ``shape``, a function of ``parts``, on the CPU.

    By numpy's Philox, whose key has 128 bits: torch's generator keeps 32 bits of its seed, so that
    some of a study's tensors were equal (6 pairs of 230,400).
    """
    import torch

    generator = np.random.Generator(np.random.Philox(key=_hashed(parts, 16)))
    return torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))
