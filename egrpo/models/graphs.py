"""CUDA graphs: a network call of a shape that was seen before is one launch.

A small network's kernels take less time than their launches do. A graph replays all of them on the
tensors that it was recorded with, so inputs are copied there, and the result is copied from there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Call = Callable[..., Tensor]


class Recorded(NamedTuple):
    """A recorded call: the tensors that it reads, how it is replayed, the tensor that it writes."""

    inputs: Sequence[Tensor]
    replay: Callable[[], Any]
    output: Tensor


def record(call: Call, inputs: Sequence[Tensor], pool: Any) -> Recorded:
    """A CUDA graph of ``call(*inputs)``; ``pool``: memory that graphs share."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # what sets itself up at its first calls must not be recorded
            call(*inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        output = call(*inputs)
    return Recorded(inputs, graph.replay, output)


class Graphs:
    """The recorded calls of one network.

    Weights may be written to between calls, and not replaced. The first call of a shape is replayed
    as well, so that its bits are those of the calls after it.
    """

    def __init__(self, record: Callable[..., Recorded] = record) -> None:
        """``record``: as :func:`record`."""
        self.record = record
        self.pool = torch.cuda.graph_pool_handle() if torch.cuda.is_available() else None
        self.recorded: dict[Any, Recorded] = {}

    @torch.no_grad()
    def __call__(self, call: Call, constant: Any, inputs: Sequence[Tensor]) -> Tensor:
        """``call(*inputs)``.

        Args:
            call: reads nothing else that changes but ``constant``.
            constant: what is written into the recording beside the shapes, such as the time.
            inputs: tensors, all on the network's device.
        """
        key = (constant, *((t.shape, t.dtype) for t in inputs))
        if key not in self.recorded:
            self.recorded[key] = self.record(call, [t.clone() for t in inputs], self.pool)
        found = self.recorded[key]
        for mine, given in zip(found.inputs, inputs, strict=True):
            mine.copy_(given)
        found.replay()
        return found.output.clone()
