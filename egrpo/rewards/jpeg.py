"""JPEG compressibility (DDPO, arXiv 2305.13301): minus the file's size in kB at quality 95."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor


class Jpeg:
    """Higher is smaller. The prompt does not matter."""

    def __init__(self, settings: Any = None, device: str = "cpu") -> None:
        pass

    def score(self, images: Tensor, prompts: Sequence[str]) -> npt.NDArray[np.float32]:
        """[n] float32, in kB (1000 bytes), negative."""
        sizes = []
        for pixels in images.permute(0, 2, 3, 1).cpu().numpy():
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, format="JPEG", quality=95)
            sizes.append(buffer.tell())
        return -np.array(sizes, dtype=np.float32) / 1000.0
