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
        UserError: see :func:`token_of`.
    """
    if token_file is None:
        return {}
    return {"Authorization": f"Bearer {token_of(token_file, f'{name}: token_file')}"}


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
