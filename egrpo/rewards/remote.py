"""A reward that another process computes: the client of ``egrpo serve-rewards``.

While the service is away nothing is scored and nothing is lost: the client waits, says so, and goes
on when it is back. Images travel as PNG or as raw bytes with their shape, never as pickles.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from egrpo.config.rewards import Remote as Settings
from egrpo.errors import UserError
from egrpo.rewards.http import LONGEST_WAIT, bearer, text_of
from egrpo.rewards.network import png_of


class AwayError(Exception):
    """The service does not answer, or has too much to do: worth another try."""


class Remote:
    """Scores images by asking the service, some requests at once."""

    def __init__(self, settings: Settings, device: str = "cpu") -> None:
        import httpx2

        self.settings = settings
        self.name = f"rewards, kind remote: {settings.url}"
        self.client = httpx2.Client(
            base_url=settings.url.rstrip("/"),
            headers=bearer(settings.token_file, self.name),
            timeout=settings.seconds,
            limits=httpx2.Limits(max_connections=settings.concurrency),
        )
        self.told = 0.0

    def score(self, images: Tensor, prompts: Sequence[str]) -> npt.NDArray[np.float32]:
        """[n] float32; NaN where the service's reward failed.

        Raises:
            UserError: if the service refuses the request, answers nonsense, or stays away longer
                than ``patience``.
        """
        size = self.settings.batch
        pixels = images.cpu()
        starts = range(0, len(pixels), size)
        with ThreadPoolExecutor(self.settings.concurrency) as pool:
            parts = list(
                pool.map(lambda b: self._part(pixels[b : b + size], prompts[b : b + size]), starts)
            )
        return np.concatenate(parts).astype(np.float32)

    def _part(self, images: Tensor, prompts: Sequence[str]) -> npt.NDArray[np.float64]:
        from tenacity import (
            RetryCallState,
            Retrying,
            retry_if_exception_type,
            stop_after_delay,
            wait_random_exponential,
        )

        def say(state: RetryCallState) -> None:
            error = state.outcome.exception() if state.outcome else None
            if time.monotonic() - self.told > LONGEST_WAIT:  # once for all requests
                self.told = time.monotonic()
                print(
                    f"{self.name}: {error}; waiting, up to {self.settings.patience:g} s in all",
                    file=sys.stderr,
                    flush=True,
                )

        retrying = Retrying(
            stop=stop_after_delay(self.settings.patience),
            wait=wait_random_exponential(multiplier=0.5, max=LONGEST_WAIT),
            retry=retry_if_exception_type(AwayError),
            before_sleep=say,
            reraise=True,
        )
        try:
            return retrying(self._ask, self._request(images, prompts), len(images))
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
        """One try.

        Raises:
            AwayError: if nobody answers, or answers that there is too much to do.
            UserError: if the answer will not change.
        """
        import httpx2

        try:
            response = self.client.post("/score", json=request)
        except httpx2.TransportError as error:
            raise AwayError(" ".join(f"{type(error).__name__}: {error}".split())) from None
        if response.status_code in (429, 502, 503, 504):
            raise AwayError(f"HTTP {response.status_code}")
        if response.status_code != 200:
            reason = " ".join(response.text.split())[:200]
            raise UserError(f"{self.name}: HTTP {response.status_code}: {reason}")
        try:
            scores = response.json()["scores"]
            values = np.array([np.nan if s is None else s for s in scores], dtype=np.float64)
        except (ValueError, LookupError, TypeError):
            raise UserError(f"{self.name}: answered {response.text[:60]!r}, no scores") from None
        if values.shape != (count,):
            raise UserError(f"{self.name}: answered {values.size} scores for {count} images")
        return values
