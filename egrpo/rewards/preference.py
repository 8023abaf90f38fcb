"""The toy world's preference score: a network trained on synthetic pairwise preferences."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from egrpo.config.rewards import Preference as Settings
from egrpo.errors import UserError, refusing
from egrpo.world.preference import load_preference


class Preference:
    """Crisp, centered, saturated images score high; the prompt does not matter."""

    def __init__(self, settings: Settings, device: str) -> None:
        path = settings.path
        if not Path(path).is_file():
            raise UserError(f"{path}: no such file")
        with refusing(path):
            self.model = load_preference(path).to(device)
        self.device = device

    @torch.no_grad()
    def score(self, images: Tensor, prompts: Sequence[str]) -> npt.NDArray[np.float32]:
        """[n] float32; about zero mean and unit std on clean drawings of the world."""
        return self.model(images.to(self.device)).float().cpu().numpy()
