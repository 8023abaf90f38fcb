"""`egrpo serve-rewards`: reward models of a study behind a small HTTP service.

``GET /health`` names the rewards; ``POST /score`` takes JSON: ``reward``, ``prompts``, and the
images either as ``png`` (a list of base64 texts) or as ``raw`` (base64 of uint8 [n, 3, h, w]) with
``shape``. It answers ``{"scores": [...]}``, null where scoring failed. Requests that wait for a
reward are scored together; with too many of them it answers 503, and clients come again.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import io
import math
import queue
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fastapi import Depends, FastAPI, HTTPException, Request
from pydantic import BaseModel, Field
from torch import Tensor

from egrpo.errors import UserError
from egrpo.rewards import RewardModel, score_all

LOOPBACK = ("127.0.0.1", "::1", "localhost")

LARGEST = 4096
"""Pixels of an image's side, at most: a small PNG can hold a very large picture."""


class ScoreRequest(BaseModel):
    """What a client sends."""

    reward: str
    prompts: list[str] = Field(min_length=1, max_length=4096)
    png: list[str] | None = None
    raw: str | None = None
    shape: list[int] | None = None


@dataclass
class Waiting:
    """Images that wait for their scores."""

    images: Tensor
    prompts: list[str]
    scores: Future[list[float]] = field(default_factory=Future)


class Busy(Exception):  # noqa: N818
    """Too many images wait already."""


class Batcher:
    """One reward and the thread that scores what waits for it, equal sizes together."""

    def __init__(self, name: str, model: RewardModel, batch: int, limit: int) -> None:
        self.name, self.model, self.batch, self.limit = name, model, batch, limit
        self.queue: queue.Queue[Waiting] = queue.Queue()
        self.count, self.lock = 0, threading.Lock()
        threading.Thread(target=self._work, name=f"reward {name}", daemon=True).start()

    def submit(self, images: Tensor, prompts: list[str]) -> Future[list[float]]:
        """Scores to come.

        Raises:
            Busy: if more than ``limit`` images would wait.
        """
        with self.lock:
            if self.count and self.count + len(images) > self.limit:
                raise Busy
            self.count += len(images)
        waiting = Waiting(images, prompts)
        self.queue.put(waiting)
        return waiting.scores

    def _work(self) -> None:
        left: Waiting | None = None
        while True:
            first = left or self.queue.get()
            together, left = [first], None
            while sum(len(w.images) for w in together) < self.batch:
                try:
                    following = self.queue.get_nowait()
                except queue.Empty:
                    break
                if following.images.shape[1:] != first.images.shape[1:]:
                    left = following
                    break
                together.append(following)
            self._score(together)
            with self.lock:
                self.count -= sum(len(w.images) for w in together)

    def _score(self, together: list[Waiting]) -> None:
        images = torch.cat([w.images for w in together])
        prompts = [prompt for w in together for prompt in w.prompts]
        try:
            values = score_all({self.name: self.model}, images, prompts)[self.name]
        except Exception as error:  # the service goes on; the clients are told
            for w in together:
                w.scores.set_exception(error)
            return
        for w, part in zip(
            together,
            np.split(values, np.cumsum([len(w.images) for w in together])[:-1]),
            strict=True,
        ):
            w.scores.set_result(part.tolist())


def images_of(request: ScoreRequest) -> Tensor:
    """The images uint8 [n, 3, h, w] of a request.

    Raises:
        ValueError: saying what is wrong with it.
    """
    count = len(request.prompts)
    if (request.png is None) == (request.raw is None):
        raise ValueError("give images either as png or as raw")
    if request.png is not None:
        images = torch.stack([_png(text) for text in request.png])
    else:
        shape = request.shape or []
        if len(shape) != 4 or shape[1] != 3 or min(shape) < 1 or max(shape[2:]) > LARGEST:
            raise ValueError(f"shape: {shape} is not [n, 3, height, width]")
        data = _bytes(request.raw or "")
        if len(data) != math.prod(shape):
            raise ValueError(f"raw: {len(data)} bytes for shape {shape}")
        images = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(shape)
    if len(images) != count:
        raise ValueError(f"{len(images)} images for {count} prompts")
    return images


