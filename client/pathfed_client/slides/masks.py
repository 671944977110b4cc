"""Arithmetic on thumbnail-sized planes that segmentation and filters share. Pure, vectorised, float32.

Frames: planes are (rows, columns) at thumbnail resolution; corners and sides are level-0 pixels, `cell` is the side of one plane element
in level-0 pixels.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pathfed_client.slides.reader import Thumbnail

Plane = NDArray[np.float32]
Mask = NDArray[np.bool_]

_GLASS_FLOOR = 200.0  # glass is assumed at least this bright, or a slide without any would take its palest tissue for it
_ENOUGH = 1_000_000
_FILL = 254  # a pixel with every channel at least this is what a scanner fills skipped glass with, not glass it has seen


def optical_density(thumbnail: Thumbnail) -> Plane:
    """Optical density of each channel against the slide's own glass, over 3 x 3 neighbourhoods, at least 0.

    With light I0 from empty glass a pixel I has density log10(I0 / I) (Beer-Lambert), so that the tone of glass and lamp drops out. Glass
    is the 98th percentile of each channel, white fill left out: a slide whose skipped glass is filled with 255 has true glass near 240.

    Returns:
        float32 (rows, columns, 3).
    """
    seen = sampled(thumbnail.pixels[thumbnail.valid])
    seen = seen[seen.min(axis=1) < _FILL] if len(seen) else seen
    glass = np.maximum(np.percentile(seen, 98, axis=0), _GLASS_FLOOR) if len(seen) else np.full(3, 255.0)
    density = np.empty(thumbnail.pixels.shape, np.float32)
    for channel in range(3):
        table = np.maximum(np.log10(glass[channel] + 1) - np.log10(np.arange(256) + 1), 0).astype(np.float32)
        smooth = np.rint(box_mean(thumbnail.pixels[..., channel], 1)).astype(np.uint8)
        density[..., channel] = table[smooth]
    return density


def mean_density(density: Plane) -> Plane:
    """Mean over the channels; numpy reduces an axis of three elements several times slower than it adds three planes."""
    return np.asarray((density[..., 0] + density[..., 1] + density[..., 2]) / np.float32(3), np.float32)


def colour_in_density(density: Plane) -> Plane:
    """The densest channel above the lightest: 0 for what is grey."""
    red, green, blue = density[..., 0], density[..., 1], density[..., 2]
    return np.asarray(np.maximum(np.maximum(red, green), blue) - np.minimum(np.minimum(red, green), blue), np.float32)


def sampled(values: NDArray[Any]) -> NDArray[Any]:
    """At most about a million of the values, evenly spread along the first axis: enough for a percentile or a histogram."""
    return values[:: max(1, len(values) // _ENOUGH)]


def box_mean(values: NDArray[np.generic], radius: int) -> Plane:
    """Mean over a square of 2 * radius + 1 cells a side; beyond the edge the nearest row or column repeats."""
    size = 2 * radius + 1
    padded = np.pad(values, radius, mode="edge").astype(np.float32)
    rows = padded[: values.shape[0]].copy()
    for shift in range(1, size):
        rows += padded[shift : shift + values.shape[0]]
    total = rows[:, : values.shape[1]].copy()
    for shift in range(1, size):
        total += rows[:, shift : shift + values.shape[1]]
    total /= size * size
    return total


def wide_mean(values: NDArray[np.generic], radius: int, *, block: int = 5) -> Plane:
    """Roughly `box_mean` for large radii: means of blocks, averaged over a square of about that radius, spread out again."""
    rows, columns = values.shape
    padded = np.pad(values, ((0, -rows % block), (0, -columns % block)), mode="edge").astype(np.float32)
    small = padded.reshape(padded.shape[0] // block, block, padded.shape[1] // block, block).mean(axis=(1, 3))
    smooth = box_mean(small, max(1, round(radius / block)))
    return np.asarray(smooth.repeat(block, axis=0).repeat(block, axis=1)[:rows, :columns])


def majority(mask: Mask, radius: int) -> Mask:
    """Where more than half of a square around a cell is set: drops what is smaller, closes what is nearly full."""
    return np.asarray(box_mean(mask, radius) > 0.5)


def near(mask: Mask, radius: int) -> Mask:
    """Where any cell of a square around a cell is set."""
    return np.asarray(box_mean(mask, radius) > 0.5 / (2 * radius + 1) ** 2)
