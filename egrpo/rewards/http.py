"""What the rewards behind HTTP share."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx2
from tenacity import Retrying, retry_if_exception_type, wait_random_exponential

from egrpo.errors import UserError

if TYPE_CHECKING:
    from egrpo.config.rewards import Remote, UnifiedReward

LONGEST_WAIT = 10.0
"""Seconds between two tries, at most."""


def client_of(settings: Remote | UnifiedReward) -> httpx2.Client:
    """What asks the service at ``url``, with the token that ``token_file`` holds.

    Raises:
        UserError: see :func:`token_of`.
    """
    path = settings.token_file
    token = {} if path is None else {"Authorization": f"Bearer {token_of(path, 'token_file')}"}
    return httpx2.Client(
        base_url=settings.url.rstrip("/"),
        headers=token,
        timeout=settings.seconds,
        limits=httpx2.Limits(max_connections=settings.concurrency),
    )


def retrying(stop: Any, *errors: type[Exception], **more: Any) -> Retrying:
    """Tries again after these errors, which it raises in the end, with longer and longer waits."""
    wait = wait_random_exponential(multiplier=0.5, max=LONGEST_WAIT)
    retry = retry_if_exception_type(errors)
    return Retrying(stop=stop, wait=wait, retry=retry, reraise=True, **more)


def token_of(path: str | Path, what: str) -> str:
    """The token in a file, without the white space around it.

    Raises:
        UserError: beginning with ``what``, if the file cannot be read or no header could hold it.
    """
    try:
        token = Path(path).read_text(encoding="ascii").strip()
    except OSError as error:
        raise UserError(f"{what}: {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        token = ""
    if not token or not token.isprintable():
        raise UserError(f"{what}: {path}: a token of printable ASCII characters is needed")
    return token


def text_of(data: bytes) -> str:
    """Bytes in base64."""
    return base64.b64encode(data).decode("ascii")