def _bytes(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError(f"not base64: {error}") from None


def _png(text: str) -> Tensor:
    from PIL import Image

    try:
        picture = Image.open(io.BytesIO(_bytes(text)), formats=["PNG"])
        if max(picture.size) > LARGEST:
            raise ValueError(f"png: {picture.size} pixels, at most {LARGEST} a side")
        return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)
    except OSError as error:
        raise ValueError(f"png: {error}") from None


def make_app(
    models: Mapping[str, RewardModel], *, token: str | None, batch: int, limit: int
) -> Any:
    """The service around loaded reward models.

    Args:
        models: by the name that clients ask for.
        token: what ``Authorization: Bearer`` must hold; None asks for nothing.
        batch: most images scored together.
        limit: most images that wait for one reward.
    """
    batchers = {name: Batcher(name, model, batch, limit) for name, model in models.items()}
    app = FastAPI(title="egrpo rewards", docs_url=None, redoc_url=None, openapi_url=None)

    def allowed(request: Request) -> None:
        given = request.headers.get("authorization", "")
        if token is not None and not hmac.compare_digest(
            given.encode(), f"Bearer {token}".encode()
        ):
            raise HTTPException(401, "the token is missing or wrong")

    @app.get("/health")
    def health() -> dict[str, Any]:
        return {"rewards": sorted(batchers), "waiting": sum(b.count for b in batchers.values())}

    # not `async`: decoding and waiting happen in the framework's threads
    @app.post("/score", dependencies=[Depends(allowed)])
    def score(request: ScoreRequest) -> dict[str, Any]:
        batcher = batchers.get(request.reward)
        if batcher is None:
            raise HTTPException(404, f"no reward {request.reward!r}; there are {sorted(batchers)}")
        try:
            waiting = batcher.submit(images_of(request), request.prompts)
        except ValueError as error:
            raise HTTPException(422, str(error)) from None
        except Busy:
            raise HTTPException(503, "busy", headers={"Retry-After": "1"}) from None
        try:
            values = waiting.result()
        except Exception as error:
            raise HTTPException(500, f"{request.reward}: {type(error).__name__}: {error}") from None
        return {"scores": [None if math.isnan(v) else v for v in values]}

    return app


def serve(
    paths: tuple[Path, ...],
    names: tuple[str, ...],
    *,
    host: str,
    port: int,
    token_file: Path | None,
    device: str,
    batch: int,
    limit: int,
) -> None:
    """Load rewards of a study and serve them until the process is ended.

    Args:
        paths: the study's YAML; further files are laid over it.
        names: which of its rewards; none means all that are not remote themselves.
        host, port: address; another host than this one needs a token.
        token_file: file with the token that clients must send.
        device: for rewards that name none.
        batch, limit: see :func:`make_app`.

    Raises:
        UserError: for an unknown reward, wrong weights, or an address open to all.
    """
    import uvicorn

    from egrpo.config.load import load_study
    from egrpo.models.base import resolve_device
    from egrpo.rewards import load_rewards

    if host not in LOOPBACK and token_file is None:
        raise UserError(f"--host {host}: others can reach it; give --token-file")
    study = load_study(*paths)
    settings = {name: r for run in study.runs.values() for name, r in run.rewards.items()}
    chosen = names or tuple(n for n, r in settings.items() if type(r).__name__ != "Remote")
    for name in chosen:
        if name not in settings:
            raise UserError(f"--reward {name}: the study has {', '.join(sorted(settings))}")
    try:
        token = token_file.read_text(encoding="utf-8").strip() if token_file else None
    except OSError as error:
        raise UserError(f"--token-file {token_file}: {error.strerror}") from None
    on = str(resolve_device(device, "--device"))
    models = load_rewards({name: settings[name] for name in chosen}, on)
    app = make_app(models, token=token, batch=batch, limit=limit)
    uvicorn.run(app, host=host, port=port, log_level="warning", access_log=False)
