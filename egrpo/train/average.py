"""The exponential moving average of trained weights, which is kept and evaluated."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from egrpo.config.models import Train
from egrpo.models.base import FlowModel
from egrpo.models.conditioning import Conditioning
from egrpo.sampling.processes import Processes


class AveragedWeights:
    """The average of a run's weights, one tensor for each of ``parameters``.

    ``weights`` is None without ``train.ema_decay``: all here goes by the weights themselves.
    """

    def __init__(
        self,
        settings: Train,
        model: FlowModel,
        parameters: list[nn.Parameter],
        processes: Processes,
    ) -> None:
        self.settings, self.model = settings, model
        self.parameters, self.processes = parameters, processes
        self.weights = [p.detach().clone() for p in parameters] if settings.ema_decay else None

    @torch.no_grad()
    def follow(self, step: int, iteration: int) -> None:
        """Move after an optimizer step, both counted from 1, as Flow-GRPO's code does."""
        t = self.settings
        if self.weights is None or (step + 1) % t.ema_every:
            return
        decay = t.ema_decay or 0.0
        if t.ema_ramp == "warm_up":
            decay = min(decay, (1 + step) / (10 + step))
        elif t.ema_ramp is not None:
            decay = min(decay, t.ema_ramp * iteration)
        for mean, p in zip(self.weights, self.parameters, strict=True):
            mean.lerp_(p, 1.0 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within it the model holds the averaged weights, if there are any."""
        if self.weights is None:
            yield
            return
        own = [p.detach().clone() for p in self.parameters]
        self._assign(self.weights)
        try:
            yield
        finally:
            self._assign(own)

    @torch.no_grad()
    def velocity(self, x: Tensor, sigma: float, prompts: Conditioning) -> Tensor:
        """Velocity [B, C, h, w] of the averaged weights, see :meth:`FlowModel.velocity`."""
        with self.applied():
            return self.model.velocity(x, sigma, prompts)

    @torch.no_grad()
    def _assign(self, values: list[Tensor]) -> None:
        for p, value in zip(self.parameters, values, strict=True):
            p.copy_(value)
        if self.processes.sharded:
            self.model.transformer.reshard()  # it keeps what it gathered for its last forward
