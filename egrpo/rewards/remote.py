"""A reward that another process computes: the client of ``egrpo serve-rewards``.

While the service is away nothing is scored and nothing is lost: the client waits, says so, and goes
on when it is back. Images travel as PNG or as raw bytes with their shape, never as pickles.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import numpy as np
import numpy.typing as npt
from tenacity import RetryCallState, stop_after_attempt, stop_after_delay
from torch import Tensor

from egrpo.config.rewards import Remote as Settings
from egrpo.errors import UserError, say
from egrpo.rewards import http
from egrpo.rewards.http import client_of, retrying, text_of
from egrpo.rewards.network import png_of

TRIES = 3
"""Tries of a request whose reward fails there."""


class AwayError(Exception):
    """The service does not answer, or has too much to do: worth another try."""


class FailedError(Exception):
    """The reward failed there: worth few other tries."""


class TooLargeError(Exception):
    """The service takes no request of this size."""


class Remote:
    """Scores images by asking the service, some requests at once."""

    def __init__(self, settings: Settings, device: str = "cpu") -> None:
        self.settings = settings
        self.name = f"rewards, kind remote: {settings.url}"
        self.client = client_of(settings)
        self.told = 0.0
        self.batch = settings.batch

    def score(self, images: Tensor, prompts: Sequence[str]) -> npt.NDArray[np.float32]:
        """[n] float32; NaN where the service's reward failed.

        Raises:
            UserError: if the service refuses the request or one image alone, answers nonsense,
                fails again and again, or stays away longer than ``patience``.
        """
        size, pixels = self.batch, images.cpu()
        some = [slice(begin, begin + size) for begin in range(0, len(pixels), size)]
        with ThreadPoolExecutor(self.settings.concurrency) as pool:
            parts = list(pool.map(lambda s: self._part(pixels[s], prompts[s]), some))
        with np.errstate(over="ignore"):  # infinite: NaN where rewards are gathered
            return np.concatenate(parts).astype(np.float32)

    def _part(self, images: Tensor, prompts: Sequence[str]) -> npt.NDArray[np.float64]:
        """The scores of one request, or of smaller ones where the service finds it too large."""
        try:
            return self._patiently(images, prompts)
        except TooLargeError as error:
            if len(images) == 1:
                height, width = images.shape[2:]
                raise UserError(
                    f"{self.name}: an image of {width}x{height} pixels is too large for it: {error}"
                ) from None
            half = len(images) // 2
            if half < self.batch:
                self.batch = half
                self._say(f"{error}; from now on at most {half} images at once (`batch`)")
        parts, begin = [], 0
        while begin < len(images):
            end = begin + self.batch  # which may become smaller on the way
            parts.append(self._part(images[begin:end], prompts[begin:end]))
            begin = end
        return np.concatenate(parts)

    def _say(self, text: str) -> None:
        say(f"{self.name}: {text}")

    def _patiently(self, images: Tensor, prompts: Sequence[str]) -> npt.NDArray[np.float64]:
        """One request, again and again while the service is away."""

        def say(state: RetryCallState) -> None:
            error = state.outcome.exception() if state.outcome else None
            if time.monotonic() - self.told > http.LONGEST_WAIT:  # once for all requests
                self.told = time.monotonic()
                self._say(f"{error}; waiting, up to {self.settings.patience:g} s in all")

        patient = stop_after_delay(self.settings.patience)
        away = retrying(patient, AwayError, before_sleep=say)
        failed = retrying(patient | stop_after_attempt(TRIES), FailedError)
        request = self._request(images, prompts)
        try:
            return away(lambda: failed(self._ask, request, len(images)))
        except FailedError as error:
            raise UserError(f"{self.name}: {error}; tried again in vain") from None
        except AwayError as error:
            raise UserError(
                f"{self.name}: away for more than {self.settings.patience:g} s: {error}; start it "
                "again (egrpo serve-rewards) and run the same command"
            ) from None

    def _request(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Any]:
        request: dict[str, Any] = {"reward": self.settings.reward, "prompts": list(prompts)}
        if self.settings.encoding == "png":
            return request | {"png": [text_of(png_of(image)) for image in images]}
        raw = images.contiguous().numpy().tobytes()
        return request | {"raw": text_of(raw), "shape": list(images.shape)}

    def _ask(self, request: dict[str, Any], count: int) -> npt.NDArray[np.float64]:
        """One try; a UserError where the answer will not change."""
        try:
            response = self.client.post("/score", json=request)
        except httpx2.TransportError as error:
            raise AwayError(" ".join(f"{type(error).__name__}: {error}".split())) from None
        status = response.status_code
        if status in (408, 429, 502, 503, 504):
            raise AwayError(f"HTTP {status}")
        if status != 200:
            reason = f"HTTP {status}: {' '.join(response.text.split())[:200]}"
            if status == 413:
                raise TooLargeError(reason)
            if status >= 500:
                raise FailedError(reason)
            raise UserError(f"{self.name}: {reason}")
        try:
            scores = response.json()["scores"]
            # neither text nor truth is a score
            if not isinstance(scores, list) or {*map(type, scores)} - {int, float, type(None)}:
                raise TypeError
            values = np.array([np.nan if s is None else s for s in scores], dtype=np.float64)
        except (ValueError, LookupError, TypeError, OverflowError, RecursionError):
            raise UserError(f"{self.name}: answered {response.text[:60]!r}, no scores") from None
        if values.shape != (count,):
            raise UserError(f"{self.name}: answered {values.size} scores for {count} images")
        return values
