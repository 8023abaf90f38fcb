"""What a run spends: network evaluations, checked against what its trees predict, and memory."""

from __future__ import annotations

import resource
from collections import Counter
from collections.abc import Collection, Mapping, Sequence

import torch

from egrpo.config.models import RunConfig
from egrpo.core.rollout import Rollout, update_sizes
from egrpo.core.tree import Tree
from egrpo.planning.trees import RunCost, cost_of, references
from egrpo.sampling.processes import Processes


class Counts(dict[str, int]):
    """Network evaluations so far: ``forward``, ``train``, ``reference`` and ``monitor``.

    ``spent`` is what this process has done in this iteration and :meth:`settle` will add.
    """

    def __init__(self, run: RunConfig, processes: Processes) -> None:
        super().__init__(forward=0, train=0, reference=0, monitor=0)
        self.run, self.processes = run, processes
        self.spent: Counter[str] = Counter()

    def settle(
        self, iteration: int, trees: Sequence[Tree], rollout: Rollout, kept: Collection[int] | None
    ) -> None:
        """Add up what all processes spent in an iteration; RuntimeError if the trees predict else.

        Of pruned edges the sources need no evaluation for training.
        """
        predicted = cost_of(self.run, trees)
        if kept is not None:
            sizes = update_sizes(trees, rollout.edges, self.run.train.updates, kept).values()
            guided = 2 if self.run.model.guidance_scale > 1 else 1
            train = sum(s.sources for s in sizes) * guided
            predicted = RunCost(predicted.forward, train, references(self.run) * train)
        everyone = self.processes.gather(self.spent)
        for name, wanted in vars(predicted).items():
            executed = sum(spent[name] for spent in everyone)
            self[name] += executed
            if executed != wanted:
                raise RuntimeError(
                    f"run {self.run.run}: executed {executed} {name} evaluations in iteration "
                    f"{iteration}, predicted {wanted}"
                )
        self.spent = Counter()


def spent_on_training(counts: Mapping[str, int]) -> int:
    """Network evaluations so far, without those of monitors."""
    return sum(counts[name] for name in ("forward", "train", "reference"))


def peak_memory_mib() -> float:
    """Largest resident (CPU) or allocated (CUDA) memory of this process so far, MiB."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
