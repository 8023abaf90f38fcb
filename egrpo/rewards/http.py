"""What the rewards behind HTTP share."""

from __future__ import annotations

import base64
from pathlib import Path

from egrpo.errors import UserError

LONGEST_WAIT = 10.0
"""Seconds between two tries, at most."""


def bearer(token_file: str | None, name: str) -> dict[str, str]:
    """The header with the token that a file holds; none without a file.

    Raises:
        UserError: if the file cannot be read.
    """
    if token_file is None:
        return {}
    try:
        token = Path(token_file).read_text(encoding="utf-8").strip()
    except OSError as error:
        raise UserError(f"{name}: token_file: {token_file}: {error.strerror}") from None
    return {"Authorization": f"Bearer {token}"}


def text_of(data: bytes) -> str:
    """Bytes in base64."""
    return base64.b64encode(data).decode("ascii")
