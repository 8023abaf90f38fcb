"""What changes the weights: loss, gradient, optimizer steps; and the average that follows them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from egrpo.config.models import RunConfig
from egrpo.config.training import Train
from egrpo.core.loss import velocity_distance
from egrpo.core.rollout import Rollout, TrainBatch, UpdateSize, update_sizes
from egrpo.core.tree import Tree
from egrpo.errors import UserError, during
from egrpo.models.attention import check_attention, repeatable
from egrpo.models.base import FlowModel
from egrpo.models.conditioning import Conditioning
from egrpo.models.modules import shard_like, whole
from egrpo.planning.grids import learning_rate
from egrpo.planning.trees import references
from egrpo.sampling.processes import Processes
from egrpo.train.records import Counts, Metrics
from egrpo.train.rollouts import Rollouts


class AveragedWeights:
    """The average of a run's weights, one tensor for each of ``parameters``.

    ``weights`` is None without ``train.ema_decay``: all here goes by the weights themselves.
    """

    def __init__(
        self,
        settings: Train,
        model: FlowModel,
        parameters: list[nn.Parameter],
        processes: Processes,
    ) -> None:
        self.settings, self.model = settings, model
        self.parameters, self.processes = parameters, processes
        self.weights = [p.detach().clone() for p in parameters] if settings.ema_decay else None

    @torch.no_grad()
    def follow(self, step: int, iteration: int) -> None:
        """Move after an optimizer step, both counted from 1, as Flow-GRPO's code does."""
        t = self.settings
        if self.weights is None or (step + 1) % t.ema_every:
            return
        decay = t.ema_decay or 0.0
        if t.ema_ramp == "warm_up":
            decay = min(decay, (1 + step) / (10 + step))
        elif t.ema_ramp is not None:
            decay = min(decay, t.ema_ramp * iteration)
        for mean, p in zip(self.weights, self.parameters, strict=True):
            mean.lerp_(p, 1.0 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within it the model holds the averaged weights, if there are any."""
        if self.weights is None:
            yield
            return
        own = [p.detach().clone() for p in self.parameters]
        self._assign(self.weights)
        try:
            yield
        finally:
            self._assign(own)

    @torch.no_grad()
    def velocity(self, x: Tensor, sigma: float, prompts: Conditioning) -> Tensor:
        """Velocity [B, C, h, w] of the averaged weights, see :meth:`FlowModel.velocity`."""
        with self.applied():
            return self.model.velocity(x, sigma, prompts)

    @torch.no_grad()
    def _assign(self, values: list[Tensor]) -> None:
        for p, value in zip(self.parameters, values, strict=True):
            p.copy_(value)
        if self.processes.sharded:
            self.model.transformer.reshard()  # it keeps what it gathered for its last forward


class Learner:
    """The weights that are trained, with their optimizer, its ``steps`` so far and their average.

    Makes the model ready for training. ``deterministic``: two trainings end with the same weights,
    bit for bit, also where kernels would add up in any order.
    """

    def __init__(
        self, run: RunConfig, rollouts: Rollouts, counts: Counts, *, deterministic: bool
    ) -> None:
        self.run, self.rollouts, self.counts = run, rollouts, counts
        self.deterministic = deterministic
        sampler, self.processes = rollouts.sampler, rollouts.processes
        self.model, self.sigmas = sampler.model, sampler.sigmas
        self.conditioning = sampler.conditioning
        t = run.train
        self.parameters = self.model.prepare_training(run.seed, reference=t.kl_weight > 0)
        if t.gradient_checkpointing:
            self.model.enable_gradient_checkpointing()
        check_attention(self.model, self.conditioning)
        if self.processes.sharded:
            self.parameters = self.model.shard()
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=learning_rate(run),
            betas=(t.adam_beta1, t.adam_beta2),
            eps=t.adam_eps,
            weight_decay=t.weight_decay,
        )
        self.average = AveragedWeights(t, self.model, self.parameters, self.processes)
        self.steps = 0

    @during("training")
    def optimize(
        self,
        iteration: int,
        rollout: Rollout,
        ids: list[int],
        trees: list[Tree],
        advantages: npt.NDArray[np.float64] | list[float],
        kept: set[int] | None = None,
    ) -> Metrics:
        """Forward and backward through every source, and the optimizer step(s).

        ``advantages`` are of the E edges of all processes; ``kept`` are those that train, None:
        all. Raises UserError if a gradient is not finite.
        """
        device = self.model.device
        prompts = self.conditioning.batch(ids[self.processes.share(len(ids))], device)
        values = torch.tensor(advantages, dtype=torch.float32, device=device)
        weights = torch.tensor([trees[t].nodes[k].weight for t, k in rollout.edges], device=device)
        sums = dict.fromkeys(("loss", "kl", "clip_fraction"), 0.0)
        deviation = grad_norm = 0.0
        sizes = update_sizes(trees, rollout.edges, self.run.train.updates, kept)
        for number, (part, size) in enumerate(sizes.items()):
            batches = rollout.batches_of(part, kept)
            for batch in batches:
                index = torch.tensor(batch.edges, device=device)
                of = batch, prompts, values[index], weights[index], size, sums
                with repeatable(device) if self.deterministic else nullcontext():
                    worst = self._backward(*of)
                if number == 0:
                    deviation = max(deviation, worst)
            if self.processes.sharded:
                self._idle(self.rollouts.most_batches(part, kept) - len(batches))
            grad_norm += self._step(iteration) / len(sizes)
        everyone = self.processes.gather((sums, deviation))
        return {
            **{name: sum(s[name] for s, _ in everyone) / len(sizes) for name in sums},
            "grad_norm": grad_norm,
            "on_policy_ratio_deviation": max(d for _, d in everyone),
        }

    def _step(self, iteration: int) -> float:
        """One optimizer step with the gradients that were added up; returns their norm."""
        self.processes.add_gradients(self.parameters)
        norm = whole(clip_grad_norm_(self.parameters, self.run.train.max_grad_norm))
        if not torch.isfinite(norm):
            rate = "lower train.learning_rate_scale, or " if self.steps else ""  # none was applied
            raise UserError(
                f"run {self.run.run}: the gradient of iteration {iteration} is {float(norm)}; "
                f"{rate}use model.dtype: float32"
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1
        self.average.follow(self.steps, iteration)
        return float(norm)

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
        average = self.average.velocity(batch.x, sigma, prompts) if t.ema_weight > 0 else None
        v = self.model.velocity(batch.x, sigma, prompts)
        evaluations = len(batch.x) * self.model.evaluations_per_velocity
        self.counts.spent["train"] += evaluations
        self.counts.spent["reference"] += references(self.run) * evaluations
        of, clamp = (batch, v, self.sigmas, advantage, weight), self.run.advantage.clamp
        objective = self.run.method.objective(
            *of, loss=t.loss, clip_range=t.clip_range, clamp=clamp
        )
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
        (loss * (self.processes.count if self.processes.sharded else 1)).backward()
        sums["loss"] += float(loss.detach())
        sums["clip_fraction"] += float(objective.clipped.sum()) / size.edges
        return float((objective.ratio - 1).abs().max())

    def _idle(self, batches: int) -> None:
        """Take part in the network calls of other processes' batches, without any effect."""
        t = self.run.train
        x = torch.zeros(1, *self.model.image_shape, device=self.model.device)
        of = x, 1.0, self.conditioning.batch([0], self.model.device)
        for _ in range(batches):
            if t.ema_weight > 0:
                self.average.velocity(*of)
            v = self.model.velocity(*of)
            if t.kl_weight > 0:
                self.model.reference_velocity(*of)
            (0.0 * v.float().sum()).backward()

    def state(self) -> dict[str, Tensor]:
        """Weights, optimizer state and averaged weights, whole, by name; by all processes."""
        tensors = {f"weight/{n}": whole(p.detach()) for n, p in enumerate(self.parameters)}
        for n, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{n}/{k}": whole(torch.as_tensor(v)) for k, v in state.items()}
        return tensors | {
            f"ema/{n}": whole(mean) for n, mean in enumerate(self.average.weights or [])
        }

    def restore(self, tensors: Mapping[str, Tensor], steps: int) -> None:
        """Go on from what :meth:`state` gave after ``steps``; UserError if it does not fit."""
        kinds: dict[str, Sequence[Tensor]] = {
            "weight": self.parameters,
            "ema": self.average.weights or [],
        }
        try:
            with torch.no_grad():
                for kind, values in kinds.items():
                    for n, value in enumerate(values):
                        value.copy_(shard_like(tensors[f"{kind}/{n}"], self.parameters[n]))
        except (KeyError, RuntimeError) as error:
            raise UserError(f"run {self.run.run}: the checkpoint does not fit: {error}") from None
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimizer/"):
                _, number, key = name.split("/")
                own = shard_like(tensor, self.parameters[int(number)])
                state.setdefault(int(number), {})[key] = own
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        self.steps = steps
