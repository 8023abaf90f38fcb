"""Trees of an iteration, sampled: this process's share, part by part, in step with the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from egrpo.config.models import RunConfig
from egrpo.core.executor import execute
from egrpo.core.rollout import Rollout, joined
from egrpo.core.schedule import Sigmas
from egrpo.core.seeds import normal
from egrpo.core.tree import Tree
from egrpo.errors import during
from egrpo.models.base import FlowModel
from egrpo.models.conditioning import Conditioning
from egrpo.sampling.processes import Processes

Finish = Callable[[Rollout, list[int]], None]
"""Called with each part's rollout and its prompt ids, while the next part is still to come."""


class Rollouts:
    """Samples trees with the model as it is.

    Args:
        run, model, sigmas: what samples, and on which grid.
        conditioning: embeddings of the training prompts.
        world: the processes of the job.
    """

    def __init__(
        self,
        run: RunConfig,
        model: FlowModel,
        sigmas: Sigmas,
        conditioning: Conditioning,
        world: Processes,
    ) -> None:
        self.run, self.model, self.sigmas = run, model, sigmas
        self.conditioning, self.world = conditioning, world
        self.rehearsed: list[Rollout] = []

    @during("sampling")
    def sample(
        self, iteration: int, ids: list[int], trees: list[Tree], finish: Finish | None = None
    ) -> Rollout:
        """Sample this process's share of the trees of the prompts ``ids``.

        Returns:
            Its leaves and batches; edges and numbers of trees are those of all processes.
        """
        own = self.world.share(len(ids))
        rehearsed = [self._rehearse(trees, r) for r in range(self.world.count)]
        parts, sizes = [], []
        for part in self._parts(own):
            parts.append(self._execute(iteration, ids[part], trees[part]))
            sizes.append(part.stop - part.start)
            if finish is not None:
                finish(parts[-1], ids[part])
        rollout = joined(parts, sizes)
        if self.world.sharded:  # before anything else that the processes do together
            calls = [count for count, _ in rehearsed]
            self.idle(max(calls) - calls[self.world.rank], ids[:1])
        shares = self.world.gather([(own.start + t, k) for t, k in rollout.edges])
        if self.world.sharded:
            self.rehearsed = [r.placed(0, shares, n) for n, (_, r) in enumerate(rehearsed)]
        return rollout.placed(own.start, shares, self.world.rank)

    def most_batches(self, part: int, kept: set[int] | None) -> int:
        """Batches that the busiest process has in one optimizer step; sharded weights only."""
        return max(len(rollout.update(part, kept)) for rollout in self.rehearsed)

    def _parts(self, own: slice) -> Iterator[slice]:
        """The share cut into what is sampled together."""
        size = self.run.train.prompts_at_once or own.stop - own.start
        for begin in range(own.start, own.stop, size):
            yield slice(begin, min(begin + size, own.stop))

    def _execute(self, iteration: int, ids: list[int], trees: list[Tree]) -> Rollout:
        prompts = self.conditioning.batch(ids, self.model.device)
        shape, seed, t = self.model.image_shape, self.run.seed, self.run.train

        def velocity(x: Tensor, sigma: float, tree: Tensor) -> Tensor:
            return self.model.velocity(x, sigma, prompts.rows(tree))

        def cheaper(x: Tensor, sigma: float, tree: Tensor, paths: tuple[int, ...]) -> Tensor:
            return self.model.velocity(x, sigma, prompts.rows(tree), self.model.sampler, paths)

        def noise(tree: int, start: int, sample: int) -> Tensor:
            return normal(shape, seed, "rollout", iteration, ids[tree], start, sample)

        rollout = execute(
            trees,
            self.sigmas,
            velocity,
            noise,
            noise_level=self.run.method.noise_level,
            micro_batch=t.micro_batch,
            train_micro_batch=t.train_micro_batch,
            dtype=self.model.dtype,
            device=self.model.device,
            suffix_velocity=cheaper,
            parts=t.updates,
            matching=self.run.method.matching,
        )
        self.model.forget_features()
        return rollout

    # -- in step with others, where weights are sharded ------------------------------------

    def _rehearse(self, trees: list[Tree], rank: int) -> tuple[int, Rollout]:
        """Network calls and batches of a process's rollout, found with latents of one number.

        Sharded weights make every call a meeting of all processes; so each must know beforehand
        how many the others will make. Nothing is done where weights are whole.
        """
        if not self.world.sharded:
            return 0, joined([], [])
        calls, t = 0, self.run.train

        def counted(x: Tensor, *of: Any) -> Tensor:
            nonlocal calls
            calls += 1
            return torch.zeros_like(x)

        parts = list(self._parts(self.world.block(len(trees), rank)))
        rollouts = [
            execute(
                trees[part],
                self.sigmas,
                counted,
                lambda *of: torch.zeros(1),
                noise_level=self.run.method.noise_level,
                micro_batch=t.micro_batch,
                train_micro_batch=t.train_micro_batch,
                suffix_velocity=counted,
                parts=t.updates,
            )
            for part in parts
        ]
        return calls, joined(rollouts, [part.stop - part.start for part in parts])

    def idle(
        self,
        calls: int,
        ids: list[int],
        *,
        train: bool = False,
        average: Callable[[Tensor, float, Conditioning], Tensor] | None = None,
    ) -> None:
        """Take part in network calls of other processes, without any effect.

        ``train``: they are those of training; ``average`` evaluates the averaged weights.
        """
        x = torch.zeros(1, *self.model.image_shape, device=self.model.device)
        prompt = self.conditioning.batch(ids[:1], self.model.device)
        for _ in range(calls):
            if average is not None:
                average(x, 1.0, prompt)
            with torch.set_grad_enabled(train):
                v = self.model.velocity(x, 1.0, prompt)
            if train:
                if self.run.train.kl_weight > 0:
                    self.model.reference_velocity(x, 1.0, prompt)
                (0.0 * v.float().sum()).backward()
