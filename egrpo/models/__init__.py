"""Base models: one adapter per family, chosen by ``model.family``."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from egrpo.errors import say

if TYPE_CHECKING:
    from egrpo.config.models import Model
    from egrpo.models.base import FlowModel

LONG = 10.0
"""Seconds of loading that are worth a line."""

for _name in ("torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer"):
    # where torchao is installed they warn at every start, of what is not used here
    logging.getLogger(_name).setLevel(logging.ERROR)


def load_model(settings: Model, *, text: bool = False) -> FlowModel:
    """The adapter of the settings' family with its weights on their device.

    ``text``: without those that make images, to encode prompts.

    Raises:
        UserError: if the weights are missing or not of this family.
    """
    from egrpo.models.families import FAMILIES

    begun = time.monotonic()
    model = FAMILIES[settings.family](settings, text=text)
    took = time.monotonic() - begun
    if took > LONG:
        say(f"model.path: {settings.path}: loaded in {took:.0f} s")
    return model
