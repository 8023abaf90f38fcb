"""A user's own reward: ``module:function``."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from egrpo.config.rewards import Custom as Settings
from egrpo.errors import UserError


class Custom:
    """Calls the function; what it raises ends the run, so that no failure becomes a number."""

    def __init__(self, settings: Settings, device: str = "cpu") -> None:
        self.settings = settings
        module, name = settings.function.split(":")
        where = os.getcwd()
        if where not in sys.path:  # `egrpo` as a script leaves it out
            sys.path.insert(0, where)
        try:
            found = getattr(importlib.import_module(module), name)
            options = settings.options
            self.function: Callable[..., Any] = (
                found(**options) if isinstance(found, type) else partial(found, **options)
            )
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise UserError(
                f"rewards, kind custom: {settings.function}: cannot be loaded from {where}: "
                f"{reason}"
            ) from None

    def score(self, images: Tensor, prompts: Sequence[str]) -> npt.NDArray[np.float32]:
        """[n] float32."""
        scores = self.function(images, list(prompts))
        if isinstance(scores, Tensor):
            scores = scores.detach().float().cpu()
        try:
            return np.asarray(scores, dtype=np.float32)
        except (TypeError, ValueError):
            raise UserError(
                f"rewards, kind custom: {self.settings.function}: returned "
                f"{type(scores).__name__} {scores!r:.60}, not a list of {len(images)} numbers"
            ) from None
