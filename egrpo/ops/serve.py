"""`egrpo serve-rewards`: reward models of a study behind a small HTTP service.

``GET /health`` names the rewards; ``POST /score`` takes JSON: ``reward``, ``prompts``, and the
images either as ``png`` (a list of base64 texts) or as ``raw`` (base64 of uint8 [n, 3, h, w]) with
``shape``. PNG of 8 bits or less a channel are taken as RGB: gray and palettes are turned into it,
transparency is dropped. It answers ``{"scores": [...]}``, null where scoring failed. Requests that
wait for a reward are scored together.

Nothing of a request is read before its token was seen, and nothing is decoded before its size is
known; what is read, decoded or waiting is counted, over all requests. Refused are: 413 what is too
large for ever, 503 what is too much for now (clients come again), 422 what is malformed or what the
reward refuses; 500 says that the reward failed.
"""

from __future__ import annotations

import asyncio
import hmac
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from egrpo.errors import UserError
from egrpo.ops.batcher import Batcher, Busy, RewardFailedError, TooLarge, Waiting
from egrpo.ops.score_request import MIB, Memory, Share, images_of, mib, parsed
from egrpo.rewards import RewardModel
from egrpo.rewards.http import token_of

LOOPBACK = ("127.0.0.1", "::1", "localhost")

READING = 300.0
"""Seconds in which a request must have arrived."""

ENDING = 10
"""Seconds that the requests of an ending service have left; clients ask the next one again."""


async def _body_of(request: Request, share: Share, most: int) -> bytearray:
    """What a client sends, of at most ``most`` bytes; counted while it comes."""
    announced = int(request.headers.get("content-length", 0))
    body = bytearray()
    try:
        if announced <= most:
            share.hold(announced)
            async with asyncio.timeout(READING):
                async for part in request.stream():
                    body += part
                    if len(body) > most:
                        break
                    share.hold(max(share.held, len(body)))
    except TimeoutError:
        raise HTTPException(408, f"not here after {READING:g} s") from None
    except ClientDisconnect:
        raise HTTPException(400, "not complete") from None
    if max(announced, len(body)) > most:
        raise TooLarge(f"a request of more than {mib(most)} (--request-mib)")
    return body


async def _scores_of(waiting: Waiting, request: Request) -> list[float]:
    """Its scores; if the client leaves before, it is abandoned, and holds its memory till then."""
    scores = asyncio.wrap_future(waiting)
    gone = asyncio.ensure_future(request.receive())  # after the body: the client left
    try:
        await asyncio.wait((scores, gone), return_when=asyncio.FIRST_COMPLETED)
    finally:
        gone.cancel()
    waiting.abandoned = not scores.done()
    return await scores


def make_app(
    models: Mapping[str, RewardModel],
    *,
    token: str | None,
    batch: int,
    limit: int,
    request_mib: int,
    waiting_mib: int,
    side: int,
) -> Any:
    """The service around loaded reward models.

    Args:
        models: by the name that clients ask for.
        token: what ``Authorization: Bearer`` must hold; None asks for nothing.
        batch, limit: most images scored together, and that wait for one reward.
        request_mib: most MiB of one request, and of its images once decoded.
        waiting_mib: most MiB of all requests that are read, decoded or waiting.
        side: most pixels of an image's side.
    """
    batchers = {name: Batcher(name, model, batch, limit) for name, model in models.items()}
    memory, most = Memory(waiting_mib * MIB), request_mib * MIB
    app = FastAPI(title="egrpo rewards", docs_url=None, redoc_url=None, openapi_url=None)

    def submitted(body: bytearray, share: Share) -> Waiting:
        request = parsed(body)
        if (batcher := batchers.get(request.reward)) is None:
            known = f"there are {sorted(batchers)}"
            raise HTTPException(404, f"no reward {request.reward!r:.60}; {known}")
        batcher.admit(len(request.prompts))
        images = images_of(request, share=share, most=most, side=side)
        share.hold(images.nbytes + sum(map(sys.getsizeof, request.prompts)))
        return batcher.submit(images, request.prompts)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"rewards": sorted(batchers), "waiting": sum(b.count for b in batchers.values())}

    @app.post("/score")
    async def score(request: Request) -> dict[str, Any]:
        given = request.headers.get("authorization", "").encode()
        if token is not None and not hmac.compare_digest(given, f"Bearer {token}".encode()):
            raise HTTPException(401, "the token is missing or wrong")
        with Share(memory) as share:
            try:
                body = await _body_of(request, share, most)
                waiting = await run_in_threadpool(submitted, body, share)
                values = await _scores_of(waiting, request)
            except (MemoryError, asyncio.CancelledError):  # the latter: the service ends
                raise Busy from None
            except (ValueError, UserError) as error:
                raise HTTPException(422, str(error)) from None
            except RewardFailedError as error:
                raise HTTPException(500, str(error)) from None
        return {"scores": [v if math.isfinite(v) else None for v in values]}

    return app


def serve(
    paths: tuple[Path, ...],
    names: tuple[str, ...],
    *,
    host: str,
    port: int,
    token_file: Path | None,
    device: str,
    **bounds: int,
) -> None:
    """Load rewards of a study and serve them until the process is ended.

    No ``names`` mean all that are not remote themselves; ``device`` is for those that name none,
    ``token_file`` holds what clients must send, ``bounds`` are those of :func:`make_app`.

    Raises:
        UserError: for an unknown reward, wrong weights, or an address open to all.
    """
    import uvicorn

    from egrpo.models.loading import resolve_device
    from egrpo.rewards import load_rewards
    from egrpo.study.resolve import load_study

    if host not in LOOPBACK and token_file is None:
        raise UserError(f"--host {host}: others can reach it; give --token-file")
    study = load_study(*paths)
    settings = {name: r for run in study.runs.values() for name, r in run.rewards.items()}
    chosen = names or tuple(n for n, r in settings.items() if type(r).__name__ != "Remote")
    if unknown := [name for name in chosen if name not in settings]:
        raise UserError(f"--reward {unknown[0]}: the study has {', '.join(sorted(settings))}")
    token = token_of(token_file, "--token-file") if token_file else None
    on = str(resolve_device(device, "--device"))
    models = load_rewards({name: settings[name] for name in chosen}, on)
    uvicorn.run(
        make_app(models, token=token, **bounds),
        host=host,
        port=port,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=ENDING,
    )
