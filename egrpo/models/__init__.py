"""Base models: one adapter per family, chosen by ``model.family``."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from egrpo.config.models import Model
    from egrpo.models.base import FlowModel


def load_model(settings: Model, device: str | None = None, *, text: bool = False) -> FlowModel:
    """The adapter of the settings' family with its weights on the device.

    ``text``: without those that make images, to encode prompts.

    Raises:
        UserError: if the weights are missing or not of this family.
    """
    from egrpo.models.families import FAMILIES

    return FAMILIES[settings.family](settings, device, text=text)
