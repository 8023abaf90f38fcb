"""Training: rollout, rewards, advantages, optimizer step; checkpoint; again.

Departures from the E-GRPO paper, all by settings: LoRA instead of full fine-tuning by default;
one optimizer step per iteration instead of one per active step (as in its code).

A run killed at any moment and started again ends with the same weights, bit for bit: seeds are
functions of (run seed, iteration, prompt, step, sample), and a checkpoint holds all state.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from egrpo.config.models import RunConfig
from egrpo.core.advantage import Advantages, advantages
from egrpo.core.plan import Plan
from egrpo.core.rollout import Rollout
from egrpo.core.tree import Tree
from egrpo.errors import UserError, say
from egrpo.images import check
from egrpo.models import load_model
from egrpo.models.conditioning import Embeddings, load_conditioning
from egrpo.models.loading import resolve_device
from egrpo.planning.grids import monitor_sigmas, training_sigmas
from egrpo.planning.trees import RunCost, iteration_cost, trees_of
from egrpo.rewards import load_rewards, score_all
from egrpo.sampling.processes import Processes, check_share
from egrpo.sampling.sample import Sampler
from egrpo.store.checkpoint import Checkpoint
from egrpo.train.learner import Learner
from egrpo.train.monitor import Monitor
from egrpo.train.records import Counts, Metrics, peak_memory_mib, reward_metrics, rollout_rows
from egrpo.train.rollouts import Finish, Rollouts

FEW = 0.1
"""A method that trains a smaller share of its evaluations has the same bits for next to nothing."""


class Trainer:
    """One run's model, rewards and counters, and what an iteration does with them."""

    def __init__(self, run: RunConfig, plan: Plan | None, embeddings: Embeddings) -> None:
        self.run, self.plan, t = run, plan, run.train
        self.sigmas = plan.sigmas if plan else training_sigmas(run)
        self.texts, self.conditioning = load_conditioning(embeddings["train"])
        monitored, conditioning = load_conditioning(embeddings["monitor"])
        key, wanted = "train.prompts_per_iteration", t.prompts_per_iteration
        if wanted > len(self.texts):
            raise UserError(
                f"run {run.run}: {key}: {wanted} prompts, but {run.prompts.train} has "
                f"{len(self.texts)}"
            )
        self.processes = Processes(resolve_device(run.model.device))
        check_share(wanted, self.processes.count, key)
        self.model = load_model(run.model)
        self.rewards = load_rewards(run.rewards, str(self.model.device))
        sampler = Sampler(
            self.model,
            self.conditioning,
            self.sigmas,
            t.micro_batch,
            noise_level=run.method.noise_level,
            train_micro_batch=t.train_micro_batch,
            parts=t.updates,
            matching=run.method.matching,
        )
        self.rollouts = Rollouts(run, sampler, self.processes)
        self.counts = Counts(run, self.processes)
        cost = self.cost(1)
        deterministic = (
            cost.train < FEW * cost.total if t.deterministic == "auto" else t.deterministic
        )
        self.learner = Learner(run, self.rollouts, self.counts, deterministic=deterministic)
        self.parameters, self.average = self.learner.parameters, self.learner.average
        looking = Sampler(self.model, conditioning, monitor_sigmas(run), t.micro_batch)
        self.monitor = Monitor(run, looking, monitored, self.rewards, self.learner)
        if t.micro_batch == "auto":  # before a state is restored: the same where that is begun
            self.model.fits = min(self.processes.gather(sampler.batch))
        self.iteration = 0
        self.seconds = self.peak_mib = 0.0
        self.silent: set[str] = set()  # rewards that were said to have had no score

    # -- one iteration ---------------------------------------------------------------------

    def trees(self, iteration: int) -> tuple[list[int], list[Tree]]:
        """Prompt ids of an iteration and their rollout trees."""
        return trees_of(self.run, self.plan, iteration, len(self.texts))

    def rollout(
        self, iteration: int, ids: list[int], trees: list[Tree], finish: Finish | None = None
    ) -> Rollout:
        """This process's share of the trees, see :meth:`egrpo.train.rollouts.Rollouts.sample`."""
        with self.average.applied() if self.run.train.sample_average else nullcontext():
            return self.rollouts.sample(iteration, ids, trees, finish)

    def advantages(self, scores: dict[str, Any], rollout: Rollout, trees: list[Tree]) -> Advantages:
        """Advantages of the rollout's edges; UserError if no trained reward has a valid score."""
        trained = list(self.run.train.rewards)
        silent = [name for name in trained if np.isnan(scores[name]).all()]
        if silent == trained:
            raise UserError(
                f"run {self.run.run}: rewards.{', '.join(trained)}: every image of iteration "
                f"{self.iteration + 1} was scored NaN; training would learn nothing"
            )
        for name in silent:  # it may apply to other prompts only
            if name not in self.silent and self.processes.main:
                say(
                    f"{self.run.run}: rewards.{name}: every image of iteration "
                    f"{self.iteration + 1} was scored NaN; training goes on with the other rewards"
                )
            self.silent.add(name)
        how = self.run.advantage.model_dump()
        return advantages(scores, self.run.train.rewards, trees, rollout.edges, **how)

    def step(self) -> tuple[Metrics, dict[str, list[Any]]]:
        """One iteration; returns its metrics and the rows of the rollouts table."""
        begun, iteration = time.monotonic(), self.iteration + 1
        ids, trees = self.trees(iteration)
        trained = {name: self.rewards[name] for name in self.run.train.rewards}
        decoding, coming = 0.0, []
        faults: list[int] = []

        def finish(some: Rollout, of: list[int]) -> None:
            nonlocal decoding
            since = time.monotonic()
            images = self.model.decode(some.leaves, self.run.train.decode_batch)
            faults.extend(images.faults.tolist())
            texts = [self.texts[of[t]] for t in some.leaf_tree]
            coming.append(scorer.submit(score_all, trained, images, texts))
            decoding += time.monotonic() - since

        # a thread of its own: rewards elsewhere work while the next round is sampled
        with ThreadPoolExecutor(1) as scorer:
            rollout = self.rollout(iteration, ids, trees, finish)
            sampled = time.monotonic()
            found = [future.result() for future in coming]  # the others: the monitor
        self.counts.spent["forward"] += rollout.forward * self.model.evaluations_per_velocity
        scores = self.processes.arrays(
            {name: np.concatenate([each[name] for each in found]) for name in trained}
        )
        what = f"run {self.run.run}: iteration {iteration}"
        faults = self.processes.joined(faults)
        check(faults, what, self.run.model, trained=self.iteration > 0, told=False)  # but counted
        scored = time.monotonic()
        advantage = self.advantages(scores, rollout, trees)
        kept = self.run.method.keep(scores, self.run.train.rewards, trees, rollout.edges)
        metrics = self.learner.optimize(iteration, rollout, ids, trees, advantage.values, kept)
        self.counts.settle(iteration, trees, rollout, kept)
        self.iteration = iteration
        ended = time.monotonic()
        metrics |= reward_metrics(scores, advantage, rollout, trees)
        metrics |= {
            "nfe_forward": self.counts["forward"],
            "nfe_train": self.counts["train"],
            "time/rollout": sampled - begun - decoding,
            "time/decode_and_reward": scored - sampled + decoding,
            "time/optimize": ended - scored,
            "time/iteration": ended - begun,
        }
        self.seconds += ended - begun
        self.peak_mib = max(self.peak_mib, *self.processes.gather(peak_memory_mib()))
        log_probs = self.processes.joined_arrays(rollout.log_probs()).tolist()
        return metrics, rollout_rows(scores, advantage, rollout, log_probs, ids, trees)

    # -- state -----------------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        """Write the averaged weights, or the weights; files by the main process."""
        with self.average.applied():
            self.model.save(folder, write=self.processes.main)

    def checkpoint(self) -> Checkpoint:
        """Everything that the next iteration depends on."""
        numbers = {"seconds": self.seconds, "peak_mib": self.peak_mib, "counts": dict(self.counts)}
        numbers["optimizer_steps"] = self.learner.steps
        return Checkpoint(self.iteration, self.learner.state(), numbers)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint; UserError if it does not fit this run's parameters."""
        numbers = checkpoint.numbers
        self.learner.restore(checkpoint.tensors, numbers["optimizer_steps"])
        self.iteration = checkpoint.iteration
        self.seconds, self.peak_mib = numbers["seconds"], numbers["peak_mib"]
        self.counts.update(numbers["counts"])

    def cost(self, iteration: int) -> RunCost:
        """Predicted network evaluations of one iteration."""
        return iteration_cost(self.run, self.plan, iteration, len(self.texts))
