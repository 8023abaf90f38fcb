"""Early signs of reward hacking on fixed held-out prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from egrpo.config.models import RunConfig
from egrpo.images import Images, check
from egrpo.measure.monitors import measure
from egrpo.rewards import RewardModel, score_all
from egrpo.sampling.sample import Sampler
from egrpo.train.learner import Learner


class Monitor:
    """Images of fixed held-out prompts by the averaged weights, and all rewards of them.

    Those of the first look are ``base``, which later ones are compared with.
    """

    def __init__(
        self,
        run: RunConfig,
        sampler: Sampler,
        texts: Sequence[str],
        rewards: Mapping[str, RewardModel],
        learner: Learner,
    ) -> None:
        self.run, self.sampler, self.rewards = run, sampler, rewards
        self.texts = texts[: run.train.monitor_prompts]
        self.average, self.counts = learner.average, learner.counts
        self.processes = learner.processes
        self.base: Images | None = None

    def look(self, iteration: int) -> tuple[dict[str, float], Images]:
        """What :func:`measure` says after an iteration, and the images; UserError if none is."""
        samples, processes = self.run.train.monitor_samples, self.processes
        ids = list(range(len(self.texts)))
        shares = [ids[processes.block(len(ids), n)] for n in range(processes.count)]
        images = self._sample(shares, samples)
        prompts = [self.texts[n] for n in shares[processes.rank] for _ in range(samples)]
        scores = processes.arrays(score_all(self.rewards, images, prompts))
        pixels = torch.from_numpy(processes.joined_arrays(images.pixels.numpy()))
        images = Images(pixels, processes.joined_arrays(images.faults))
        self._check(images.faults.tolist(), "monitor", iteration)
        if self.base is None:
            self.base = images
        return measure(scores, images, self.base, samples), images

    def check_weights(self, iteration: int) -> None:
        """Make one image where no monitor will; UserError if it is none."""
        images = self._sample([[0]] * self.processes.count, 1)
        self._check(self.processes.joined(images.faults.tolist()), "one image", iteration)

    def _sample(self, shares: list[list[int]], samples: int) -> Images:
        """This process's images by the averaged weights; ``shares`` are the prompts of each."""
        rank = self.processes.rank
        with self.average.applied():
            images, forward = self.sampler.images(shares[rank], samples)
            if self.processes.sharded:
                trees = [self.sampler.chains(len(share), samples) for share in shares]
                calls = [self.sampler.rehearse(each)[0] for each in trees]
                self.sampler.idle(max(calls) - calls[rank])
        self.counts["monitor"] += sum(self.processes.gather(forward))
        return images

    def _check(self, faults: list[int], what: str, iteration: int) -> None:
        """See :func:`egrpo.images.check`; ``faults`` are those of all processes."""
        what, told = f"run {self.run.run}: {what} of iteration {iteration}", self.processes.main
        check(faults, what, self.run.model, trained=iteration > 0, told=told)
