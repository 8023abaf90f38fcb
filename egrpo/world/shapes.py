"""Renderer of the toy world: anti-aliased colored shapes, a pure function of (prompt, seed).

Shape legend: n images, H = W = 32 pixels. Pixel (row i, column j) has its center at
(x, y) = (j + 0.5, i + 0.5), y downwards. Each image depends on its own integer seed alone,
never on the batch that it is rendered in.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from egrpo.world.prompts import COLORS, POSITIONS, SHAPES, Attributes

IMAGE_SIZE = 32
PIXELS = np.arange(IMAGE_SIZE, dtype=np.float32) + np.float32(0.5)
"""Centers of the pixels along an axis."""
# Degrees on the HSV color circle, in the order of COLORS.
HUES = np.array([0.0, 55.0, 120.0, 180.0, 230.0, 285.0], dtype=np.float32)
# Nominal centers (x, y) in pixels, in the order of POSITIONS.
CENTERS = np.array([[10, 16], [22, 16], [16, 10], [16, 22], [16, 16]], dtype=np.float32)
# Nominal radii in pixels, in the order of SIZES.
RADII = np.array([4.0, 7.0], dtype=np.float32)

# Proportions to the radius r, chosen so that the areas are near each other.
SQUARE_HALF_SIDE = 0.886
TRIANGLE_CIRCUMRADIUS = 1.35
CROSS_ARM = 1.15
CROSS_HALF_WIDTH = 0.40
# Area / r**2, in the order of SHAPES.
AREA_FACTORS = np.array(
    [
        np.pi,
        4 * SQUARE_HALF_SIDE**2,
        0.75 * np.sqrt(3) * TRIANGLE_CIRCUMRADIUS**2,
        8 * CROSS_ARM * CROSS_HALF_WIDTH - 4 * CROSS_HALF_WIDTH**2,
    ],
    dtype=np.float32,
)

_CHUNK = 2048  # images rendered at once; bounds the memory of a large request
_DRAWS = 12  # random numbers that one image uses

FloatArray = NDArray[np.float32]


def signed_distance(shape: int, dx: FloatArray, dy: FloatArray, radius: FloatArray) -> FloatArray:
    """Signed distance in pixels (negative inside) of offsets from the shape's centroid.

    shape: index in SHAPES; dx, dy, radius broadcast against each other. Corners use the
    largest half-plane distance, which is exact inside and near the edges.
    """
    name = SHAPES[shape]
    if name == "circle":
        return np.asarray(np.sqrt(dx * dx + dy * dy) - radius, dtype=np.float32)
    if name == "square":
        return np.maximum(np.abs(dx), np.abs(dy)) - np.float32(SQUARE_HALF_SIDE) * radius
    if name == "triangle":
        # Equilateral, apex up: the inradius is half the circumradius.
        inradius = np.float32(TRIANGLE_CIRCUMRADIUS / 2) * radius
        slanted = np.float32(np.sqrt(3) / 2) * np.abs(dx) - np.float32(0.5) * dy
        return np.maximum(slanted, dy) - inradius
    ax, ay = np.abs(dx), np.abs(dy)
    arm, half = np.float32(CROSS_ARM) * radius, np.float32(CROSS_HALF_WIDTH) * radius
    return np.minimum(np.maximum(ax - arm, ay - half), np.maximum(ax - half, ay - arm))


def coverage(shape: int, x: FloatArray, y: FloatArray, radius: FloatArray) -> FloatArray:
    """Anti-aliased coverage in [0, 1], [n, H, W], of shapes at centroids (x, y) [n] in pixels.

    Edges are ramps of one pixel.
    """
    dx = PIXELS[None, None, :] - x[:, None, None]
    dy = PIXELS[None, :, None] - y[:, None, None]
    distance = signed_distance(shape, dx, dy, radius[:, None, None])
    return np.clip(np.float32(0.5) - distance, 0.0, 1.0)


def uniforms(seeds: NDArray[np.int64], draws: int) -> FloatArray:
    """Uniform numbers in [0, 1), [n, draws], a hash (splitmix64) of (seed, draw) alone."""
    golden = np.uint64(0x9E3779B97F4A7C15)
    counter = np.asarray(seeds, dtype=np.int64).astype(np.uint64)[:, None] * np.uint64(draws)
    z = (counter + np.arange(1, draws + 1, dtype=np.uint64)[None]) * golden
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = z ^ (z >> np.uint64(31))
    return ((z >> np.uint64(40)).astype(np.float64) / float(1 << 24)).astype(np.float32)


def hsv_to_rgb(hue: FloatArray, saturation: FloatArray, value: FloatArray) -> FloatArray:
    """[n] hue in degrees, saturation and value in [0, 1] -> RGB [n, 3] in [0, 1]."""
    sector = np.array([5.0, 3.0, 1.0], dtype=np.float32)
    k = (sector[None] + hue[:, None] / 60.0) % 6.0
    ramp = np.clip(np.minimum(k, 4.0 - k), 0.0, 1.0)
    return np.asarray(value[:, None] * (1.0 - saturation[:, None] * ramp), dtype=np.float32)


def render(
    attributes: Sequence[Attributes], seeds: Sequence[int] | NDArray[np.int64]
) -> NDArray[np.uint8]:
    """Images uint8 [n, 32, 32, 3] of n attributes and n integer seeds.

    Raises `ValueError` when the two lengths differ.
    """
    numbers = np.asarray(seeds, dtype=np.int64)
    if numbers.shape != (len(attributes),):
        raise ValueError(f"{len(attributes)} attributes need as many seeds, got {numbers.shape}")
    index = np.array([a.indices for a in attributes], dtype=np.int64).reshape(-1, 4)
    images = np.empty((len(index), IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    for start in range(0, len(index), _CHUNK):
        part = slice(start, start + _CHUNK)
        images[part] = _render_chunk(index[part], uniforms(numbers[part], _DRAWS))
    return images


def _render_chunk(index: NDArray[np.int64], u: FloatArray) -> NDArray[np.uint8]:
    """Images of attribute indices [n, 4] and uniform numbers [n, _DRAWS]."""
    centered = 2.0 * u - 1.0
    radius = RADII[index[:, 0]] * (1.0 + 0.08 * centered[:, 0])
    hue = HUES[index[:, 1]] + 9.0 * centered[:, 1]
    color = hsv_to_rgb(hue, 0.75 + 0.25 * u[:, 2], 0.72 + 0.26 * u[:, 3])
    x = CENTERS[index[:, 3], 0] + 1.2 * centered[:, 4]
    y = CENTERS[index[:, 3], 1] + 1.2 * centered[:, 5]

    # Light, nearly neutral ground with a faint linear gradient of brightness.
    grid = PIXELS / IMAGE_SIZE - 0.5
    slope = 0.06 * centered[:, 6, None, None] * grid[None, None, :]
    slope = slope + 0.06 * centered[:, 7, None, None] * grid[None, :, None]
    tint = 0.015 * centered[:, 8:11]
    level = 0.90 + 0.05 * centered[:, 11]
    ground = (level[:, None, None] + slope)[..., None] + tint[:, None, None, :]

    mask = np.empty((len(index), IMAGE_SIZE, IMAGE_SIZE), dtype=np.float32)
    for shape in range(len(SHAPES)):
        rows = np.flatnonzero(index[:, 2] == shape)
        mask[rows] = coverage(shape, x[rows], y[rows], radius[rows])
    alpha = mask[..., None]
    image = ground * (1.0 - alpha) + color[:, None, None, :] * alpha
    return np.asarray(np.clip(np.rint(image * 255.0), 0, 255), dtype=np.uint8)


assert len(HUES) == len(COLORS)
assert len(CENTERS) == len(POSITIONS)
