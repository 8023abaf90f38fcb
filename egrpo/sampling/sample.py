"""The one way to sample from a model: rollouts of trees, and plain images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from egrpo.core.executor import Executor, NoiseFn, SuffixFn, VelocityFn
from egrpo.core.noise import SQUARED_ERROR, Matching
from egrpo.core.rollout import Rollout, joined
from egrpo.core.schedule import Sigmas
from egrpo.core.seeds import normal
from egrpo.core.tree import Tree
from egrpo.errors import during
from egrpo.images import Images
from egrpo.methods.shapes import chains
from egrpo.models.base import FlowModel
from egrpo.models.conditioning import Conditioning
from egrpo.sampling.fit import batch_of

PIXELS = 2**22
"""Of plain images that are decoded at once, at most: four of 1024 x 1024."""


@dataclass(frozen=True)
class Sampler:
    """Samples trees with a model, whose weights are those of the moment of each call.

    Attributes:
        model, conditioning: what samples, and the embeddings that prompt ids number.
        sigmas: the grid, T + 1 floats from 1 to 0.
        micro_batch: most latents in one network call; auto: what fits, see :attr:`batch`.
        noise_level: a or eta of the stochastic edges.
        train_micro_batch, parts, matching: of trained edges, see
            :class:`~egrpo.core.executor.Executor`.
    """

    model: FlowModel
    conditioning: Conditioning
    sigmas: Sigmas
    micro_batch: int | Literal["auto"]
    noise_level: float = 0.0
    train_micro_batch: int | None = None
    parts: int = 1
    matching: Matching = SQUARED_ERROR

    @property
    def batch(self) -> int:
        """Most latents in one network call."""
        return batch_of(self.model, self.conditioning, self.micro_batch)

    @during("sampling")
    def rollout(
        self, ids: Sequence[int], trees: Sequence[Tree], *purpose: int | str, exact: bool = False
    ) -> Rollout:
        """Sample one tree for each prompt.

        Args:
            ids: of the prompts.
            trees: one for each of them.
            purpose: what the noise is for; with prompt id, step and sample it is the seed, so
                that the same samples start from the same noise whatever the batch size.
            exact: leave out features kept from the step before, even where the settings have them.
        """
        model, shape = self.model, self.model.image_shape
        prompts = self.conditioning.batch(ids, model.device)

        def velocity(x: Tensor, sigma: float, tree: Tensor) -> Tensor:
            return model.velocity(x, sigma, prompts.rows(tree))

        def cheaper(x: Tensor, sigma: float, tree: Tensor, paths: tuple[object, ...]) -> Tensor:
            return model.velocity(x, sigma, prompts.rows(tree), network, paths)

        def noise(tree: int, start: int, sample: int) -> Tensor:
            return normal(shape, *purpose, ids[tree], start, sample)

        with model.sampling(exact=exact, batch=self.batch) as network:
            where = {"dtype": model.dtype, "device": model.device}
            return self._run(trees, velocity, cheaper, noise, **where)

    def images(self, ids: Sequence[int], samples: int) -> tuple[Images, int]:
        """Images [prompts * samples] by plain ODE, samples of a prompt together, on the CPU.

        And the number of network evaluations. Those of monitors and evaluations: the same prompt
        and sample start from the same noise in every run.
        """
        if not ids:
            size = self.model.settings.height, self.model.settings.width
            return Images.whole(torch.empty(0, 3, *size, dtype=torch.uint8)), 0
        rollout = self.rollout(ids, self.chains(len(ids), samples), "evaluate", exact=True)
        m = self.model.settings
        at_once = min(self.batch, max(1, PIXELS // (m.height * m.width)))
        images = self.model.decode(rollout.leaves, at_once).cpu()
        return images, rollout.forward * self.model.evaluations_per_velocity

    def chains(self, prompts: int, samples: int) -> list[Tree]:
        """The trees of :meth:`images`."""
        return [chains(len(self.sigmas) - 1, samples)] * prompts

    def _run(
        self,
        trees: Sequence[Tree],
        velocity: VelocityFn,
        cheaper: SuffixFn,
        noise: NoiseFn,
        **where: Any,
    ) -> Rollout:
        run = Executor(
            *(trees, self.sigmas, velocity, noise),
            noise_level=self.noise_level,
            micro_batch=self.batch,
            train_micro_batch=self.train_micro_batch,
            suffix_velocity=cheaper,
            parts=self.parts,
            matching=self.matching,
            **where,
        )
        return run.rollout()

    # -- in step with other processes, where weights are sharded ---------------------------

    def rehearse(self, trees: Sequence[Tree]) -> tuple[int, Rollout]:
        """Network calls and batches of such a rollout, found with latents of one number.

        Sharded weights make every call a meeting of all processes; so each must know beforehand
        how many the others will make.
        """
        calls = 0

        def counted(x: Tensor, *of: object) -> Tensor:
            nonlocal calls
            calls += 1
            return torch.zeros_like(x)

        if not trees:
            return 0, joined([], [])
        rollout = self._run(trees, counted, counted, lambda *_: torch.zeros(1))
        return calls, rollout

    @torch.no_grad()
    def idle(self, calls: int) -> None:
        """Take part in network calls of other processes, without any effect."""
        x = torch.zeros(1, *self.model.image_shape, device=self.model.device)
        prompt = self.conditioning.batch([0], self.model.device)
        for _ in range(calls):
            self.model.velocity(x, 1.0, prompt)
