"""Training: rollout, rewards, advantages, optimizer step; checkpoint; again.

Departures from the E-GRPO paper, all by settings: LoRA instead of full fine-tuning by default;
one optimizer step per iteration instead of one per active step.

A run killed at any moment and started again ends with the same weights, bit for bit: seeds are
functions of (run seed, iteration, prompt, step, sample), and a checkpoint holds all state.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from egrpo.config.models import RunConfig
from egrpo.config.trees import cost_of, learning_rate, training_sigmas, tree_of
from egrpo.core.advantage import Advantages, advantages, edge_values
from egrpo.core.executor import Rollout, TrainBatch, execute
from egrpo.core.loss import clipped_objective, velocity_distance
from egrpo.core.plan import Plan
from egrpo.core.seeds import normal, seed_of
from egrpo.errors import UserError
from egrpo.models import load_model
from egrpo.models.conditioning import load_conditioning
from egrpo.rewards import load_rewards, score_all
from egrpo.stages.sampling import sample_images
from egrpo.store.checkpoint import Checkpoint

Metrics = dict[str, float]


class Trainer:
    """One run's model, optimizer and counters, and what an iteration does with them."""

    def __init__(self, run: RunConfig, plan: Plan | None, embeddings: Path) -> None:
        from accelerate import Accelerator

        self.run = run
        self.sigmas = plan.sigmas if plan else training_sigmas(run)
        self.tree = tree_of(run, plan)
        self.texts, conditioning = load_conditioning(embeddings, "train")
        self.heldout_texts, heldout = load_conditioning(embeddings, "heldout")
        if run.train.prompts_per_iteration > len(self.texts):
            raise UserError(
                f"run {run.run}: train.prompts_per_iteration: "
                f"{run.train.prompts_per_iteration} prompts, but {run.prompts.train} has "
                f"{len(self.texts)}"
            )
        self.model = load_model(run.model)
        self.accelerator = Accelerator(cpu=self.model.device.type == "cpu")
        if self.accelerator.num_processes > 1:
            raise UserError("egrpo train runs in one process; start it without a launcher")
        self.conditioning = conditioning.to(self.model.device)
        self.heldout = heldout.to(self.model.device)
        self.rewards = load_rewards(run.rewards, str(self.model.device))
        self.parameters = self.model.prepare_training(
            seed_of(run.seed, "lora"), reference=run.train.kl_weight > 0
        )
        if run.train.gradient_checkpointing:
            self.model.enable_gradient_checkpointing()
        optimizer = torch.optim.AdamW(
            self.parameters,
            lr=learning_rate(run),
            betas=(run.train.adam_beta1, run.train.adam_beta2),
            eps=run.train.adam_eps,
            weight_decay=run.train.weight_decay,
        )
        self.model.transformer, self.optimizer = self.accelerator.prepare(
            self.model.transformer, optimizer, device_placement=[False, False]
        )
        decay = run.train.ema_decay
        self.ema = [p.detach().clone() for p in self.parameters] if decay else None
        self.iteration = 0
        self.seconds = 0.0
        self.counts = {"forward": 0, "train": 0, "reference": 0, "monitor": 0}
        self.model.refresh_sampler()

    # -- one iteration ---------------------------------------------------------------------

    def prompt_ids(self, iteration: int) -> list[int]:
        """Prompts of an iteration: a permutation per epoch, none twice in one iteration."""
        size = self.run.train.prompts_per_iteration
        per_epoch = len(self.texts) // size
        epoch, place = divmod(iteration - 1, per_epoch)
        generator = torch.Generator().manual_seed(seed_of(self.run.seed, "prompts", epoch))
        order = torch.randperm(len(self.texts), generator=generator).tolist()
        return order[place * size : (place + 1) * size]

    def rollout(self, iteration: int, ids: list[int]) -> Rollout:
        """Sample the trees of the prompts ``ids``."""
        rows = torch.tensor(ids, device=self.model.device)
        shape, seed = self.model.image_shape, self.run.seed

        def velocity(x: Tensor, sigma: float, tree: Tensor) -> Tensor:
            return self.model.velocity(x, sigma, self.conditioning.rows(rows[tree]))

        def merged(x: Tensor, sigma: float, tree: Tensor) -> Tensor:
            prompts = self.conditioning.rows(rows[tree])
            return self.model.velocity(x, sigma, prompts, self.model.sampler)

        def noise(tree: int, start: int, sample: int) -> Tensor:
            return normal(shape, seed, "rollout", iteration, ids[tree], start, sample)

        return execute(
            [self.tree] * len(ids),
            self.sigmas,
            velocity,
            noise,
            noise_level=self.run.method.noise_level,
            micro_batch=self.run.train.micro_batch,
            train_micro_batch=self.run.train.train_micro_batch,
            dtype=self.model.dtype,
            device=self.model.device,
            suffix_velocity=merged,
        )

    def advantages(self, scores: dict[str, Any], rollout: Rollout, prompts: int) -> Advantages:
        """Advantages of the rollout's edges; refuses an iteration without any valid reward."""
        for name in self.run.train.rewards:
            if np.isnan(scores[name]).all():
                raise UserError(
                    f"run {self.run.run}: rewards.{name}: every image of iteration "
                    f"{self.iteration + 1} was scored NaN; training would learn nothing"
                )
        a = self.run.advantage
        return advantages(
            scores,
            self.run.train.rewards,
            [self.tree] * prompts,
            rollout.edges,
            combine=a.combine,
            std=a.std,
            ddof=a.ddof,
            eps=a.eps,
            clamp=a.clamp,
        )

    def optimise(self, rollout: Rollout, ids: list[int], advantage: Advantages) -> Metrics:
        """Forward and backward through every branch point, and the optimizer step(s)."""
        rows = torch.tensor(ids, device=self.model.device)
        values = torch.tensor(advantage.values, dtype=torch.float32, device=self.model.device)
        weights = torch.tensor(
            [self.tree.nodes[node].weight for _, node in rollout.edges], device=self.model.device
        )
        per_step = self.run.train.optimizer_cadence == "per_step"
        updates = (
            [list(batches) for _, batches in groupby(rollout.batches, key=lambda b: b.start)]
            if per_step
            else [rollout.batches]
        )
        sums: Metrics = {"loss": 0.0, "kl": 0.0, "clip_fraction": 0.0}
        deviation = grad_norm = 0.0
        for number, batches in enumerate(updates):
            edges = sum(len(b.edges) for b in batches)
            sources = sum(len(b.x) for b in batches)
            for batch in batches:
                index = torch.tensor(batch.edges, device=self.model.device)
                worst = self._backward(
                    batch, rows, values[index], weights[index], edges, sources, sums
                )
                if number == 0:
                    deviation = max(deviation, worst)
            norm = self.accelerator.clip_grad_norm_(self.parameters, self.run.train.max_grad_norm)
            if not torch.isfinite(norm):
                raise UserError(
                    f"run {self.run.run}: the gradient of iteration {self.iteration + 1} is "
                    f"{float(norm)}; lower train.learning_rate_scale, or use model.dtype: float32"
                )
            grad_norm += float(norm) / len(updates)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self._average()
        self.model.refresh_sampler()
        means = {name: value / len(updates) for name, value in sums.items()}
        return {**means, "grad_norm": grad_norm, "on_policy_ratio_deviation": deviation}

    def _backward(
        self,
        batch: TrainBatch,
        rows: Tensor,
        advantage: Tensor,
        weight: Tensor,
        edges: int,
        sources: int,
        sums: Metrics,
    ) -> float:
        """One forward/backward of B branch points, shared by all their edges.

        Adds to ``sums``; returns the largest deviation of a ratio from 1.
        """
        sigma = self.sigmas[batch.start]
        prompts = self.conditioning.rows(rows[batch.tree])
        v = self.model.velocity(batch.x, sigma, prompts)
        self.counts["train"] += len(batch.x) * self.model.evaluations_per_velocity
        new = batch.log_probs(v, self.sigmas, self.run.method.noise_level)
        objective = clipped_objective(
            new, batch.log_prob, advantage, weight, self.run.train.clip_range
        )
        loss = objective.loss / edges
        if self.run.train.kl_weight > 0:
            reference = self.model.reference_velocity(batch.x, sigma, prompts)
            self.counts["reference"] += len(batch.x) * self.model.evaluations_per_velocity
            if self.run.train.kl == "transition":
                kl = (
                    batch.distance(v, reference, self.sigmas, self.run.method.noise_level).sum()
                    / edges
                )
            else:
                kl = velocity_distance(v, reference).sum() / sources
            loss = loss + self.run.train.kl_weight * kl
            sums["kl"] += float(kl.detach())
        self.accelerator.backward(loss)
        sums["loss"] += float(loss.detach())
        sums["clip_fraction"] += float(objective.clipped.sum()) / edges
        return float((objective.ratio - 1).abs().max())

    @torch.no_grad()
    def _average(self) -> None:
        if self.ema is not None:
            decay = self.run.train.ema_decay or 0.0
            for mean, p in zip(self.ema, self.parameters, strict=True):
                mean.lerp_(p, 1.0 - decay)

    def step(self) -> tuple[Metrics, dict[str, list[Any]]]:
        """One iteration; returns its metrics and the rows of the rollouts table."""
        begun = time.monotonic()
        iteration = self.iteration + 1
        ids = self.prompt_ids(iteration)
        rollout = self.rollout(iteration, ids)
        self.counts["forward"] += rollout.forward * self.model.evaluations_per_velocity
        sampled = time.monotonic()
        images = self.model.decode(rollout.leaves, self.run.train.decode_batch)
        prompts = [self.texts[ids[t]] for t in rollout.leaf_tree]
        trained = {name: self.rewards[name] for name in self.run.train.rewards}
        scores = score_all(trained, images, prompts)  # the others are monitored, see `monitor`
        scored = time.monotonic()
        advantage = self.advantages(scores, rollout, len(ids))
        metrics = self.optimise(rollout, ids, advantage)
        self.iteration = iteration
        ended = time.monotonic()
        metrics |= self._reward_metrics(scores, advantage, rollout, len(ids))
        metrics |= {
            "nfe_forward": self.counts["forward"],
            "nfe_train": self.counts["train"],
            "time/rollout": sampled - begun,
            "time/decode_and_reward": scored - sampled,
            "time/optimise": ended - scored,
            "time/iteration": ended - begun,
        }
        self.seconds += ended - begun
        return metrics, self._rows(scores, advantage, rollout, ids)

    def _reward_metrics(
        self, scores: dict[str, Any], advantage: Advantages, rollout: Rollout, prompts: int
    ) -> Metrics:
        metrics: Metrics = {
            "groups": advantage.groups,
            "groups_masked": advantage.groups_masked,
            "samples_invalid": advantage.samples_invalid,
            "advantage_abs_mean": float(np.abs(advantage.values).mean()),
        }
        trees = [self.tree] * prompts
        groups = [(t, self.tree.nodes[node].group) for t, node in rollout.edges]
        for name, values in scores.items():
            valid = values[~np.isnan(values)]
            metrics[f"reward/{name}"] = float(valid.mean()) if valid.size else float("nan")
            per_edge = edge_values(values, trees, rollout.edges)
            within: dict[tuple[int, int], list[float]] = {}
            for group, value in zip(groups, per_edge, strict=True):
                if not np.isnan(value):
                    within.setdefault(group, []).append(value)
            spreads = [np.std(x, ddof=1) for x in within.values() if len(x) > 1]
            metrics[f"reward_std/{name}"] = float(np.mean(spreads)) if spreads else float("nan")
        return metrics

    def _rows(
        self, scores: dict[str, Any], advantage: Advantages, rollout: Rollout, ids: list[int]
    ) -> dict[str, list[Any]]:
        """Columns of the rollouts table, one entry per trained edge; rewards by ``reward/name``."""
        nodes = self.tree.nodes
        log_prob = np.empty(len(rollout.edges))
        for batch in rollout.batches:
            log_prob[list(batch.edges)] = batch.log_prob.cpu().numpy()
        starts = [nodes[nodes[k].parent].index for _, k in rollout.edges]
        columns: dict[str, list[Any]] = {
            "prompt_id": [ids[t] for t, _ in rollout.edges],
            "step": starts,
            "span": [nodes[k].index - s for (_, k), s in zip(rollout.edges, starts, strict=True)],
            "sample": [nodes[k].sample for _, k in rollout.edges],
            "advantage": [round(a, 6) for a in advantage.values.tolist()],
            "log_prob": [round(p, 7) for p in log_prob.tolist()],
        }
        trees = [self.tree] * len(ids)
        for name, values in scores.items():
            columns[f"reward/{name}"] = edge_values(values, trees, rollout.edges).tolist()
        return columns

    # -- monitor and state -----------------------------------------------------------------

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within it the model holds the averaged weights, if there are any."""
        if self.ema is None:
            yield
            return
        kept = [p.detach().clone() for p in self.parameters]
        self._assign(self.ema)
        try:
            yield
        finally:
            self._assign(kept)

    @torch.no_grad()
    def _assign(self, values: list[Tensor]) -> None:
        for p, value in zip(self.parameters, values, strict=True):
            p.copy_(value)
        self.model.refresh_sampler()

    def monitor(self) -> tuple[Metrics, Tensor]:
        """All rewards on the fixed held-out prompts, and the images uint8 [n, 3, h, w]."""
        t = self.run.train
        ids = list(range(min(t.monitor_prompts, len(self.heldout_texts))))
        with self.averaged():
            images, forward = sample_images(
                self.model,
                self.heldout,
                ids,
                steps=self.run.evaluate.steps,
                shift=self.run.schedule.shift,
                samples=t.monitor_samples,
                micro_batch=t.micro_batch,
            )
        self.counts["monitor"] += forward
        prompts = [self.heldout_texts[i] for i in ids for _ in range(t.monitor_samples)]
        scores = score_all(self.rewards, images, prompts)
        means = {
            f"monitor/reward/{name}": float(np.nanmean(v)) if not np.isnan(v).all() else np.nan
            for name, v in scores.items()
        }
        pixels = images.float().div(255).flatten(1)
        spread = [
            float(torch.pdist(part).mean()) / pixels.shape[1] ** 0.5
            for part in pixels.split(t.monitor_samples)
            if len(part) > 1
        ]
        if spread:
            means["monitor/diversity"] = float(np.mean(spread))
        return means, images

    def checkpoint(self) -> Checkpoint:
        """Everything that the next iteration depends on."""
        tensors = {f"weight/{n}": p.detach() for n, p in enumerate(self.parameters)}
        for n, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{n}/{k}": torch.as_tensor(v) for k, v in state.items()}
        if self.ema is not None:
            tensors |= {f"ema/{n}": mean for n, mean in enumerate(self.ema)}
        return Checkpoint(
            self.iteration, tensors, {"seconds": self.seconds, "counts": dict(self.counts)}
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
                    p.copy_(tensors[f"weight/{n}"])
                    if self.ema is not None:
                        self.ema[n].copy_(tensors[f"ema/{n}"])
        except (KeyError, RuntimeError) as error:
            raise UserError(f"run {self.run.run}: the checkpoint does not fit: {error}") from None
        for name, tensor in tensors.items():
            if name.startswith("optimizer/"):
                _, number, key = name.split("/")
                state.setdefault(int(number), {})[key] = tensor
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        self.iteration = checkpoint.iteration
        self.seconds = checkpoint.numbers["seconds"]
        self.counts = dict(checkpoint.numbers["counts"])
        self.model.refresh_sampler()

    def check_counts(self) -> None:
        """Raise RuntimeError unless the evaluations executed are those the tree predicted."""
        predicted = cost_of(self.run, self.tree)
        for name in ("forward", "train", "reference"):
            wanted = getattr(predicted, name)
            if self.counts[name] != wanted:
                raise RuntimeError(
                    f"run {self.run.run}: executed {self.counts[name]} {name} evaluations, "
                    f"predicted {wanted}"
                )


def peak_memory_mib() -> float:
    """Largest resident (CPU) or allocated (CUDA) memory of this process so far, MiB."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
