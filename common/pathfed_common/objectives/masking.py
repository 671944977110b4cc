"""Which patches are masked: a few random rectangles (block-wise masking, Bao et al. 2022, arXiv:2106.08254, as iBOT uses it).

The number of places is the same for every tile, so that shapes are fixed: of the places drawn for a tile the first ones are masked, and how
many they are is drawn too.

Legend of shape suffixes: N tiles, L patches, M places.
"""

import numpy as np
from numpy.typing import NDArray

_BLOCKS = 4
#: A block's sides are at most in this ratio, and its area is at least this share of the tile's patches.
_MAX_ASPECT = 1 / 0.3
_MIN_SHARE = 0.05


def counts(patches: int, ratio: tuple[float, float]) -> tuple[int, int]:
    """Fewest and most masked patches of a tile, for shares between the two of `ratio`; at least 1 and not all.

    Raises:
        ValueError: the tile has fewer than 2 patches, or the greatest share masks none or all of them.
    """
    most = int(patches * ratio[1])
    if not 1 <= most < patches:
        raise ValueError(f"a share of {ratio[1]} must mask some but not all of {patches} patches")
    return max(1, int(patches * ratio[0])), most


def numbers(grid: int) -> int:
    """Uniform numbers that one tile's mask takes."""
    return 1 + 4 * _BLOCKS + grid**2


def draw(uniforms: NDArray[np.float64], *, grid: int, least: int, most: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Masks for some tiles: places int64 (N, most), distinct patches in [0, grid^2), and how many of them are masked, int64 (N,).

    Patches are ordered by the first of the random rectangles that covers them, the uncovered ones last, and at random among equals.

    Args:
        uniforms: ``tiles * numbers(grid)`` numbers in [0, 1).
        grid: patches along a tile's side.
        least: fewest masked patches.
        most: most masked patches; also how many places are given.
    """
    rows = uniforms.reshape(-1, numbers(grid))
    masked_N = least + np.floor(rows[:, 0] * (most - least + 1)).astype(np.int64)
    first_NL = _first_block(rows[:, 1 : 1 + 4 * _BLOCKS].reshape(-1, _BLOCKS, 4), grid, most)
    order_NL = np.argsort(first_NL + rows[:, 1 + 4 * _BLOCKS :], axis=1, kind="stable")
    return order_NL[:, :most].astype(np.int64), np.minimum(masked_N, most)


def _first_block(blocks_NB4: NDArray[np.float64], grid: int, most: int) -> NDArray[np.float64]:
    """For each patch the number of the first block that covers it, or the number of blocks: (N, L)."""
    area, ratio, across, down = np.moveaxis(blocks_NB4, -1, 0)
    least_share = min(_MIN_SHARE, most / grid**2)
    area = (least_share + area * (most / grid**2 - least_share)) * grid**2
    stretch = np.exp((ratio - 0.5) * np.log(_MAX_ASPECT))
    width, height = (np.clip(np.rint(np.sqrt(area) * factor), 1, grid) for factor in (stretch, 1 / stretch))
    left, top = (np.floor(place * (grid - side + 1)) for place, side in ((across, width), (down, height)))
    steps = np.arange(grid)
    in_column = (steps >= left[..., None]) & (steps < (left + width)[..., None])
    in_row = (steps >= top[..., None]) & (steps < (top + height)[..., None])
    covered_NBL = (in_row[..., :, None] & in_column[..., None, :]).reshape(*area.shape, grid**2)
    return np.where(covered_NBL.any(1), covered_NBL.argmax(1), _BLOCKS).astype(np.float64)
