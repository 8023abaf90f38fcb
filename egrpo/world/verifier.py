"""Verifier of the toy world: reads color, shape, position and size off the pixels.

The GenEval question in miniature (arXiv 2310.11513): does the image hold what the prompt asks
for? numpy only, about 0.1 ms an image. Shape legend: n images, H = W = 32 pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from egrpo.world.prompts import parse_prompt
from egrpo.world.shapes import (
    AREA_FACTORS,
    CENTERS,
    HUES,
    IMAGE_SIZE,
    PIXELS,
    RADII,
    FloatArray,
    coverage,
)

# Widths of the soft decisions. Each is a few times the spread of the renderer's own jitter, so
# that clean renders score near 1 and a drawing half way between two values scores about 0.5.
HUE_WIDTH = 14.0  # degrees
POSITION_WIDTH = 2.2  # pixels
SIZE_WIDTH = 0.10  # of the logarithm of the radius
OVERLAP_WIDTH = 0.045  # of the intersection over union with a template
CONTRAST_MIDDLE, CONTRAST_WIDTH = 0.22, 0.04  # color distance to the ground, RGB in [0, 1]
OVERLAP_MIDDLE, FIT_WIDTH = 0.62, 0.05  # best intersection over union of a clean drawing
_PEAK_PIXELS = 12  # the most distinct pixels, whose mean distance is the contrast


@dataclass(frozen=True)
class Reading:
    """Probabilities read off n images, in the orders of SIZES, COLORS, SHAPES and POSITIONS.

    size [n, 2], color [n, 6], shape [n, 4], position [n, 5]; rows add up to ``presence`` [n], the
    probability that there is one clear shape at all (of colors to less, where it is gray).
    """

    size: FloatArray
    color: FloatArray
    shape: FloatArray
    position: FloatArray
    presence: FloatArray


@dataclass(frozen=True)
class Verdict:
    """How well n images follow their prompts; every array is float32 [n] in [0, 1].

    color, shape, position, size: probability of the prompt's own value.
    smooth: geometric mean of the four. exact: 1 if a colored shape is there and the most probable
    value of each attribute is the prompt's, else 0.
    """

    color: FloatArray
    shape: FloatArray
    position: FloatArray
    size: FloatArray
    smooth: FloatArray
    exact: FloatArray


def verify(images: NDArray[np.uint8], prompts: Sequence[str]) -> Verdict:
    """Scores uint8 images [n, 32, 32, 3] against n prompts of the toy grammar; never NaN.

    Raises `ValueError` for images of another type, shape or number, and other prompts.
    """
    if len(images) != len(prompts):
        raise ValueError(f"{len(images)} images but {len(prompts)} prompts")
    known = {prompt: parse_prompt(prompt).indices for prompt in set(prompts)}
    index = np.array([known[prompt] for prompt in prompts], dtype=np.int64).reshape(-1, 4)
    reading = read_attributes(images)
    rows = np.arange(len(index))
    tables = (reading.size, reading.color, reading.shape, reading.position)
    size, color, shape, position = (t[rows, index[:, k]] for k, t in enumerate(tables))
    matches = [t.argmax(1) == index[:, k] for k, t in enumerate(tables)]
    # A row of colors adds up to the probability that there is one clear shape with a hue.
    exact = np.logical_and.reduce(matches) & (reading.color.sum(1) > 0.5)
    product = size * color * shape * position
    smooth = np.sqrt(np.sqrt(product)).astype(np.float32)
    return Verdict(color, shape, position, size, smooth, exact.astype(np.float32))


def read_attributes(images: NDArray[np.uint8]) -> Reading:
    """Attribute probabilities of uint8 images [n, 32, 32, 3].

    Raises `ValueError` for another type or shape.
    """
    if images.dtype != np.uint8 or images.shape[1:] != (IMAGE_SIZE, IMAGE_SIZE, 3):
        raise ValueError(f"expected uint8 [n, 32, 32, 3], got {images.dtype} {images.shape}")
    mask, color_mean, contrast = _foreground(images)

    area = np.maximum(mask.sum((1, 2)), 1.0)
    x, y = (mask.sum(axis) @ PIXELS / area for axis in (1, 2))
    overlap = _template_overlap(mask, x, y, area)
    best = overlap.max(1)
    presence = _sigmoid((contrast - CONTRAST_MIDDLE) / CONTRAST_WIDTH) * _sigmoid(
        (best - OVERLAP_MIDDLE) / FIT_WIDTH
    )

    shape = _softmax(overlap / OVERLAP_WIDTH)
    distance = (x[:, None] - CENTERS[None, :, 0]) ** 2 + (y[:, None] - CENTERS[None, :, 1]) ** 2
    position = _softmax(-distance / (2 * POSITION_WIDTH**2))
    # The radius depends on which shape fills the area, so size averages over the shapes.
    radius = np.sqrt(area[:, None] / AREA_FACTORS[None])
    middle = 0.5 * (np.log(RADII[0]) + np.log(RADII[1]))
    large = (shape * _sigmoid((np.log(radius) - middle) / SIZE_WIDTH)).sum(1)
    size = np.stack([1.0 - large, large], axis=1)

    tables = (size, _color_probabilities(color_mean), shape, position)
    shown = ((table * presence[:, None]).astype(np.float32) for table in tables)
    size, color, shape, position = shown
    return Reading(size, color, shape, position, presence.astype(np.float32))


def _foreground(images: NDArray[np.uint8]) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Soft mask [n, H, W], mean color of the foreground [n, 3] and contrast [n]."""
    pixels = _smooth3(images.astype(np.float32) * np.float32(1 / 255))
    border = np.concatenate(
        [pixels[:, 0], pixels[:, -1], pixels[:, 1:-1, 0], pixels[:, 1:-1, -1]], axis=1
    )
    ground = np.median(border, axis=1)
    offset = pixels - ground[:, None, None, :]
    distance = np.sqrt(np.einsum("nhwc,nhwc->nhw", offset, offset))
    flat = distance.reshape(len(images), IMAGE_SIZE * IMAGE_SIZE)
    contrast = np.partition(flat, -_PEAK_PIXELS, axis=1)[:, -_PEAK_PIXELS:].mean(1)
    # The ramp is symmetric about one half: edges keep their area, the ground's faint gradient
    # and noise below a third of the contrast fall away.
    share = distance / np.maximum(contrast, 0.05)[:, None, None]
    mask = np.clip((share - 0.32) / 0.36, 0.0, 1.0)
    core = np.where(share > 0.75, mask, 0.0) + np.float32(1e-6)
    color = np.einsum("nhw,nhwc->nc", core, pixels) / core.sum((1, 2))[:, None]
    return mask, color, contrast


