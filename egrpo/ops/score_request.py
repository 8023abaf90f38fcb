"""One request of `egrpo serve-rewards`: what it holds, and its images.

Nothing is decoded before its size is known, and what is held is counted before it is there.
"""

from __future__ import annotations

import base64
import binascii
import io
import struct
import threading
from typing import Annotated

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError
from torch import Tensor

from egrpo.ops.batcher import Busy, TooLarge

MIB = 2**20

PARTS = 2**20
"""Commas and opening brackets of a request, at most: each may stand for an object in memory."""

PROMPT = 2**16
"""Characters of a prompt, at most."""


class ScoreRequest(BaseModel):
    """What a client sends."""

    model_config = ConfigDict(strict=True)

    reward: str
    prompts: Annotated[
        list[Annotated[str, Field(max_length=PROMPT)]], FailFast(), Field(min_length=1)
    ]
    png: Annotated[list[str], FailFast()] = []
    raw: str = ""
    shape: list[Annotated[int, Field(ge=1, lt=2**31)]] | None = Field(
        None, min_length=4, max_length=4
    )


class Memory:
    """Bytes that all requests hold together, at most ``most``."""

    def __init__(self, most: int) -> None:
        self.most, self.held, self.lock = most, 0, threading.Lock()


class Share:
    """What one request holds of it; nothing after the ``with``."""

    def __init__(self, memory: Memory) -> None:
        self.memory, self.held = memory, 0

    def __enter__(self) -> Share:
        return self

    def __exit__(self, *_: object) -> None:
        self.hold(0)

    def hold(self, count: int) -> None:
        """Hold so many bytes from now on; TooLarge if nobody may, Busy if others hold too many."""
        with self.memory.lock:
            held, most = self.memory.held - self.held + count, self.memory.most
            if count > max(self.held, most):
                of = f"{mib(count)} for a request, at most {mib(most)} for all"
                raise TooLarge(f"{of} (--waiting-mib)")
            if count > self.held and held > most:
                raise Busy
            self.memory.held, self.held = held, count


def mib(count: int) -> str:
    """Bytes for people."""
    return f"{count / MIB:.1f} MiB"


def parsed(body: bytearray) -> ScoreRequest:
    """The request in it; the bytes are gone afterwards. ValueError without what was sent."""
    if sum(map(body.count, (b",", b"[", b"{"))) > PARTS:
        raise ValueError(f"JSON of more than {PARTS} parts")
    try:
        return ScoreRequest.model_validate_json(body)
    except ValidationError as error:
        (first, *_) = error.errors(include_url=False, include_context=False, include_input=False)
        where = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"{where}: {first['msg']}" if where else first["msg"]) from None
    finally:
        body.clear()


def images_of(request: ScoreRequest, *, share: Share, most: int, side: int) -> Tensor:
    """The images uint8 [n, 3, h, w] of a request, of at most ``most`` bytes.

    Raises:
        ValueError: saying what is wrong with it.
        TooLarge, Busy: before anything is decoded.
    """
    if bool(request.png) == bool(request.raw):
        raise ValueError("give images either as png or as raw")
    count, height, width = _sizes(request)
    if count != len(request.prompts):
        raise ValueError(f"{count} images for {len(request.prompts)} prompts")
    size, one = f"{width}x{height} pixels", 3 * height * width
    if max(height, width) > side:
        raise TooLarge(f"images of {size}, at most {side} a side (--side)")
    if count * one > most:
        total = f"{count} images of {size} are {mib(count * one)}"
        raise TooLarge(f"{total}, at most {mib(most)} (--request-mib)")
    share.hold(share.held + (count + 4) * one)  # PIL has one in two modes, and numpy
    if request.raw:
        data = bytearray(_bytes(request.raw))
        return torch.frombuffer(data, dtype=torch.uint8).view(count, 3, height, width)
    images = torch.empty((count, 3, height, width), dtype=torch.uint8)
    for image, text in zip(images, request.png, strict=True):
        image.copy_(_png(text, (height, width)))
    return images


def _sizes(request: ScoreRequest) -> tuple[int, int, int]:
    """Number, height and width of the images, without decoding them."""
    if request.png:
        sizes = {_size(text) for text in request.png}
        if len(sizes) > 1:
            raise ValueError("png: images of different sizes in one request")
        return len(request.png), *sizes.pop()
    count, channels, height, width = request.shape or (0, 0, 1, 1)
    if channels != 3:
        raise ValueError(f"shape: {request.shape} is not [n, 3, height, width]")
    held = 3 * len(request.raw) // 4 - request.raw[-2:].count("=")
    if held != count * 3 * height * width:
        raise ValueError(f"raw: {held} bytes for shape {request.shape}")
    return count, height, width


def _bytes(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError(f"not base64: {error}") from None


def _size(text: str) -> tuple[int, int]:
    """Height and width that the head of a PNG names."""
    head = _bytes(text[:44])  # signature and first chunk
    if len(head) < 33 or head[:16] != b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR":
        raise ValueError("png: no PNG file")
    width, height, bits = struct.unpack(">IIB", head[16:25])
    if not width or not height:
        raise ValueError("png: an image without pixels")
    if bits > 8:  # PIL cuts these off at 255
        raise ValueError(f"png: {bits} bits a channel, at most 8")
    return height, width


def _png(text: str, size: tuple[int, int]) -> Tensor:
    """uint8 [3, h, w] of the size that was read before."""
    from PIL import Image

    try:
        picture = Image.open(io.BytesIO(_bytes(text)), formats=["PNG"])
        if picture.size != size[::-1]:
            raise ValueError("it names two sizes")
        return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)
    except MemoryError:
        raise
    except Exception as error:  # of many kinds, and all mean: damaged
        raise ValueError(f"png: damaged: {type(error).__name__}") from None
