"""Settings of the optimization and of what watches it."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import NonNegativeFloat, PositiveFloat, model_validator

from egrpo.methods.awm import AWM
from egrpo.methods.base import FLOW, GUARD, NFT, Loss
from egrpo.settings import EXPERIMENTS, PAPER, Batch, Count, Fraction, Settings, setting


class Advantage(Settings):
    """From rewards to advantages."""

    combine: Literal["advantages", "rewards", "gdpo"] = setting("advantages", source=PAPER)
    """Several rewards: normalize each and sum; sum and normalize; or GDPO (arXiv 2601.05242):
    normalize each, sum, normalize over the batch."""
    std: Literal["group", "batch"] = setting("group", source=f"{PAPER}, method")
    """Divide by the std of the group or of the whole batch."""
    ddof: Literal[0, 1] = setting(1, source=PAPER)
    """1 for the unbiased std, 0 for the population's."""
    eps: PositiveFloat = setting(1e-8, source=PAPER, unit="of the reward")
    """Added to the std."""
    clamp: PositiveFloat = setting(5.0, source=PAPER)
    """Bound of the absolute advantage."""


class Bound(Settings):
    """Where a monitor on the fixed held-out prompts shows that training goes wrong."""

    least: float | None = setting(None, unit="of the monitor")
    """Least value, in the monitor's unit."""
    most: float | None = setting(None, unit="of the monitor")
    """Largest value, in the monitor's unit."""
    fall: NonNegativeFloat | None = setting(None, unit="of the monitor")
    """Furthest fall below the untrained model's value, in the monitor's unit."""
    collapse: NonNegativeFloat | None = setting(None, unit="standard deviations")
    """Furthest fall below the untrained model's value, in standard deviations of the scores of the
    monitored images (of diversity: of the prompts), before and after pooled. A fall that noise
    explains does not count, so of few images it must be larger; of fewer than 4 none does."""
    action: Literal["warn", "stop"] = setting("warn")
    """Say so and go on, or end the training there and keep what it made."""

    @model_validator(mode="after")
    def _some_bound(self) -> Self:
        if {self.least, self.most, self.fall, self.collapse} == {None}:
            raise ValueError("least, most, fall or collapse: one of them is needed")
        return self


COLLAPSE, DIVERSITY_COLLAPSE = 1.0, 2.0
"""``collapse`` of rewards and of diversity without a bound of their own. Diversity shrinks in
training that succeeds, too."""


