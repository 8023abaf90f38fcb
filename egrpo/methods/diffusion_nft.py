"""DiffusionNFT (arXiv 2509.16117): ODE samples, noised to train on good and against bad ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from egrpo.core.schedule import Sigmas
from egrpo.methods.base import BATCH_STD, COMMON, NFT, Entry, rates
from egrpo.methods.shared import ForwardProcess
from egrpo.settings import setting

if TYPE_CHECKING:
    from torch import Tensor

    from egrpo.core.loss import Objective
    from egrpo.core.rollout import TrainBatch


class DiffusionNft(ForwardProcess):
    """DiffusionNFT: forward-process objective with positive and negative velocity mixtures."""

    losses = ("negative_aware",)
    source = NFT
    recipe = {
        **rates(lora=3e-4),
        **COMMON,
        "train.loss": "negative_aware",
        "train.kl_weight": 1e-4,
        "train.ema_decay": 0.5,
        "train.ema_ramp": 0.001,
        "train.sample_average": True,
        **BATCH_STD,
    }
    defaults = {"steps": 10}
    entry = Entry(
        "DiffusionNFT",
        "nothing: deterministic samples, noised again to train",
        "Samples come from an ODE; initial noise alone makes them differ. Each is noised again to "
        "some grid indices, where the network learns from good samples and against bad ones.",
        "Departs from the public code: what is evaluated is the average that samples, not a second "
        "one.",
        {"times_per_sample": 3},
    )

    name: Literal["diffusion_nft"] = setting("diffusion_nft")
    """Name of the method."""
    beta: float = setting(1.0, source=NFT, unit="1", gt=0.0)
    """Mixing of the implicit policies."""

    def objective(
        self,
        batch: TrainBatch,
        v: Tensor,
        sigmas: Sigmas,
        advantage: Tensor,
        weight: Tensor,
        *,
        clamp: float,
        **_: Any,
    ) -> Objective:
        """Its own loss (eq. 5): advantages of ``clamp`` count as fully positive or negative."""
        from egrpo.core.loss import negative_aware_objective

        rows, sigma = batch.rows, sigmas[batch.start]
        edges = (v[rows], batch.v[rows], batch.targets(), sigma, advantage, weight)
        return negative_aware_objective(*edges, self.beta, clamp)
