"""Training: rollout, rewards, advantages, optimizer step; checkpoint; again.

Departures from the E-GRPO paper, all by settings: LoRA instead of full fine-tuning by default;
one optimizer step per iteration instead of one per active step (as in its code).

A run killed at any moment and started again ends with the same weights, bit for bit: seeds are
functions of (run seed, iteration, prompt, step, sample), and a checkpoint holds all state.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from egrpo.config.models import RunConfig
from egrpo.core.advantage import Advantages, advantages, best_leaves, prune
from egrpo.core.loss import (
    Objective,
    clipped_objective,
    negative_aware_objective,
    velocity_distance,
)
from egrpo.core.plan import Plan
from egrpo.core.rollout import Rollout, TrainBatch, UpdateSize, update_sizes
from egrpo.core.tree import Tree
from egrpo.errors import UserError, during
from egrpo.images import Images, check
from egrpo.methods.settings import BranchGrpo, DiffusionNft
from egrpo.models import load_model
from egrpo.models.attention import check_attention
from egrpo.models.base import part_like, resolve_device, whole
from egrpo.models.conditioning import Conditioning, load_conditioning
from egrpo.planning.trees import (
    RunCost,
    cost_of,
    iteration_cost,
    learning_rate,
    monitor_sigmas,
    prompt_ids,
    references,
    training_sigmas,
    tree_of,
)
from egrpo.rewards import load_rewards, score_all
from egrpo.sampling.processes import Processes, check_share
from egrpo.sampling.sample import sample_images
from egrpo.store.checkpoint import Checkpoint
from egrpo.train.monitor import measure
from egrpo.train.records import Metrics, reward_metrics, rollout_rows
from egrpo.train.rollouts import Finish, Rollouts


class Trainer:
    """One run's model, optimizer and counters, and what an iteration does with them."""

    def __init__(self, run: RunConfig, plan: Plan | None, embeddings: Path) -> None:
        self.run, self.plan = run, plan
        self.sigmas = plan.sigmas if plan else training_sigmas(run)
        self.texts, self.conditioning = load_conditioning(embeddings, "train")
        self.heldout_texts, self.heldout = load_conditioning(embeddings, "heldout")
        if run.train.prompts_per_iteration > len(self.texts):
            raise UserError(
                f"run {run.run}: train.prompts_per_iteration: "
                f"{run.train.prompts_per_iteration} prompts, but {run.prompts.train} has "
                f"{len(self.texts)}"
            )
        self.world = Processes(resolve_device(run.model.device))
        check_share(
            run.train.prompts_per_iteration, self.world.count, "train.prompts_per_iteration"
        )
        self.model = load_model(run.model)
        self.rewards = load_rewards(run.rewards, str(self.model.device))
        self.parameters = self.model.prepare_training(run.seed, reference=run.train.kl_weight > 0)
        if run.train.gradient_checkpointing:
            self.model.enable_gradient_checkpointing()
        check_attention(self.model, self.conditioning)
        if self.world.sharded:
            self.parameters = self.model.shard()
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=learning_rate(run),
            betas=(run.train.adam_beta1, run.train.adam_beta2),
            eps=run.train.adam_eps,
            weight_decay=run.train.weight_decay,
        )
        self.rollouts = Rollouts(run, self.model, self.sigmas, self.conditioning, self.world)
        decay = run.train.ema_decay
        self.ema = [p.detach().clone() for p in self.parameters] if decay else None
        self.iteration = self.optimizer_steps = 0
        self.seconds = 0.0
        self.counts = {"forward": 0, "train": 0, "reference": 0, "monitor": 0}
        self.spent: Counter[str] = Counter()  # of this process in this iteration
        self.peak_mib = 0.0
        self.base_images: Images | None = None  # of the first monitor
        self.silent: set[str] = set()  # rewards that were said to have had no score
        self.model.refresh_sampler()

    # -- one iteration ---------------------------------------------------------------------

    def trees(self, iteration: int) -> tuple[list[int], list[Tree]]:
        """Prompt ids of an iteration and their rollout trees."""
        ids = list(prompt_ids(self.run, iteration, len(self.texts)))
        return ids, [tree_of(self.run, self.plan, iteration, prompt) for prompt in ids]

    def rollout(
        self, iteration: int, ids: list[int], trees: list[Tree], finish: Finish | None = None
    ) -> Rollout:
        """Sample this process's share of the trees, see :class:`Rollouts`."""
        with self.averaged() if self.run.train.sample_average else nullcontext():
            return self.rollouts.sample(iteration, ids, trees, finish)

    def advantages(self, scores: dict[str, Any], rollout: Rollout, trees: list[Tree]) -> Advantages:
        """Advantages of the rollout's edges.

        Raises:
            UserError: if no trained reward gave any valid score.
        """
        trained = list(self.run.train.rewards)
        silent = [name for name in trained if np.isnan(scores[name]).all()]
        if silent == trained:
            raise UserError(
                f"run {self.run.run}: rewards.{', '.join(trained)}: every image of iteration "
                f"{self.iteration + 1} was scored NaN; training would learn nothing"
            )
        for name in silent:  # it may apply to other prompts only
            if name not in self.silent and self.world.main:
                print(
                    f"{self.run.run}: rewards.{name}: every image of iteration "
                    f"{self.iteration + 1} was scored NaN; training goes on with the other rewards",
                    file=sys.stderr,
                    flush=True,
                )
            self.silent.add(name)
        a = self.run.advantage
        return advantages(
            scores,
            self.run.train.rewards,
            trees,
            rollout.edges,
            combine=a.combine,
            std=a.std,
            ddof=a.ddof,
            eps=a.eps,
            clamp=a.clamp,
        )

    def kept(self, scores: dict[str, Any], rollout: Rollout, trees: list[Tree]) -> set[int] | None:
        """Edges that width pruning keeps; None where nothing is pruned."""
        method = self.run.method
        if not isinstance(method, BranchGrpo) or method.width_share == 1.0:
            return None
        best = best_leaves(scores, self.run.train.rewards, trees, method.width_share)
        return prune(trees, rollout.edges, best, after=method.splits[-1])

    @during("training")
    def optimise(
        self,
        rollout: Rollout,
        ids: list[int],
        trees: list[Tree],
        advantage: Advantages,
        kept: set[int] | None = None,
    ) -> Metrics:
        """Forward and backward through every source, and the optimizer step(s)."""
        device = self.model.device
        prompts = self.conditioning.batch(ids[self.world.share(len(ids))], device)
        values = torch.tensor(advantage.values, dtype=torch.float32, device=device)
        weights = torch.tensor([trees[t].nodes[k].weight for t, k in rollout.edges], device=device)
        sums = dict.fromkeys(("loss", "kl", "clip_fraction"), 0.0)
        deviation = grad_norm = 0.0
        sizes = update_sizes(trees, rollout.edges, self.run.train.updates, kept)
        for number, (part, size) in enumerate(sizes.items()):
            batches = rollout.update(part, kept)
            for batch in batches:
                index = torch.tensor(batch.edges, device=device)
                worst = self._backward(batch, prompts, values[index], weights[index], size, sums)
                if number == 0:
                    deviation = max(deviation, worst)
            if self.world.sharded:
                most = self.rollouts.most_batches(part, kept)
                average = self.average_velocity if self.run.train.ema_weight > 0 else None
                self.rollouts.idle(most - len(batches), ids, train=True, average=average)
            self.world.add_gradients(self.parameters)
            norm = whole(clip_grad_norm_(self.parameters, self.run.train.max_grad_norm))
            if not torch.isfinite(norm):
                untouched = self.iteration == 0 and number == 0  # no rate was applied yet
                raise UserError(
                    f"run {self.run.run}: the gradient of iteration {self.iteration + 1} is "
                    f"{float(norm)}; "
                    + ("" if untouched else "lower train.learning_rate_scale, or ")
                    + "use model.dtype: float32"
                )
            grad_norm += float(norm) / len(sizes)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.optimizer_steps += 1
            self._average()
        self.model.refresh_sampler()
        everyone = self.world.gather((sums, deviation))
        means = {name: sum(s[name] for s, _ in everyone) / len(sizes) for name in sums}
        worst = max(d for _, d in everyone)
        return {**means, "grad_norm": grad_norm, "on_policy_ratio_deviation": worst}

    def _backward(
        self,
        batch: TrainBatch,
        conditioning: Conditioning,
        advantage: Tensor,
        weight: Tensor,
        size: UpdateSize,
        sums: Metrics,
    ) -> float:
        """One forward/backward of B sources, shared by all their edges.

        Adds to ``sums``; returns the largest deviation of a ratio from 1.
        """
        sigma, t = self.sigmas[batch.start], self.run.train
        prompts = conditioning.rows(batch.tree)
        # before the graph is there, whose weights must stay as they are
        average = self.average_velocity(batch.x, sigma, prompts) if t.ema_weight > 0 else None
        v = self.model.velocity(batch.x, sigma, prompts)
        evaluations = len(batch.x) * self.model.evaluations_per_velocity
        self.spent["train"] += evaluations
        self.spent["reference"] += references(self.run) * evaluations
        objective = self.objective(batch, v, advantage, weight)
        loss = objective.loss / size.edges
        if t.kl_weight > 0:
            reference = self.model.reference_velocity(batch.x, sigma, prompts)
            if t.kl == "velocity":
                kl = velocity_distance(v, reference).sum() / size.sources
            else:
                distance = batch.divergence if t.kl == "divergence" else batch.transition_distance
                each = distance(v, reference, self.sigmas, self.run.method.noise_level)
                kl = each.sum() / size.edges
            loss = loss + t.kl_weight * kl
            sums["kl"] += float(kl.detach())
        if average is not None:
            loss = loss + t.ema_weight * velocity_distance(v, average).sum() / size.sources
        # sharded gradients come as means over the processes
        (loss * (self.world.count if self.world.sharded else 1)).backward()
        sums["loss"] += float(loss.detach())
        sums["clip_fraction"] += float(objective.clipped.sum()) / size.edges
        return float((objective.ratio - 1).abs().max())

    def objective(
        self, batch: TrainBatch, v: Tensor, advantage: Tensor, weight: Tensor
    ) -> Objective:
        """The run's loss, summed over the batch's edges."""
        t, level = self.run.train, self.run.method.noise_level
        if isinstance(self.run.method, DiffusionNft):
            return negative_aware_objective(
                v[batch.rows],
                batch.v[batch.rows],
                batch.targets(),
                self.sigmas[batch.start],
                advantage,
                weight,
                self.run.method.beta,
                self.run.advantage.clamp,
            )
        if t.loss == "guarded":
            ratio = batch.guarded_log_ratio(v, self.sigmas, level)
            weight = weight / batch.lengths(self.sigmas)  # its gradient reweighting
        else:
            ratio = batch.log_ratio(v, self.sigmas, level)
        return clipped_objective(ratio, advantage, weight, t.clip_range)

    @torch.no_grad()
    def _average(self) -> None:
        """Move the averaged weights after optimizer step n, as Flow-GRPO's code counts them."""
        t, n = self.run.train, self.optimizer_steps
        if self.ema is None or (n + 1) % t.ema_every:
            return
        decay = t.ema_decay or 0.0
        if t.ema_ramp == "warm_up":
            decay = min(decay, (1 + n) / (10 + n))
        elif t.ema_ramp is not None:
            decay = min(decay, t.ema_ramp * (self.iteration + 1))
        for mean, p in zip(self.ema, self.parameters, strict=True):
            mean.lerp_(p, 1.0 - decay)

    @torch.no_grad()
    def average_velocity(self, x: Tensor, sigma: float, prompts: Conditioning) -> Tensor:
        """Velocity [B, C, h, w] of the averaged weights."""
        with self.averaged(sampler=False):
            return self.model.velocity(x, sigma, prompts)

    def step(self) -> tuple[Metrics, dict[str, list[Any]]]:
        """One iteration; returns its metrics and the rows of the rollouts table."""
        begun, iteration = time.monotonic(), self.iteration + 1
        ids, trees = self.trees(iteration)
        trained = {name: self.rewards[name] for name in self.run.train.rewards}
        decoding, coming = 0.0, []
        faults: list[int] = []

        def finish(part: Rollout, of: list[int]) -> None:
            nonlocal decoding
            since = time.monotonic()
            images = self.model.decode(part.leaves, self.run.train.decode_batch)
            faults.extend(images.faults.tolist())
            texts = [self.texts[of[t]] for t in part.leaf_tree]
            coming.append(scorer.submit(score_all, trained, images, texts))
            decoding += time.monotonic() - since

        # a thread of its own: rewards elsewhere work while the next part is sampled
        with ThreadPoolExecutor(1) as scorer:
            rollout = self.rollout(iteration, ids, trees, finish)
            sampled = time.monotonic()
            found = [future.result() for future in coming]  # the others: `monitor`
        self.spent["forward"] += rollout.forward * self.model.evaluations_per_velocity
        scores = self.world.arrays(
            {name: np.concatenate([each[name] for each in found]) for name in trained}
        )
        self._check(self.world.joined(faults), f"iteration {iteration}", say=False)  # but counted
        scored = time.monotonic()
        advantage = self.advantages(scores, rollout, trees)
        kept = self.kept(scores, rollout, trees)
        metrics = self.optimise(rollout, ids, trees, advantage, kept)
        self.count(trees, rollout, kept)
        self.iteration = iteration
        ended = time.monotonic()
        metrics |= reward_metrics(scores, advantage, rollout, trees)
        metrics |= {
            "nfe_forward": self.counts["forward"],
            "nfe_train": self.counts["train"],
            "time/rollout": sampled - begun - decoding,
            "time/decode_and_reward": scored - sampled + decoding,
            "time/optimise": ended - scored,
            "time/iteration": ended - begun,
        }
        self.seconds += ended - begun
        self.peak_mib = max(self.peak_mib, *self.world.gather(peak_memory_mib()))
        log_probs = self.world.joined_arrays(rollout.log_probs()).tolist()
        return metrics, rollout_rows(scores, advantage, rollout, log_probs, ids, trees)

    # -- monitor and state -----------------------------------------------------------------

    @contextmanager
    def averaged(self, *, sampler: bool = True) -> Iterator[None]:
        """Within it the model holds the averaged weights, if there are any.

        ``sampler``: so does its merged copy.
        """
        if self.ema is None:
            yield
            return
        kept = [p.detach().clone() for p in self.parameters]
        self._assign(self.ema, sampler)
        try:
            yield
        finally:
            self._assign(kept, sampler)

    @torch.no_grad()
    def _assign(self, values: list[Tensor], sampler: bool) -> None:
        for p, value in zip(self.parameters, values, strict=True):
            p.copy_(value)
        if self.world.sharded:
            self.model.transformer.reshard()  # it keeps what it gathered for its last forward
        if sampler:
            self.model.refresh_sampler()

    def _check(self, faults: list[int], what: str, *, say: bool = True) -> None:
        """See :func:`egrpo.images.check`; ``faults`` are those of all processes."""
        check(
            faults,
            f"run {self.run.run}: {what}",
            self.run.model,
            trained=self.iteration > 0,
            say=say and self.world.main,
        )

    def monitor(self) -> tuple[Metrics, Images]:
        """All rewards on the fixed held-out prompts, and the images [n].

        Raises:
            UserError: if none of them is an image.
        """
        t = self.run.train
        ids = list(range(min(t.monitor_prompts, len(self.heldout_texts))))
        own = ids[self.world.share(len(ids))]
        with self.averaged():
            images, forward = sample_images(
                self.model,
                self.heldout,
                own,
                monitor_sigmas(self.run),
                samples=t.monitor_samples,
                micro_batch=t.micro_batch,
            )
            if self.world.sharded:
                steps, n = len(monitor_sigmas(self.run)) - 1, t.monitor_samples
                calls = [
                    steps
                    * math.ceil(len(ids[self.world.block(len(ids), rank)]) * n / t.micro_batch)
                    for rank in range(self.world.count)
                ]
                self.rollouts.idle(max(calls) - calls[self.world.rank], [0])
        self.counts["monitor"] += sum(self.world.gather(forward))
        prompts = [self.heldout_texts[i] for i in own for _ in range(t.monitor_samples)]
        scores = self.world.arrays(score_all(self.rewards, images, prompts))
        pixels = torch.from_numpy(self.world.joined_arrays(images.pixels.numpy()))
        images = Images(pixels, self.world.joined_arrays(images.faults))
        self._check(images.faults.tolist(), f"monitor of iteration {self.iteration}")
        if self.base_images is None:
            self.base_images = images
        return measure(scores, images, self.base_images, t.monitor_samples), images

    def check_weights(self) -> None:
        """Make one image with the weights as they are, where no monitor will.

        Raises:
            UserError: if it is none.
        """
        with self.averaged():
            images, forward = sample_images(
                self.model, self.heldout, [0], monitor_sigmas(self.run), samples=1, micro_batch=1
            )
        self.counts["monitor"] += sum(self.world.gather(forward))
        faults = self.world.joined(images.faults.tolist())
        self._check(faults, f"one image of iteration {self.iteration}")

    def save(self, folder: Path) -> None:
        """Write the averaged weights, or the weights; files by the main process."""
        with self.averaged():
            self.model.save(folder, write=self.world.main)

    def checkpoint(self) -> Checkpoint:
        """Everything that the next iteration depends on."""
        tensors = {f"weight/{n}": whole(p.detach()) for n, p in enumerate(self.parameters)}
        for n, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{n}/{k}": whole(torch.as_tensor(v)) for k, v in state.items()}
        if self.ema is not None:
            tensors |= {f"ema/{n}": whole(mean) for n, mean in enumerate(self.ema)}
        return Checkpoint(
            self.iteration,
            tensors,
            {
                "optimizer_steps": self.optimizer_steps,
                "seconds": self.seconds,
                "counts": dict(self.counts),
                "peak_mib": self.peak_mib,
            },
        )

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint.

        Raises:
            UserError: if it does not fit this run's parameters.
        """
        tensors = checkpoint.tensors
        state: dict[int, dict[str, Tensor]] = {}
        try:
            with torch.no_grad():
                for n, p in enumerate(self.parameters):
                    p.copy_(part_like(tensors[f"weight/{n}"], p))
                    if self.ema is not None:
                        self.ema[n].copy_(part_like(tensors[f"ema/{n}"], p))
        except (KeyError, RuntimeError) as error:
            raise UserError(f"run {self.run.run}: the checkpoint does not fit: {error}") from None
        for name, tensor in tensors.items():
            if name.startswith("optimizer/"):
                _, number, key = name.split("/")
                place = state.setdefault(int(number), {})
                place[key] = part_like(tensor, self.parameters[int(number)])
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        self.iteration = checkpoint.iteration
        self.optimizer_steps = checkpoint.numbers["optimizer_steps"]
        self.seconds = checkpoint.numbers["seconds"]
        self.counts = dict(checkpoint.numbers["counts"])
        self.peak_mib = checkpoint.numbers["peak_mib"]
        self.model.refresh_sampler()

    def cost(self, iteration: int) -> RunCost:
        """Predicted network evaluations of one iteration."""
        return iteration_cost(self.run, self.plan, iteration, len(self.texts))

    def count(self, trees: list[Tree], rollout: Rollout, kept: set[int] | None) -> None:
        """Add up what all processes spent in an iteration.

        Raises:
            RuntimeError: if it is not what the trees predict. Of pruned edges the sources need no
                evaluation for training.
        """
        predicted = cost_of(self.run, trees)
        if kept is not None:
            sizes = update_sizes(trees, rollout.edges, self.run.train.updates, kept).values()
            train = sum(s.sources for s in sizes) * self.model.evaluations_per_velocity
            predicted = RunCost(predicted.forward, train, references(self.run) * train)
        everyone = self.world.gather(self.spent)
        for name, wanted in vars(predicted).items():
            executed = sum(spent[name] for spent in everyone)
            self.counts[name] += executed
            if executed != wanted:
                raise RuntimeError(
                    f"run {self.run.run}: executed {executed} {name} evaluations in iteration "
                    f"{self.iteration + 1}, predicted {wanted}"
                )
        self.spent = Counter()


def peak_memory_mib() -> float:
    """Largest resident (CPU) or allocated (CUDA) memory of this process so far, MiB."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
