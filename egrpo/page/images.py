"""Images of a page: read from PNG, made smaller, and written as the source of an element."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

from PIL import Image

from egrpo.errors import UserError


def open_grid(path: Path) -> Image.Image:
    """A whole grid, however large: many large images together pass Pillow's limit for strangers'.

    Raises:
        UserError: if it cannot be read.
    """
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:  # Pillow's words for a damaged PNG
        raise UserError(f"{path}: damaged image ({error}); delete it and run again") from None
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def thumbnail(image: Image.Image, most: int) -> str:
    """An image as WebP, at most so many pixels across or down, as the source of an element."""
    small = image.copy()
    small.thumbnail((most, most), Image.Resampling.LANCZOS)
    return data_uri(small, "WEBP", quality=82)


def data_uri(image: Image.Image, kind: str, **options: Any) -> str:
    """An image as the source of an element."""
    out = io.BytesIO()
    image.save(out, kind, **options)
    return uri(out.getvalue(), f"image/{kind.lower()}")


def uri(content: bytes, kind: str) -> str:
    """A file as the source of an element."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
