"""Parts of networks: the blocks that they repeat, and weights that several processes share."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def repeated_blocks(network: Any) -> dict[str, Any]:
    """The blocks that a network repeats, by name; the rest is small."""
    kinds = set(network._no_split_modules)
    return {name: m for name, m in network.named_modules() if type(m).__name__ in kinds}


def compile_blocks(network: Any) -> None:
    """Compile the repeated blocks, each shape of batch for itself.

    Blocks of one kind share what is compiled.
    """
    import torch._dynamo  # takes a second

    torch._dynamo.config.recompile_limit = 64  # kinds of blocks by shapes; beyond, none is compiled
    for block in repeated_blocks(network).values():
        block.compile(dynamic=False)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that several processes may share; all must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's shard of a whole tensor, cut as ``like`` is; undoes :func:`whole`."""
    if not isinstance(like, DTensor) or tensor.ndim == 0:
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)
