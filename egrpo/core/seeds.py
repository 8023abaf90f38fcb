"""Seeds as functions of what they are for, never of process rank or call order.

Choices need no torch, so that a run's cost is known without it; noise does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def seed_of(*parts: int | str) -> int:
    """A 63-bit seed from (run seed, purpose, iteration, prompt id, step, sample), in any mix.

    Stable across processes, machines and Python versions; a numpy integer counts as an int.
    """
    text = "\x1f".join(f"{'str' if isinstance(p, str) else 'int'}:{p}" for p in parts)
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def shuffled(items: Iterable[int], *parts: int | str) -> tuple[int, ...]:
    """``items`` in a random order that is a function of ``parts``: sorted by their seeds.

    Unlike a library's shuffle it is the same under every version of every library.
    """
    return tuple(sorted(items, key=lambda item: (seed_of(*parts, item), item)))


def normal(shape: tuple[int, ...], *parts: int | str) -> torch.Tensor:
    """Standard normal float32 tensor of ``shape``, drawn on the CPU from ``seed_of(*parts)``."""
    import torch

    generator = torch.Generator().manual_seed(seed_of(*parts))
    return torch.randn(shape, generator=generator)
