"""A user's own reward: ``module:function``."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from numbers import Real
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
                f"{settings.function}: cannot be loaded from {where}: {reason}"
            ) from None

    def score(self, images: Tensor, prompts: Sequence[str]) -> npt.NDArray[np.float32]:
        """[n] float32 of numbers; truth is 1 or 0, and None is NaN.

        Raises:
            UserError: if the function returns anything else, such as numbers written as text.
        """
        scores = self.function(images, list(prompts))
        if isinstance(scores, Tensor):
            scores = scores.detach().cpu()
            scores = scores.float() if scores.is_floating_point() else scores
        try:
            found = np.asarray(scores)
            if found.ndim and all(s is None or isinstance(s, Real) for s in found.flat):
                found = found.astype(np.float64)
            if found.dtype.kind in "biuf":
                with np.errstate(over="ignore"):  # infinite: NaN where rewards are gathered
                    return found.astype(np.float32)
        except (TypeError, ValueError, RuntimeError, OverflowError):
            pass
        raise UserError(
            f"rewards, kind custom: {self.settings.function}: returned "
            f"{type(scores).__name__} {scores!r:.60}, not a list of {len(images)} numbers"
        )
