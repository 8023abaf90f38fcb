"""What an iteration spends and leaves in the journal, and the tables made of it at the end."""

from __future__ import annotations

import resource
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from egrpo.config.models import RunConfig
from egrpo.core.advantage import Advantages, comparison_units, edge_values
from egrpo.core.rollout import Rollout, update_sizes
from egrpo.core.tree import Tree
from egrpo.planning.trees import RunCost, cost_of, references
from egrpo.sampling.processes import Processes
from egrpo.store import journal
from egrpo.store.tables import ROLLOUTS

Metrics = dict[str, float]


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
            train = sum(s.sources for s in sizes) * self.run.model.evaluations_per_velocity
            predicted = RunCost(predicted.forward, train, references(self.run) * train)
        everyone = self.processes.gather(self.spent)
        for name, wanted in predicted._asdict().items():
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


def reward_metrics(
    scores: dict[str, Any], advantage: Advantages, rollout: Rollout, trees: list[Tree]
) -> Metrics:
    """Of each reward the mean over images with a valid score, how many these are, and the mean std
    within groups; and what hygiene removed.
    """
    metrics: Metrics = {
        "groups": advantage.groups,
        "groups_masked": advantage.groups_masked,
        "samples_invalid": advantage.samples_invalid,
        "advantage_abs_mean": float(np.abs(advantage.values).mean()),
    }
    units, _ = comparison_units(trees, rollout.edges)
    groups = [(t, trees[t].nodes[node].group) for t, node in units]
    for name, values in scores.items():
        valid = values[~np.isnan(values)]
        within: dict[tuple[int, int], list[float]] = {}
        for group, value in zip(groups, edge_values(values, trees, units), strict=True):
            if not np.isnan(value):
                within.setdefault(group, []).append(value)
        spreads = [np.std(x, ddof=1) for x in within.values() if len(x) > 1]
        metrics[f"reward/{name}"] = float(valid.mean()) if valid.size else np.nan
        metrics[f"reward_valid/{name}"] = valid.size
        metrics[f"reward_std/{name}"] = float(np.mean(spreads)) if spreads else np.nan
    return metrics


def rollout_rows(
    scores: dict[str, Any],
    advantage: Advantages,
    rollout: Rollout,
    log_probs: Sequence[float],
    ids: list[int],
    trees: list[Tree],
) -> dict[str, list[Any]]:
    """Columns of the rollouts table, one entry per trained edge; rewards by ``reward/name``.

    Ordered by prompt and node, however many processes shared the work.
    """
    order = sorted(range(len(rollout.edges)), key=rollout.edges.__getitem__)
    edges = [rollout.edges[e] for e in order]
    nodes = [trees[t].nodes[k] for t, k in edges]
    starts = [trees[t].nodes[trees[t].source(k)].index for t, k in edges]
    columns: dict[str, list[Any]] = {
        "prompt_id": [ids[t] for t, _ in edges],
        "step": starts,
        "span": [node.index - start for node, start in zip(nodes, starts, strict=True)],
        "sample": [node.sample for node in nodes],
        "advantage": [round(float(advantage.values[e]), 6) for e in order],
        "log_prob": [round(float(log_probs[e]), 7) for e in order],
    }
    for name, values in scores.items():
        columns[f"reward/{name}"] = edge_values(values, trees, edges).tolist()
    return columns


def metric_rows(run: RunConfig, log: Path, looked: Collection[int]) -> list[dict[str, Any]]:
    """Rows of TRAIN_METRICS from a run's journal, with the monitors of the iterations ``looked``.

    What rewards that neither train nor stop the run say of the monitored images is left out: it is
    computed where they are evaluated.
    """
    own = {f"reward/{name}" for name in run.train.rewards}
    own |= {name for name, bound in run.bounds.items() if bound.action == "stop"}

    def told(metric: str, iteration: int) -> bool:
        what, _, name = metric.partition("/")
        if not what.startswith("monitor"):
            return True
        return iteration in looked and (not name.startswith("reward/") or name in own)

    rows = []
    for line in journal.read(log):
        head = {"run": run.run, "iteration": line["iteration"], "nfe": line["nfe"]}
        rows += [
            {**head, "metric": metric, "value": value}
            for metric, value in line["metrics"].items()
            if told(metric, line["iteration"])
        ]
    return rows


def rollout_columns(run: str, log: Path) -> dict[str, list[Any]]:
    """Columns of ROLLOUTS from a run's journal."""
    columns: dict[str, list[Any]] = {name: [] for name, *_ in ROLLOUTS.columns}
    for line in journal.read(log):
        rows = line["rollouts"]
        for reward in (name for name in rows if name.startswith("reward/")):
            same = {"run": run, "iteration": line["iteration"], "nfe": line["nfe"]}
            same["reward"] = reward.removeprefix("reward/")
            for name, column in columns.items():
                if name in same:
                    column += [same[name]] * len(rows["step"])
                else:
                    column += rows[reward if name == "value" else name]
    return columns
