"""Early signs of reward hacking on fixed held-out prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from egrpo.config.models import RunConfig
from egrpo.images import Images, check
from egrpo.measure.monitors import measure
from egrpo.models.base import FlowModel
from egrpo.models.conditioning import Conditioning
from egrpo.planning.grids import monitor_sigmas
from egrpo.rewards import RewardModel, score_all
from egrpo.sampling.processes import Processes
from egrpo.sampling.sample import Sampler
from egrpo.train.average import AveragedWeights
from egrpo.train.counts import Counts


class Monitor:
    """Images of fixed held-out prompts by the averaged weights, and all rewards of them.

    Attributes:
        base: the images of the first look, which later ones are compared with; None before it.
    """

    def __init__(
        self,
        run: RunConfig,
        model: FlowModel,
        texts: Sequence[str],
        conditioning: Conditioning,
        rewards: Mapping[str, RewardModel],
        processes: Processes,
        counts: Counts,
        average: AveragedWeights,
    ) -> None:
        self.run, self.rewards, self.processes, self.counts = run, rewards, processes, counts
        self.average = average
        self.texts = texts[: run.train.monitor_prompts]
        self.sampler = Sampler(model, conditioning, monitor_sigmas(run), run.train.micro_batch)
        self.base: Images | None = None

    def look(self, iteration: int) -> tuple[dict[str, float], Images]:
        """What :func:`measure` says after an iteration, and the images [n].

        Raises:
            UserError: if none of them is an image.
        """
        samples, processes = self.run.train.monitor_samples, self.processes
        ids = list(range(len(self.texts)))
        images = self._sample([ids[processes.block(len(ids), n)] for n in range(processes.count)])
        prompts = [self.texts[n] for n in ids[processes.share(len(ids))] for _ in range(samples)]
        scores = processes.arrays(score_all(self.rewards, images, prompts))
        pixels = torch.from_numpy(processes.joined_arrays(images.pixels.numpy()))
        images = Images(pixels, processes.joined_arrays(images.faults))
        self._check(images.faults.tolist(), f"monitor of iteration {iteration}", iteration)
        if self.base is None:
            self.base = images
        return measure(scores, images, self.base, samples), images

    def check_weights(self, iteration: int) -> None:
        """Make one image where no monitor will.

        Raises:
            UserError: if it is none.
        """
        with self.average.applied():
            images, forward = self.sampler.images([0], 1)
        self.counts["monitor"] += sum(self.processes.gather(forward))
        faults = self.processes.joined(images.faults.tolist())
        self._check(faults, f"one image of iteration {iteration}", iteration)

    def _sample(self, shares: list[list[int]]) -> Images:
        """This process's images; ``shares`` are the prompts of each process."""
        samples, rank = self.run.train.monitor_samples, self.processes.rank
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
        model, say = self.run.model, self.processes.main
        check(faults, f"run {self.run.run}: {what}", model, trained=iteration > 0, say=say)
