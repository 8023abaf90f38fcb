"""The toy world's preference score: a network trained on synthetic pairwise preferences."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from egrpo.config.rewards import Preference as Settings
from egrpo.errors import UserError, refusing

if TYPE_CHECKING:
    from torch import Tensor


class Preference:
    """Crisp, centered, saturated images score high; the prompt does not matter."""

    def __init__(self, settings: Settings, device: str) -> None:
        from egrpo.world.preference import load_preference

        path = settings.path
        if not Path(path).is_file():
            raise UserError(f"{path}: no such file")
        with refusing(path):
            self.model = load_preference(path).to(device)
        self.device = device

    def score(self, images: Tensor, prompts: Sequence[str]) -> npt.NDArray[np.float32]:
        """[n] float32; about zero mean and unit std on clean drawings of the world."""
        import torch

        with torch.no_grad():
            return self.model(images.to(self.device)).float().cpu().numpy()
