"""The processes of one job, through accelerate: who does what, and what they tell each other.

Prompts are shared out in blocks, so the samples of a group stay on one process. What every process
must agree on (edges, rewards, counters: some kilobytes) is gathered; gradients are added up once an
optimizer step. Alone, every method is the identity.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from egrpo.errors import UserError

T = TypeVar("T")


class Processes:
    """One process, ``rank``, of the ``count`` of a job; ``main`` is the one that writes files.

    ``sharded``: weights are cut up among them (FSDP2), and every network call waits for the same
    call of all others.
    """

    def __init__(self, device: torch.device) -> None:
        from accelerate import Accelerator

        self.accelerator = Accelerator(cpu=device.type == "cpu")
        self.count, self.rank = self.accelerator.num_processes, self.accelerator.process_index
        self.main = self.accelerator.is_main_process
        if self.count > 1:
            die_with_parent()
        # what `accelerate launch` sets for config/accelerate/fsdp2.yaml
        self.sharded = self.count > 1 and os.environ.get("ACCELERATE_USE_FSDP", "") == "true"

    def share(self, items: int) -> slice:
        """The block of ``items`` that this process works on; blocks differ by one at most."""
        return self.block(items, self.rank)

    def block(self, items: int, rank: int) -> slice:
        """The block of another process."""
        small, more = divmod(items, self.count)
        begin = rank * small + min(rank, more)
        return slice(begin, begin + small + (rank < more))

    def gather(self, thing: T) -> list[T]:
        """What each process has, in order of rank."""
        if self.count == 1:
            return [thing]
        from accelerate.utils import gather_object

        return list(gather_object([thing]))

    def from_main(self, make: Callable[[], T]) -> T:
        """What the main process makes, for all."""
        return self.gather(make() if self.main else cast(T, None))[0]

    def joined(self, own: Sequence[T]) -> list[T]:
        """What each process has of a list, one after the other."""
        return [item for each in self.gather(list(own)) for item in each]

    def joined_arrays(self, own: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The same of arrays [n, ...]."""
        return np.concatenate(self.gather(own))

    def arrays(self, own: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        """The same of each named array."""
        return {name: self.joined_arrays(array) for name, array in own.items()}

    def wait(self) -> None:
        """Until all processes are here."""
        self.accelerator.wait_for_everyone()

    @torch.no_grad()
    def add_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Sum of the gradients of all processes; sharded ones were reduced in the backward pass."""
        if self.count == 1 or self.sharded:
            return
        for p in parameters:  # a process without a batch in this step has none
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        grads = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([g.reshape(-1) for g in grads])
        total: Any = self.accelerator.reduce(flat, reduction="sum")
        for grad, summed in zip(grads, total.split([g.numel() for g in grads]), strict=True):
            grad.copy_(summed.view_as(grad))


def die_with_parent() -> None:
    """SIGKILL for this process when its launcher is gone; Linux only, elsewhere nothing.

    A launcher that is killed would leave workers behind, on GPUs that others are given.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, int(signal.SIGKILL))  # PR_SET_PDEATHSIG, prctl(2)


def check_share(prompts: int, processes: int, key: str) -> None:
    """Raise UserError, naming the setting, if there are more processes than prompts."""
    if prompts < processes:
        raise UserError(
            f"{key}: {prompts} prompts for {processes} processes; groups are not split, so raise "
            "it or start fewer processes"
        )
