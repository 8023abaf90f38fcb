"""UnifiedReward and other vision-language models behind an OpenAI-style HTTP endpoint."""

from __future__ import annotations

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import numpy as np
import numpy.typing as npt
from tenacity import stop_after_attempt
from torch import Tensor

from egrpo.config.rewards import UnifiedReward as Settings
from egrpo.errors import say
from egrpo.rewards.http import client_of, retrying, text_of
from egrpo.rewards.network import png_of

QUESTION = (
    "<image>\nYou are given a text caption and a generated image based on that caption. Your task "
    "is to evaluate this image based on two key criteria:\n1. Alignment with the Caption: Assess "
    "how well this image aligns with the provided caption. Consider the accuracy of depicted "
    "objects, their relationships, and attributes as described in the caption.\n2. Overall Image "
    "Quality: Examine the visual quality of this image, including clarity, detail preservation, "
    "color accuracy, and overall aesthetic appeal.\nBased on the above criteria, assign a score "
    "from 1 to 5 after 'Final Score:'.\nYour task is provided as follows:\nText Caption: [{prompt}]"
)
"""UnifiedReward's published question for a pointwise score."""

NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
BEFORE = re.compile(r"(?:\d[.,]?|(?<!\w)[-\u2212.])\Z")
AFTER = re.compile(r"[.,]?\d|[eE][-+]?\d|\s*(?:[-\u2013\u2014]|to|or)\s*\d")
"""What stands beside a number that is only a part of another one, or of a range."""
OUT_OF = re.compile(rf"[\s*_]*(?:/|out of|of)[\s*_]*({NUMBER})")


class UnansweredError(Exception):
    """A request that may succeed when it is made again."""


class UnifiedReward:
    """Scores images by asking; one that gets no score after all tries is NaN, never 0."""

    def __init__(self, settings: Settings, device: str = "cpu") -> None:
        self.settings, self.client = settings, client_of(settings)

    def score(self, images: Tensor, prompts: Sequence[str]) -> npt.NDArray[np.float32]:
        """[n] float32 scores, divided by ``divide_by``; NaN where none was given."""
        with ThreadPoolExecutor(self.settings.concurrency) as pool:
            found = list(pool.map(self._one, images, prompts))
        failed = [reason for _, reason in found if reason]
        if failed:
            text = f"{len(failed)} of {len(found)} images got no score (NaN): {failed[0]}"
            say(f"rewards, kind unifiedreward: {text}")
        return np.array([score for score, _ in found], dtype=np.float32)

    def _one(self, image: Tensor, prompt: str) -> tuple[float, str]:
        """The score of one image, or NaN and why."""
        again = UnansweredError, httpx2.TransportError
        tries = retrying(stop_after_attempt(self.settings.attempts), *again)
        try:
            return tries(self._ask, self._request(image, prompt)), ""
        except (UnansweredError, httpx2.HTTPError) as error:
            return np.nan, " ".join(f"{type(error).__name__}: {error}".split())[:200]

    def _request(self, image: Tensor, prompt: str) -> dict[str, Any]:
        picture = text_of(png_of(image, self.settings.side))
        question = (self.settings.question or QUESTION).replace("{prompt}", prompt)
        content = [
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}},
            {"type": "text", "text": question},
        ]
        messages = [{"role": "user", "content": content}]
        return {"model": self.settings.model, "temperature": 0, "messages": messages}

    def _ask(self, request: dict[str, Any]) -> float:
        """One try; an httpx2.HTTPError where the service is away, or refuses for good."""
        response = self.client.post("/chat/completions", json=request)
        if response.status_code == 429 or response.status_code >= 500:
            raise UnansweredError(f"HTTP {response.status_code}")
        response.raise_for_status()
        try:
            text = response.json()["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError, RecursionError):
            text = None
        if not isinstance(text, str):
            raise UnansweredError("an answer that is no chat completion")
        score = score_in(text, self.settings) / self.settings.divide_by
        if abs(score) > float(np.finfo(np.float32).max):
            raise UnansweredError(f"the score {score:g} is too large")
        return score


def score_in(text: str, settings: Settings) -> float:
    """The score that an answer gives, in the judge's scale.

    Raises:
        UnansweredError: if ``pattern`` finds none, or a part of a number, or one of another scale.
    """
    match = re.search(settings.pattern, text)
    if match is None or match[1] is None:
        raise UnansweredError(f"no score in the answer {text[:60]!r}")
    before, found, after = text[: match.start(1)], match[1].strip(), text[match.end(1) :]
    shown = f"{found[:20]}{after[:20]}"
    if not re.fullmatch(NUMBER, found) or BEFORE.search(before) or AFTER.match(after):
        raise UnansweredError(f"{shown!r} in the answer is not one number")
    score, (least, most) = float(found), settings.scale
    whole = OUT_OF.match(after)
    other = whole is not None and np.isfinite(most) and float(whole[1]) != most
    if other or not least <= score <= most:
        raise UnansweredError(f"{shown!r} in the answer is outside the scale {least:g} to {most:g}")
    return score
