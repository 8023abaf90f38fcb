"""AWM (arXiv 2509.25050): ODE samples, noised to train by a policy gradient of their matching."""

from __future__ import annotations

from typing import Literal

from egrpo.core.noise import Matching
from egrpo.methods.base import BATCH_STD, COMMON, Entry, rates
from egrpo.methods.shared import ForwardProcess
from egrpo.settings import setting

AWM = "AWM, arXiv 2509.25050 and its public code"


class Awm(ForwardProcess):
    """AWM: clipped policy gradient whose log-probability is a function of the matching error."""

    losses = ("clipped",)
    source = AWM
    recipe = {
        **rates(lora=3e-4),
        **COMMON,
        "train.clip_range": 1.0,
        "train.kl_weight": 1e-4,  # its recipe for PickScore; GenEval 1e-3, OCR 3e-3
        "train.ema_decay": 0.3,
        "train.ema_ramp": 0.001,
        "train.ema_weight": 1.0,
        **BATCH_STD,
    }
    defaults = {"steps": 14, "times_per_sample": 6, "times_part": 0.9, "solver": "ode"}
    entry = Entry(
        "AWM",
        "nothing: deterministic samples, noised again to train",
        "As DiffusionNFT, with a clipped policy gradient whose log-probability is a power of the "
        "matching error at the noised latent, times its flow time. A penalty keeps the velocity "
        "near that of a short average of the weights.",
        "Departs from the public code: times are drawn without strata, by default from all of the "
        "first 12 of 14, as in its two recipes for PickScore, whose KL weight is the default too "
        "(its four for GenEval and OCR never noise to t = 1, and have 1e-3 and 3e-3); Euler's ODE "
        "in the place of SA-Solver; what is evaluated is the average of the penalty, not a second "
        "one (0.99 an epoch there); training starts with the first iteration, not the third.",
        {"times_per_sample": 3},
    )

    name: Literal["awm"] = setting("awm")
    """Name of the method."""
    weight: float = setting(0.2, source=AWM, unit="1", gt=0.0)
    """Factor of the loss: advantages, clamped at 5, count within 1."""
    power: float = setting(0.25, source=AWM, unit="1", gt=0.0, le=1.0)
    """Power p of the matching error e in the log-probability -(e^p - c) / p (generalized Huber); 1:
    the error itself."""
    time_weight: bool = setting(True, source=AWM)
    """Multiply the log-probability by the flow time of the noised sample."""

    @property
    def edge_weight(self) -> float:
        """See :class:`~egrpo.methods.shared.ForwardProcess`."""
        return self.weight

    @property
    def matching(self) -> Matching:
        """See :class:`~egrpo.methods.base.Method`."""
        return Matching(self.power, self.time_weight)
