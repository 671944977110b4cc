"""The tiles of a slide: from which level, out of which squares of it. Pure arithmetic, no pixels are read here.

A tile is cut, at a place drawn anew each time, out of a *source*: a square of one level, somewhat larger than the tile (the published
recipes' extended-context translation). Sources lie side by side on a grid. Where the level's own compressed tiles can be decoded directly,
sources are whole native tiles, or whole parts of one, so that a tile costs one decode; elsewhere the grid starts at the level's corner.

Frames: a grid's sizes are in pixels of its level; a source's column and row count from the level's top-left corner.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pathfed_client.slides.native import REDUCTIONS, NativeLevel
from pathfed_common import digest
from pathfed_common.digest import Digest
from pathfed_common.plan import CohortPlan

#: Raised by one whenever tissue, quality or grid rules change, so that slides are then read again.
SCAN_RULES = 3


@dataclass(frozen=True, kw_only=True)
class TileGrid:
    """How the tiles of one slide lie and how they are read.

    Attributes:
        level: the slide level tiles are read from.
        downsample: of that level, relative to level 0.
        width, height: of the level, pixels.
        step: side of a source, pixels of the level.
        crop: side of a tile, pixels of the level; at most `step`.
        reduce: by how much pixels are merged while reading; `crop` is a multiple of it.
        tile_px: side of a tile as training sees it; `crop / reduce` is brought to it by resampling when it differs.
        direct: whether pixels come from the file's own compressed tiles rather than through OpenSlide.
    """

    level: int
    downsample: float
    width: int
    height: int
    step: int
    crop: int
    reduce: int
    tile_px: int
    direct: bool

    def __post_init__(self) -> None:
        positive = min(self.tile_px, self.level + 1, self.width, self.height) > 0 and self.downsample >= 1
        if not positive or self.reduce not in REDUCTIONS or not 0 < self.crop <= self.step or self.crop % self.reduce:
            raise ValueError(f"not a tile grid: {self}")

    @property
    def columns(self) -> int:
        """Sources side by side; 0 where the level is narrower than one."""
        return self.width // self.step

    @property
    def rows(self) -> int:
        """Sources one below another; 0 where the level is lower than one."""
        return self.height // self.step

    @property
    def source_side(self) -> float:
        """Side of a source, level-0 pixels."""
        return self.step * self.downsample

    def place(self, column: int, row: int, across: float, down: float) -> tuple[int, int]:
        """Top-left corner of a tile inside its source, pixels of the level.

        Args:
            column: of the source.
            row: of the source.
            across: share of the play that is used to the right, at least 0 and below 1; every place is equally likely for a uniform share.
            down: the same downwards.
        """
        return self._shifted(column, across), self._shifted(row, down)

    def _shifted(self, number: int, share: float) -> int:
        places = (self.step - self.crop) // self.reduce + 1
        return number * self.step + int(share * places) * self.reduce


def scan_key(plan: CohortPlan) -> Digest:
    """Names the rules that decide which tiles a slide has. Plans that differ only in how many are drawn share a scan."""
    return digest.of_value(
        {
            "rules": SCAN_RULES,
            "mpp": plan.mpp,
            "mpp_tolerance": plan.mpp_tolerance,
            "tile_px": plan.tile_px,
            "play_px": plan.play_px,
            "tissue_share": plan.tissue_share,
            "quality": plan.quality.model_dump(mode="json"),
        }
    )


def fits(*, slide_mpp: float, plan: CohortPlan) -> bool:
    """Whether a slide is fine enough for the plan."""
    return math.isfinite(slide_mpp) and 0 < slide_mpp <= plan.mpp * (1 + plan.mpp_tolerance)


def choose_level(*, slide_mpp: float, downsamples: Sequence[float], plan: CohortPlan) -> int:
    """The coarsest level whose mpp is at most `plan.mpp * (1 + plan.mpp_tolerance)`: never enlarged, never decoded finer than needed.

    Args:
        slide_mpp: um/px of level 0.
        downsamples: of each level relative to level 0, beginning with 1.
        plan: the cohort rules.

    Raises:
        ValueError: no levels, a resolution that is not positive, or a slide coarser than the tolerance allows.
    """
    if not slide_mpp > 0 or not downsamples:
        raise ValueError(f"slide_mpp must be positive and downsamples non-empty, got {slide_mpp} and {list(downsamples)}")
    fitting = [level for level, down in enumerate(downsamples) if fits(slide_mpp=slide_mpp * down, plan=plan)]
    if not fitting:
        raise ValueError(f"slide_mpp must be at most {plan.mpp * (1 + plan.mpp_tolerance):g} um/px, got {slide_mpp:g}")
    return max(fitting, key=lambda level: downsamples[level])


def tile_grid(
    *, slide_mpp: float, level: int, downsample: float, size: tuple[int, int], plan: CohortPlan, native: NativeLevel | None
) -> TileGrid:
    """Lay the grid on a level.

    A level within `plan.mpp_tolerance` of the plan's mpp is read as it is; a finer one is shrunk by 2, 4 or 8 while it is read if that
    brings it within the tolerance, and resampled otherwise.

    Args:
        slide_mpp: um/px of level 0.
        level: from `choose_level`.
        downsample: of that level, relative to level 0.
        size: width and height of the level, pixels.
        plan: the cohort rules.
        native: the level's native tiles, where they are decoded directly.

    Returns:
        The grid; without a column or row where the level is smaller than one tile.
    """
    scale = plan.mpp / (slide_mpp * downsample)  # pixels of the level to one of the plan's
    reduce = _reduction(scale, plan.mpp_tolerance, native)
    as_it_is = abs(reduce / scale - 1) <= plan.mpp_tolerance
    crop = plan.tile_px * reduce if as_it_is else max(1, math.ceil(plan.tile_px * scale / reduce)) * reduce
    wanted = crop if plan.play_px == 0 else max(crop, round(plan.source_px * crop / plan.tile_px))
    step = wanted if native is None or plan.play_px == 0 else _aligned(wanted, crop, native, reduce)
    width, height = size
    return TileGrid(
        level=level,
        downsample=downsample,
        width=width,
        height=height,
        step=step,
        crop=crop,
        reduce=reduce,
        tile_px=plan.tile_px,
        direct=native is not None,
    )


def _reduction(scale: float, tolerance: float, native: NativeLevel | None) -> int:
    """The largest shrinking that does not make the level coarser than the tolerance allows."""
    if native is not None and (not native.codec.is_jpeg or native.tile_width % 8 or native.tile_height % 8):
        return 1
    return max(reduce for reduce in REDUCTIONS if reduce == 1 or reduce <= scale * (1 + tolerance))


def _aligned(wanted: int, crop: int, native: NativeLevel, reduce: int) -> int:
    """The side near `wanted`, at least `crop`, that is whole native tiles or a whole part of one; `wanted` where tiles are not square."""
    side = native.tile_width
    if side != native.tile_height:
        return wanted
    if wanted >= side:
        return max(round(wanted / side), math.ceil(crop / side)) * side
    parts = range(round(side / wanted), 0, -1)
    return next((side // part for part in parts if side % (part * reduce) == 0 and side // part >= crop), wanted)


def tile_cells(mask: NDArray[np.bool_], *, cell: float, grid: TileGrid, tissue_share: float) -> NDArray[np.bool_]:
    """Which sources hold enough tissue, bool (grid.rows, grid.columns).

    Args:
        mask: bool (rows, columns), tissue, from the slide's top-left corner on; beyond the mask there is none.
        cell: side of one element of the mask, level-0 pixels.
        grid: the slide's sources.
        tissue_share: smallest share of a source's area that is tissue, 0 to 1. A source without any tissue never counts.

    Raises:
        ValueError: an empty mask, or a cell that is not positive.
    """
    share = cell_shares(mask, cell=cell, grid=grid)
    return np.asarray((share >= tissue_share - _ROUNDING) & (share > _ROUNDING))


def cell_shares(mask: NDArray[np.bool_], *, cell: float, grid: TileGrid) -> NDArray[np.float64]:
    """Share of each source's area that is masked, float (grid.rows, grid.columns); see `tile_cells`."""
    if mask.ndim != 2 or mask.size == 0 or not cell > 0:
        raise ValueError(f"mask must be 2-D and non-empty, cell positive, got {mask.shape}, cell {cell}")
    side = grid.source_side / cell
    ys, xs = (np.arange(number + 1, dtype=np.float64) * side for number in (grid.rows, grid.columns))
    share: NDArray[np.float64] = np.diff(np.diff(_summed(mask, ys, xs), axis=0), axis=1) / side**2
    return share


#: Slack for rounding in the summed area, as a share of a source.
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
