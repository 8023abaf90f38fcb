"""Trees of an iteration, sampled: this process's share, in step with the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from egrpo.config.models import RunConfig
from egrpo.core.rollout import Rollout, joined
from egrpo.core.tree import Tree
from egrpo.sampling.processes import Processes
from egrpo.sampling.sample import Sampler

Finish = Callable[[Rollout, list[int]], None]
"""Called with each round's rollout and its prompt ids, while the next round is still to come."""


class Rollouts:
    """Samples trees with the model as it is, ``train.prompts_at_once`` prompts a round."""

    def __init__(self, run: RunConfig, sampler: Sampler, processes: Processes) -> None:
        self.run, self.sampler, self.processes = run, sampler, processes
        self.rehearsed: list[Rollout] = []  # of each process, where weights are sharded

    def sample(
        self, iteration: int, ids: list[int], trees: list[Tree], finish: Finish | None = None
    ) -> Rollout:
        """Leaves and batches of this process's share of the trees of the prompts ``ids``.

        Edges and numbers of trees are those of all processes.
        """
        processes, purpose = self.processes, (self.run.seed, "rollout", iteration)
        own = processes.share(len(ids))
        found, sizes = [], []
        for some in self._rounds(own):
            found.append(self.sampler.rollout(ids[some], trees[some], *purpose))
            sizes.append(some.stop - some.start)
            if finish is not None:
                finish(found[-1], ids[some])
        rollout = joined(found, sizes)
        rehearsed = []
        if processes.sharded:  # before anything else that the processes do together
            rehearsed = [self._rehearse(trees, rank) for rank in range(processes.count)]
            calls = [count for count, _ in rehearsed]
            self.sampler.idle(max(calls) - calls[processes.rank])
        edges = processes.gather([(own.start + t, k) for t, k in rollout.edges])
        self.rehearsed = [r.placed(0, edges, n) for n, (_, r) in enumerate(rehearsed)]
        return rollout.placed(own.start, edges, processes.rank)

    def most_batches(self, part: int, kept: set[int] | None) -> int:
        """Batches that the busiest process has in one optimizer step; sharded weights only."""
        return max(len(rollout.batches_of(part, kept)) for rollout in self.rehearsed)

    def _rounds(self, own: slice) -> Iterator[slice]:
        """A share of the prompts, cut into what is sampled together."""
        size = self.run.train.prompts_at_once or own.stop - own.start
        for begin in range(own.start, own.stop, size):
            yield slice(begin, min(begin + size, own.stop))

    def _rehearse(self, trees: list[Tree], rank: int) -> tuple[int, Rollout]:
        """Network calls and batches of the rollout of another process."""
        rounds = list(self._rounds(self.processes.block(len(trees), rank)))
        calls, found = zip(*(self.sampler.rehearse(trees[some]) for some in rounds), strict=True)
        return sum(calls), joined(found, [some.stop - some.start for some in rounds])
