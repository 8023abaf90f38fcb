"""Seconds of an iteration and hours of a run on a card, from evaluations and measured rates.

Counted are rollouts, training passes, penalties, decoding and monitors. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from egrpo.config.models import RunConfig
from egrpo.ops.rates import Rate, find_rate, on_card, read_rates
from egrpo.planning.trees import RunCost, monitor_images
from egrpo.study.layout import Layout

LEFT_OUT = (
    "s/iteration: rollout, decoding, training, penalties; h/run: with monitors. Left out: loading, "
    "compiling, rewards, optimizer, checkpoints, profile, evaluation"
)
MS_PER_HOUR = 3.6e6
TOGETHER = "all runs"
"""Of costs by run, the key of their sum: no run has a space in its name."""


def known_rates(at: Layout, card: str | None) -> list[Rate]:
    """The rates of one card; later ones count more. Empty where none is named and none measured.

    Args:
        at: of the study, whose own measurements count more than those that ship.
        card: its name, or a part of it; None: the one that was measured last for this study.

    Raises:
        UserError: if the card is not known, or the study's table is damaged.
    """
    own = read_rates(at.rates) if at.rates.exists() else []
    if card is None:
        return [rate for rate in own if rate.card == own[-1].card]
    return on_card([*read_rates(), *own], card)


def time_of(
    run: RunConfig, cost: RunCost, images: int, rates: Sequence[Rate]
) -> dict[str, Any] | None:
    """What a run takes on the card of ``rates``; None without a rate of its model.

    Args:
        run: its model, and what its monitors do.
        cost: network evaluations of all iterations.
        images: decoded in all iterations.
        rates: of one card.

    Returns:
        ``card``, ``seconds_per_iteration`` (mean), ``hours`` of one card, with monitors,
        ``source`` of the rate, and ``notes``: what is estimated, one sentence each.

    Raises:
        UserError: if the folder of the model has no readable config.json.
    """
    rate, note = find_rate(rates, run.model)
    if rate is None:
        return None
    passes = forward_passes(run)
    training, notes = rate.training_ms, [note]
    if training is None:
        training = passes * rate.sampling_ms
        notes.append(
            f"training of {rate.model} is not measured there: a forward and backward is taken as "
            f"{passes} sampling evaluations"
        )
    if rate.decoding_ms is None:
        notes.append(f"decoding of {rate.model} is not measured there, and left out")
    sampling, decoding = rate.sampling_ms, rate.decoding_ms or 0.0
    # what training repeats is sampled in its batches, by the transformer without a merged LoRA
    repeated = min(cost.train, cost.forward)
    plain = (repeated + cost.reference) * training / passes
    rollout = (cost.forward - repeated) * sampling + images * decoding
    iterations = rollout + plain + cost.train * training
    shown = monitor_images(run)
    evaluations = shown * run.evaluate.steps * run.model.evaluations_per_velocity
    monitors = evaluations * sampling + shown * decoding
    return {
        "card": rate.card,
        "seconds_per_iteration": iterations / 1000 / run.train.iterations,
        "hours": (iterations + monitors) / MS_PER_HOUR,
        "source": rate.source,
        "notes": [text for text in notes if text],
    }


def forward_passes(run: RunConfig) -> int:
    """Forward passes whose work one forward and backward of training is.

    The backward pass takes one for the gradients of activations, and another one for those of
    weights, which a LoRA spares; checkpointing runs the forward pass again.
    """
    return 2 + (run.model.tuning == "full") + run.train.gradient_checkpointing


def together(costs: Mapping[str, dict[str, Any] | None]) -> dict[str, Any]:
    """The sum over runs whose time is known: ``hours``, ``runs``; ``without``: the other runs."""
    hours = {name: cost["time"]["hours"] for name, cost in costs.items() if cost and cost["time"]}
    return {
        "hours": sum(hours.values()),
        "runs": len(hours),
        "without": [name for name in costs if name not in hours],
    }
