"""Base models: one adapter per family, chosen by ``model.family``."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from egrpo.config.models import Model
    from egrpo.models.sd3 import SD3


def load_model(settings: Model, device: str | None = None) -> SD3:
    """The adapter of the settings' family with its weights on the device.

    Raises:
        UserError: if the weights are missing or not of this family.
    """
    from egrpo.models.sd3 import SD3

    families = {"sd3": SD3}
    return families[settings.family](settings, device)