def _smooth3(pixels: FloatArray) -> FloatArray:
    """A light 3x3 binomial blur (1, 4, 1)/6 along both axes, with the edge repeated."""
    place = np.arange(IMAGE_SIZE)
    for axis in (1, 2):
        below, above = (np.take(pixels, place + n, axis, mode="clip") for n in (-1, 1))
        pixels = (pixels * np.float32(4) + below + above) * np.float32(1 / 6)
    return pixels


def _template_overlap(
    mask: FloatArray, x: FloatArray, y: FloatArray, area: FloatArray
) -> FloatArray:
    """Soft intersection over union [n, 4] with each shape at the measured centroid and area."""
    overlap = []
    for shape, factor in enumerate(AREA_FACTORS):
        template = coverage(shape, x, y, np.sqrt(area / factor))
        shared = np.minimum(mask, template).sum((1, 2))
        union = mask.sum((1, 2)) + template.sum((1, 2)) - shared
        overlap.append(shared / np.maximum(union, 1.0))
    return np.stack(overlap, axis=1)


def _color_probabilities(rgb: FloatArray) -> FloatArray:
    """Probabilities [n, 6] of the named colors of mean colors [n, 3] in [0, 1].

    Distance on the hue circle; grays have no hue, so that their rows tend to zero.
    """
    high, low = rgb.max(1), rgb.min(1)
    chroma = high - low
    safe = np.maximum(chroma, 1e-6)
    red, green, blue = rgb[:, 0], rgb[:, 1], rgb[:, 2]
    hue = np.where(
        high == red,
        (green - blue) / safe % 6.0,
        np.where(high == green, (blue - red) / safe + 2.0, (red - green) / safe + 4.0),
    )
    gap = np.abs(hue[:, None] * 60.0 - HUES[None])
    gap = np.minimum(gap, 360.0 - gap)
    named = _softmax(-(gap**2) / (2 * HUE_WIDTH**2))
    certain = _sigmoid((chroma - 0.2) / 0.03)[:, None]
    return np.asarray(certain * named, dtype=np.float32)


def _sigmoid(x: FloatArray) -> FloatArray:
    return np.asarray(1.0 / (1.0 + np.exp(-np.clip(x, -30.0, 30.0))), dtype=np.float32)


def _softmax(x: FloatArray) -> FloatArray:
    """Along the last axis."""
    e = np.exp(x - x.max(-1, keepdims=True))
    return np.asarray(e / e.sum(-1, keepdims=True), dtype=np.float32)
