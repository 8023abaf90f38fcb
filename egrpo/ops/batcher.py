"""One reward of `egrpo serve-rewards`: the requests that wait for it, and its thread."""

from __future__ import annotations

import queue
import threading
import traceback
from concurrent.futures import Future
from contextlib import suppress
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from fastapi import HTTPException
from torch import Tensor

from egrpo.errors import UserError, printable, say
from egrpo.rewards import RewardModel, score_all


class RewardFailedError(Exception):
    """What a reward died of, in one line."""


class Busy(HTTPException):
    """Too much waits already: the client comes again."""

    def __init__(self) -> None:
        super().__init__(503, "busy", {"Retry-After": "1"})


class TooLarge(HTTPException):
    """A request that no waiting makes small enough."""

    def __init__(self, reason: str) -> None:
        super().__init__(413, reason)


class Waiting(Future[list[float]]):
    """The scores to come of some images.

    They fail with UserError where the reward refuses the images or prompts, with RewardFailedError
    where it fails. An abandoned request is passed over when its turn comes.
    """

    def __init__(self, images: Tensor, prompts: list[str]) -> None:
        super().__init__()
        self.images, self.prompts, self.abandoned = images, prompts, False
        self.set_running_or_notify_cancel()  # nobody may cancel it: the thread sets it


class Batcher:
    """One reward and the thread that scores what waits for it, equal sizes together."""

    def __init__(self, name: str, model: RewardModel, batch: int, limit: int) -> None:
        self.name, self.model, self.batch, self.limit = name, model, batch, limit
        self.queue: queue.Queue[Waiting] = queue.Queue()
        self.count, self.lock = 0, threading.Lock()
        self.halved = False
        threading.Thread(target=self._work, name=f"reward {name}", daemon=True).start()

    def admit(self, count: int) -> None:
        """Raise TooLarge for more images than may ever wait, Busy where too many would wait now."""
        if count > self.limit:
            raise TooLarge(f"{count} images in a request, at most {self.limit} may wait (--limit)")
        if self.count + count > self.limit:
            raise Busy

    def submit(self, images: Tensor, prompts: list[str]) -> Waiting:
        """Let images wait for their scores; raises as :meth:`admit`."""
        with self.lock:
            self.admit(len(images))
            self.count += len(images)
        waiting = Waiting(images, prompts)
        self.queue.put(waiting)
        return waiting

    def _work(self) -> None:
        left: Waiting | None = None
        while True:
            together, left = [left or self._next(wait=True)], None
            outcomes: list[list[float] | Exception]
            try:
                left = self._add_what_fits(together)
                outcomes = self._outcomes(together)
            except BaseException as error:  # no memory for a list, say: the thread lives on
                outcomes = [RewardFailedError(type(error).__name__)] * len(together)
            for waiting, outcome in zip(together, outcomes, strict=True):
                self._finish(waiting, outcome)

    def _add_what_fits(self, together: list[Waiting]) -> Waiting | None:
        """Add what waits to a batch; the first that does not fit, if it was taken already."""
        size, first = len(together[0].images), together[0].images
        while size < self.batch:
            try:
                following = self._next(wait=False)
            except queue.Empty:
                break
            size += len(following.images)
            if size > self.batch or following.images.shape[1:] != first.shape[1:]:
                return following
            together.append(following)
        return None

    def _next(self, *, wait: bool) -> Waiting:
        """The next request that somebody still wants; raises queue.Empty."""
        while (waiting := self.queue.get(wait)).abandoned:
            self._finish(waiting, [])
        return waiting

    def _finish(self, waiting: Waiting, outcome: list[float] | Exception) -> None:
        with self.lock:  # before the client knows, who may ask at once for more
            self.count -= len(waiting.prompts)
        if isinstance(outcome, Exception):
            waiting.set_exception(outcome)
        else:
            waiting.set_result(outcome)

    def _outcomes(self, together: list[Waiting]) -> list[list[float] | Exception]:
        """Scores of each request, or why it has none: together, and each alone if that fails."""
        try:
            images = torch.cat([w.images for w in together])
            values = self._scores(images, [prompt for w in together for prompt in w.prompts])
            given = iter(values.tolist())
            return [list(islice(given, len(w.prompts))) for w in together]
        except BaseException as error:  # sys.exit in a reward's code too: the clients are told
            if len(together) == 1:
                return [self._told(error)]
        return [self._outcomes([w])[0] for w in together]

    def _scores(self, images: Tensor, prompts: list[str]) -> npt.NDArray[np.float64]:
        """[n] scores; by halves where memory ends."""
        try:
            return score_all({self.name: self.model}, images, prompts)[self.name]
        except (torch.OutOfMemoryError, MemoryError):
            if len(images) == 1:
                raise
        # the error is gone here, and with it what it kept
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if not self.halved:
            self.halved = True
            lower = "lower --batch, or `batch` of the reward"
            _say(f"{self.name}: no memory for {len(images)} images at once, so by halves; {lower}")
        half = len(images) // 2
        halves = slice(half), slice(half, None)
        return np.concatenate([self._scores(images[part], prompts[part]) for part in halves])

    def _told(self, error: BaseException) -> Exception:
        """The error without its traceback, which would keep the images; failures are said."""
        if isinstance(error, UserError):
            return UserError(str(error))
        reason = printable(f"{type(error).__name__}: {error}")
        frame = traceback.extract_tb(error.__traceback__)[-1]
        _say(f"{self.name}: {reason} ({Path(frame.filename).name}, line {frame.lineno})")
        return RewardFailedError(reason)


def _say(text: str) -> None:
    """One line for who runs the service."""
    with suppress(OSError, ValueError):  # nobody reads it any more
        say(f"serve-rewards: {text}")
