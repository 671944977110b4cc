"""The tile grid of a slide: which squares of it are tiles. Pure arithmetic, no pixels are read here.

Frames: tile corners and sides are in level-0 pixels; `level_px` is in pixels of the level the tile is read from. A tile covers
`tile_px * mpp` micrometres whatever the slide's own resolution.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pathfed_common import digest
from pathfed_common.digest import Digest
from pathfed_common.plan import CohortPlan

#: Raised by one whenever tissue, quality or grid rules change, so that slides are then read again.
SCAN_RULES = 2


@dataclass(frozen=True)
class TileGrid:
    """How the tiles of one slide lie and how they are read.

    Attributes:
        side: side of a tile, level-0 pixels.
        level: the slide level tiles are read from.
        level_px: side of a tile on that level, pixels of that level.
    """

    side: int
    level: int
    level_px: int


def scan_key(plan: CohortPlan) -> Digest:
    """Names the rules that decide which tiles a slide has. Plans that differ only in `tiles_per_patient` share a scan."""
    return digest.of_value(
        {
            "rules": SCAN_RULES,
            "mpp": plan.mpp,
            "mpp_tolerance": plan.mpp_tolerance,
            "tile_px": plan.tile_px,
            "tissue_share": plan.tissue_share,
            "quality": plan.quality.model_dump(mode="json"),
        }
    )


def tile_grid(*, slide_mpp: float, downsamples: Sequence[float], plan: CohortPlan) -> TileGrid:
    """Choose side and level for a slide.

    The level is the coarsest one whose mpp is at most `plan.mpp * (1 + plan.mpp_tolerance)`: never upsampled beyond the tolerance, and
    never decoded finer than needed.

    Args:
        slide_mpp: um/px of level 0.
        downsamples: of each level relative to level 0, beginning with 1.
        plan: the cohort rules.

    Raises:
        ValueError: no levels, a resolution that is not positive, or a slide coarser than the tolerance allows.
    """
    if not slide_mpp > 0 or not downsamples:
        raise ValueError(f"slide_mpp must be positive and downsamples non-empty, got {slide_mpp} and {list(downsamples)}")
    coarsest = plan.mpp * (1 + plan.mpp_tolerance)
    fit = [level for level, down in enumerate(downsamples) if slide_mpp * down <= coarsest]
    if not fit:
        raise ValueError(f"slide_mpp must be at most {coarsest:g} um/px, got {slide_mpp:g}")
    level = max(fit, key=lambda index: downsamples[index])
    side = max(1, round(plan.tile_px * plan.mpp / slide_mpp))
    return TileGrid(side=side, level=level, level_px=max(1, round(side / downsamples[level])))


def tile_corners(mask: NDArray[np.bool_], *, cell: float, width: int, height: int, side: int, tissue_share: float) -> NDArray[np.int32]:
    """Corners of the grid tiles that hold enough tissue, in rows from the top, left to right.

    The grid starts at (0, 0) and its tiles neither overlap nor reach outside the slide.

    Args:
        mask: bool (rows, columns), tissue, from the slide's top-left corner on; beyond the mask there is none.
        cell: side of one element of the mask, level-0 pixels.
        width: of the slide, level-0 pixels.
        height: of the slide, level-0 pixels.
        side: of a tile, level-0 pixels.
        tissue_share: smallest share of a tile's area that is tissue, 0 to 1. A tile without any tissue never counts.

    Returns:
        int32 (n, 2), top-left (x, y) in level-0 pixels; n may be 0.

    Raises:
        ValueError: an empty mask, or a size that is not positive.
    """
    if mask.ndim != 2 or mask.size == 0 or min(width, height, side) < 1 or not cell > 0:
        raise ValueError(f"mask must be 2-D and non-empty, sizes positive, got {mask.shape}, cell {cell}, {width} x {height}, side {side}")
    xs = np.arange(width // side + 1, dtype=np.float64) * side
    ys = np.arange(height // side + 1, dtype=np.float64) * side
    area = _summed(mask, ys / cell, xs / cell)
    share = np.diff(np.diff(area, axis=0), axis=1) / (side / cell) ** 2
    rows, columns = np.nonzero((share >= tissue_share - _ROUNDING) & (share > _ROUNDING))
    return np.stack([columns * side, rows * side], axis=1).astype(np.int32)


#: Slack for rounding in the summed area, as a share of a tile.
_ROUNDING = 1e-9


def _summed(mask: NDArray[np.bool_], ys: NDArray[np.float64], xs: NDArray[np.float64]) -> NDArray[np.float64]:
    """Integral of the mask from (0, 0) to each (y, x), mask cells; exact between cells too, since the mask is constant inside a cell."""
    table = np.zeros((mask.shape[0] + 1, mask.shape[1] + 1))
    table[1:, 1:] = mask.cumsum(axis=0, dtype=np.float64).cumsum(axis=1)
    return _interpolated(_interpolated(table, ys).T, xs).T


def _interpolated(table: NDArray[np.float64], at: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rows of the table at fractional positions, linearly between neighbours."""
    last = table.shape[0] - 1
    low = np.minimum(np.floor(at).astype(np.int64), last - 1)
    part = np.minimum(at - low, 1)[:, None]
    between: NDArray[np.float64] = table[low] * (1 - part) + table[low + 1] * part
    return between


def fits(*, slide_mpp: float, plan: CohortPlan) -> bool:
    """Whether a slide is fine enough for the plan."""
    return math.isfinite(slide_mpp) and 0 < slide_mpp <= plan.mpp * (1 + plan.mpp_tolerance)
