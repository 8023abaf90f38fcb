"""The toy world's exact reward: are color, shape, position and size what the prompt says?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from torch import Tensor

from egrpo.errors import UserError
from egrpo.world.verifier import verify


class Verifier:
    """Reads the attributes off the pixels (``egrpo.world.verifier``): a smooth score in [0, 1]."""

    exact: ClassVar[bool] = False

    def __init__(self, settings: Any = None, device: str = "cpu") -> None:
        pass

    def score(self, images: Tensor, prompts: Sequence[str]) -> npt.NDArray[np.float32]:
        """[n] float32.

        Raises:
            UserError: if a prompt lies outside the toy world's grammar.
        """
        pixels = images.permute(0, 2, 3, 1).cpu().numpy()
        try:
            verdict = verify(pixels, prompts)
        except ValueError as error:
            raise UserError(f"reward of kind verifier: {error}") from None
        return (verdict.exact if self.exact else verdict.smooth).astype(np.float32)


class VerifierExact(Verifier):
    """1 if all four attributes are right, else 0."""

    exact = True
