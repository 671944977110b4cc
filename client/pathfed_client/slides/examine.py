"""One slide, from an open file to its tiles, or to the reason why it has none."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pathfed_client.slides.native import NativeLevel
from pathfed_client.slides.quality import check_thumbnail, checked_mpp, is_flat
from pathfed_client.slides.reader import SlideReader
from pathfed_client.slides.tile_map import TileMap, make_map
from pathfed_client.slides.tiling import choose_level, fits, tile_cells, tile_grid
from pathfed_client.slides.tissue import THUMBNAIL_MPP, tissue_mask
from pathfed_common.errors import ErrorCode, SiteDataError
from pathfed_common.plan import CohortPlan
from pathfed_common.units import Mpp

#: Longest side of a thumbnail, pixels; the largest slides are judged a little coarser than `THUMBNAIL_MPP`.
THUMBNAIL_MAX_PX = 4096
#: Tiles read on trial before a slide counts, evenly spread.
TRIAL_TILES = 8

_PROBE_PX = 64


@dataclass(frozen=True, eq=False)
class SlideFacts:
    """A usable slide.

    Attributes:
        mpp: um/px of level 0.
        width: level-0 pixels.
        height: level-0 pixels.
        tiles: which sources are tiles, at least one, and how they are read.
    """

    mpp: Mpp
    width: int
    height: int
    tiles: TileMap


#: The native tiles of a level, where they can be decoded directly and give what the reader gives.
NativeOf = Callable[[int], NativeLevel | None]


def through_the_reader(level: int) -> None:
    """Nothing is decoded directly."""


def examine(reader: SlideReader, plan: CohortPlan, *, where: str, native: NativeOf = through_the_reader) -> SlideFacts:
    """Check a slide and find its tiles.

    Args:
        reader: the open slide.
        plan: the cohort rules.
        where: the slide's name for errors.
        native: asked once, for the level that tiles are read from.

    Raises:
        SiteDataError: unreadable (PF206), resolution missing, implausible or too coarse (PF207), not brightfield (PF208), or not one
            tile with enough tissue (PF209).
    """
    width, height = reader.dimensions
    try:
        mpp = checked_mpp(reader.mpp, where=where)
    except SiteDataError:
        _check_probes(reader, where=where)  # a file that is broken altogether should be called that, not badly labelled
        raise
    if not fits(slide_mpp=mpp, plan=plan):
        raise SiteDataError(
            ErrorCode.SLIDE_MPP_UNUSABLE, f"the slide is coarser than the plan's {plan.mpp:g} um/px", where=where, value=f"{mpp:g} um/px"
        )
    level = choose_level(slide_mpp=mpp, downsamples=reader.downsamples, plan=plan)
    thumbnail = reader.thumbnail(min(THUMBNAIL_MAX_PX, max(64, round(max(width, height) * mpp / THUMBNAIL_MPP))))
    if is_flat(thumbnail.pixels):
        _check_probes(reader, where=where)  # clean glass is this even once it is small, but not close up
    check_thumbnail(thumbnail, where=where)
    mask = tissue_mask(thumbnail)
    grid = tile_grid(
        slide_mpp=mpp,
        level=level,
        downsample=reader.downsamples[level],
        size=reader.level_dimensions[level],
        plan=plan,
        native=native(level),
    )
    tiles = make_map(grid, tile_cells(mask, cell=thumbnail.cell, grid=grid, tissue_share=plan.tissue_share))
    if len(tiles) == 0:
        raise SiteDataError(
            ErrorCode.SLIDE_WITHOUT_TISSUE,
            f"no tile has {plan.tissue_share:.0%} tissue",
            where=where,
            value=f"{mask.mean():.1%} of the slide is tissue",
        )
    _check_trial(reader, tiles, where=where)
    return SlideFacts(mpp=mpp, width=width, height=height, tiles=tiles)


def _check_probes(reader: SlideReader, *, where: str) -> None:
    """Read nine small regions; refuse a slide of which every one fails, or is of one colour."""
    width, height = reader.dimensions
    size = min(_PROBE_PX, width, height)
    places = [(width * i // 6 - size // 2, height * j // 6 - size // 2) for j in (1, 3, 5) for i in (1, 3, 5)]
    bad = [_is_bad(reader, max(0, x), max(0, y), 0, size) for x, y in places]
    if all(bad):
        raise SiteDataError(
            ErrorCode.SLIDE_UNREADABLE, "no region that was tried holds a picture", where=where, value=f"{len(bad)} regions"
        )


def _check_trial(reader: SlideReader, tiles: TileMap, *, where: str) -> None:
    """Read a few tiles; refuse a slide of which more than half fail though its thumbnail shows tissue there."""
    corners = tiles.corners()
    picked = corners[np.unique(np.linspace(0, len(corners) - 1, TRIAL_TILES).astype(int))]
    bad = sum(_is_bad(reader, int(x), int(y), tiles.grid.level, tiles.grid.crop) for x, y in picked)
    if 2 * bad > len(picked):
        raise SiteDataError(
            ErrorCode.SLIDE_UNREADABLE, "tiles cannot be read where there is tissue", where=where, value=f"{bad} of {len(picked)} tried"
        )


def _is_bad(reader: SlideReader, x: int, y: int, level: int, side: int) -> bool:
    try:
        return is_flat(reader.read_region(x, y, level, side, side))
    except SiteDataError:
        return True