class Train(Settings):
    """The optimization."""

    rewards: dict[str, float] = setting(..., unit="1")
    """Trained rewards: name -> weight. One choice: where a file is laid over another, or a cell of
    the runs table, it replaces what is below; a column `train.rewards.<name>` sets that one."""
    iterations: Count = setting(300, source=EXPERIMENTS, unit="iterations")
    """Iterations: rollout, advantages, optimizer step(s)."""
    prompts_per_iteration: Count = setting(
        8, source=f"{PAPER}, experiments: 1 per GPU on 8 GPUs", unit="prompts"
    )
    """Prompts of one iteration."""
    learning_rate_full: PositiveFloat = setting(2e-6, source=EXPERIMENTS)
    """Learning rate of full fine-tuning."""
    learning_rate_lora: PositiveFloat = setting(
        6e-5, source="30 times the full one, the ratio of DanceGRPO's two recipes (1e-5, 3e-4)"
    )
    """Learning rate of LoRA."""
    learning_rate_scale: PositiveFloat = setting(1.0)
    """Factor on the method's learning rate; the same for all methods of a study."""
    weight_decay: NonNegativeFloat = setting(1e-4, source=EXPERIMENTS)
    """AdamW weight decay."""
    adam_beta1: float = setting(0.9, source="torch's default", ge=0.0, lt=1.0)
    """AdamW beta 1."""
    adam_beta2: float = setting(0.999, source="torch's default", ge=0.0, lt=1.0)
    """AdamW beta 2."""
    adam_eps: PositiveFloat = setting(1e-8, source="torch's default")
    """AdamW epsilon."""
    clip_range: PositiveFloat = setting(1e-4, source=f"{PAPER}, method")
    """Clip range of the ratio."""
    max_grad_norm: PositiveFloat = setting(1.0, source=EXPERIMENTS)
    """Gradients are clipped to this norm."""
    kl_weight: NonNegativeFloat = setting(0.0, source=f"{PAPER}: no KL")
    """Weight of the distance to the base model in the loss."""
    kl: Literal["velocity", "transition", "divergence"] = setting("velocity")
    """That distance: mean((v - v_ref)^2); the KL divergence of the transition, (mean - mean_ref)^2
    / (2 std^2); or Flow-GRPO's `transition`, which is |dt| times that, and with cps the same."""
    updates: int = setting(1, unit="optimizer steps", ge=1, le=1024)
    """Optimizer steps of an iteration: samples are cut into this many parts. Of a method that
    branches at n steps of one anchor, n parts give one optimizer step after each, as in the code of
    E-GRPO."""
    loss: Loss = setting("clipped", source=f"{PAPER}; {GUARD}; {NFT}")
    """Clipped ratio; GRPO-Guard's normalized ratio, clipped; or DiffusionNFT's negative-aware
    objective."""
    ema_decay: Fraction | None = setting(None, source=PAPER, unit="1")
    """Decay of the averaged weights; null for none."""
    ema_ramp: PositiveFloat | Literal["warm_up"] | None = setting(
        None, source=f"{NFT}; {FLOW}: warm_up", unit="per iteration"
    )
    """How the decay grows up to ema_decay: by this much an iteration; warm_up: it is (1 + n) / (10
    + n) after n optimizer steps; null: it is constant."""
    ema_every: Count = setting(1, source=f"{FLOW}: 8", unit="optimizer steps")
    """The average moves after optimizer steps n for which n + 1 is a multiple of this."""
    ema_weight: NonNegativeFloat = setting(0.0, source=f"{AWM}: 1")
    """Weight of the distance to the averaged weights in the loss, mean((v - v_average)^2)."""
    sample_average: bool = setting(False, source=NFT)
    """Sample with the averaged weights (DiffusionNFT's slow policy)."""
    prompts_at_once: Count | None = setting(None, unit="prompts")
    """Prompts sampled together, of a process; the rewards of one such part are computed while the
    next is sampled. null: all."""
    micro_batch: Batch = setting("auto", unit="latents")
    """Most latents in one evaluation while sampling. auto: 96 on a CPU; on CUDA what fits the card
    beside all else, up to what fills it, measured when a job begins."""
    train_micro_batch: Count = setting(16, unit="latents")
    """Most branch points in one forward/backward."""
    decode_batch: Count = setting(96, unit="latents")
    """Most latents decoded at once."""
    gradient_checkpointing: bool = setting(False)
    """Recompute activations in the backward pass."""
    deterministic: bool | Literal["auto"] = setting("auto")
    """On CUDA, gradients in an order that does not change, so that two trainings end with the same
    weights, bit for bit; slower. auto: where less than a tenth of all evaluations is trained. On
    the CPU it is always so."""
    checkpoint_every: Count = setting(10, unit="iterations")
    """Iterations between checkpoints."""
    monitor_every: int = setting(10, unit="iterations", ge=0)
    """Iterations between measurements on fixed held-out prompts; 0 for none."""
    monitor_prompts: Count = setting(8, unit="prompts")
    """Held-out prompts that are monitored."""
    monitor_samples: Count = setting(2, unit="images")
    """Samples of each monitored prompt."""
    bounds: dict[str, Bound] = setting({})
    """Bounds of monitors, against reward hacking: `reward/<name>`, `diversity` or
    `distance_to_base` -> settings. Without one, a reward has {collapse: 1.0} and diversity
    {collapse: 2.0}, which warn. null takes one of a file below away."""
    snapshots: list[int] = setting([], unit="network evaluations")
    """Network evaluations at which the weights are kept as well, to compare methods at equal cost;
    after the last iteration that stays within each."""
