"""Seeds as functions of what the noise is for, never of process rank or call order."""

from __future__ import annotations

import hashlib

import torch


def seed_of(*parts: int | str) -> int:
    """A 63-bit seed from (run seed, purpose, iteration, prompt id, step, sample), in any mix.

    Stable across processes, machines and Python versions; a numpy integer counts as an int.
    """
    text = "\x1f".join(f"{'str' if isinstance(p, str) else 'int'}:{p}" for p in parts)
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def normal(shape: tuple[int, ...], *parts: int | str) -> torch.Tensor:
    """Standard normal float32 tensor of ``shape``, drawn on the CPU from ``seed_of(*parts)``."""
    generator = torch.Generator().manual_seed(seed_of(*parts))
    return torch.randn(shape, generator=generator)
