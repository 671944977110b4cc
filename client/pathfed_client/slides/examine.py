"""One slide, from an open file to its tiles, or to the reason why it has none."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from pathfed_client.slides.filters import FilterCount, FilteredSlideError, FilterReport, SlideMasks, filtered_tiles, slide_masks
from pathfed_client.slides.focus import sharpness_at
from pathfed_client.slides.native import NativeLevel
from pathfed_client.slides.quality import check_levels, check_thumbnail, checked_mpp, flat_share, is_flat
from pathfed_client.slides.reader import SlideReader, Thumbnail
from pathfed_client.slides.tile_map import TileMap, make_map
from pathfed_client.slides.tiling import TileGrid, choose_level, fits, tile_grid
from pathfed_client.slides.tissue import THUMBNAIL_MPP
from pathfed_common.errors import ErrorCode, SiteDataError
from pathfed_common.plan import CohortPlan
from pathfed_common.units import Mpp

#: Longest side of a thumbnail, pixels; the largest slides are judged a little coarser than `THUMBNAIL_MPP`.
THUMBNAIL_MAX_PX = 4096
#: Tiles read on trial before a slide counts, evenly spread; their focus is measured.
TRIAL_TILES = 12

_PROBE_PX = 64


@dataclass(frozen=True, eq=False)
class SlideFacts:
    """A usable slide.

    Attributes:
        mpp: um/px of level 0.
        width: level-0 pixels.
        height: level-0 pixels.
        tiles: which sources are tiles, at least one, and how they are read.
        filters: what the quality filters removed.
    """

    mpp: Mpp
    width: int
    height: int
    tiles: TileMap
    filters: FilterReport


#: The native tiles of a level, where they can be decoded directly and give what the reader gives.
NativeOf = Callable[[int], NativeLevel | None]


def through_the_reader(level: int) -> None:
    """Nothing is decoded directly."""


def examine(
    reader: SlideReader,
    plan: CohortPlan,
    *,
    where: str,
    mpp_override: float | None = None,
    native: NativeOf = through_the_reader,
) -> SlideFacts:
    """Check a slide and find its tiles.

    Args:
        reader: the open slide.
        plan: the cohort rules.
        where: the slide's name for errors.
        mpp_override: um/px of level 0 that the hospital gives, instead of what the file states; None for the file's.
        native: asked once, for the level that tiles are read from.

    Raises:
        SiteDataError: unreadable (PF206), resolution missing, implausible or too coarse (PF207), not brightfield (PF208), or not one
            tile with enough tissue (PF209).
        FilteredSlideError: out of focus (PF214), or the filters leave no tile (PF215).
    """
    check_levels(reader.level_dimensions, where=where)
    width, height = reader.dimensions
    mpp = usable_mpp(reader, plan, where=where, mpp_override=mpp_override)
    thumbnail = slide_thumbnail(reader, mpp)
    if is_flat(thumbnail.pixels):
        _check_probes(reader, where=where)  # clean glass is this even once it is small, but not close up
    check_thumbnail(thumbnail, where=where)
    masks = slide_masks(thumbnail, plan.quality)
    tiles, filters = lay_tiles(masks, slide_grid(reader, mpp, plan, native), thumbnail.cell, plan)
    _check_tissue(masks, filters, len(tiles), plan, where=where)
    filters = _check_trial(reader, tiles, filters, plan, where=where)
    return SlideFacts(mpp=mpp, width=width, height=height, tiles=tiles, filters=filters)


def usable_mpp(reader: SlideReader, plan: CohortPlan, *, where: str, mpp_override: float | None = None) -> Mpp:
    """The slide's resolution, um/px: what the hospital gives, or what the file states.

    Raises:
        SiteDataError: it cannot be believed, or is too coarse for the plan (PF207); or nothing of the slide can be read (PF206).
    """
    try:
        mpp = checked_mpp(reader.mpp if mpp_override is None else (mpp_override, mpp_override), where=where)
    except SiteDataError:
        _check_probes(reader, where=where)  # a file that is broken altogether should be called that, not badly labelled
        raise
    if not fits(slide_mpp=mpp, plan=plan):
        raise SiteDataError(
            ErrorCode.SLIDE_MPP_UNUSABLE, f"the slide is coarser than the plan's {plan.mpp:g} um/px", where=where, value=f"{mpp:g} um/px"
        )
    return mpp


def slide_thumbnail(reader: SlideReader, mpp: float) -> Thumbnail:
    """The whole slide at about `THUMBNAIL_MPP`, given um/px of level 0.

    Raises:
        SiteDataError: it cannot be read (PF206).
    """
    return reader.thumbnail(min(THUMBNAIL_MAX_PX, max(64, round(max(reader.dimensions) * mpp / THUMBNAIL_MPP))))


def slide_grid(reader: SlideReader, mpp: float, plan: CohortPlan, native: NativeOf = through_the_reader) -> TileGrid:
    """The sources of a slide that is fine enough for the plan, given um/px of level 0."""
    level = choose_level(slide_mpp=mpp, downsamples=reader.downsamples, plan=plan)
    return tile_grid(
        slide_mpp=mpp,
        level=level,
        downsample=reader.downsamples[level],
        size=reader.level_dimensions[level],
        plan=plan,
        native=native(level),
    )


def lay_tiles(masks: SlideMasks, grid: TileGrid, cell: float, plan: CohortPlan) -> tuple[TileMap, FilterReport]:
    """The tiles that the thumbnail's filters leave, and what each filter removed. The one place where a grid is laid on a mask."""
    cells, filters = filtered_tiles(masks, grid, plan, cell=cell)
    return make_map(grid, cells), filters


def _check_tissue(masks: SlideMasks, filters: FilterReport, tiles: int, plan: CohortPlan, *, where: str) -> None:
    if filters.tissue_tiles == 0:
        raise SiteDataError(
            ErrorCode.SLIDE_WITHOUT_TISSUE,
            f"no tile has {plan.tissue_share:.0%} tissue",
            where=where,
            value=f"{masks.tissue.mean():.1%} of the slide is tissue",
        )
    if tiles == 0:
        told = ", ".join(f"{count.name} removed {count.tiles}" for count in filters.removed if count.tiles)
        raise FilteredSlideError(
            ErrorCode.SLIDE_FILTERED,
            "the quality filters left no tile",
            where=where,
            value=f"of {filters.tissue_tiles} tiles with tissue {told}",
            report=filters,
        )


def _check_probes(reader: SlideReader, *, where: str) -> None:
    """Read nine small regions; refuse a slide of which every one fails, or is of one colour."""
    width, height = reader.dimensions
    size = min(_PROBE_PX, width, height)
    places = [(width * i // 6 - size // 2, height * j // 6 - size // 2) for j in (1, 3, 5) for i in (1, 3, 5)]
    regions = [_region(reader, max(0, x), max(0, y), 0, size) for x, y in places]
    if all(region is None or is_flat(region) for region in regions):
        raise SiteDataError(
            ErrorCode.SLIDE_UNREADABLE, "no region that was tried holds a picture", where=where, value=f"{len(regions)} regions"
        )


def _check_trial(reader: SlideReader, tiles: TileMap, filters: FilterReport, plan: CohortPlan, *, where: str) -> FilterReport:
    """Read a few tiles; refuse a slide of which more than half fail though its thumbnail shows tissue there, or that is out of focus."""
    corners, grid = tiles.corners(), tiles.grid
    picked = corners[np.unique(np.linspace(0, len(corners) - 1, TRIAL_TILES).astype(int))]
    regions = [_region(reader, int(x), int(y), grid.level, grid.crop) for x, y in picked]
    read = [tile for tile in regions if tile is not None and flat_share(tile) <= plan.quality.flat_share and not is_flat(tile)]
    if 2 * len(read) < len(picked):
        raise SiteDataError(
            ErrorCode.SLIDE_UNREADABLE,
            "tiles cannot be read where there is tissue",
            where=where,
            value=f"{len(picked) - len(read)} of {len(picked)} tried",
        )
    values = [sharpness_at(tile, plan.tile_px) for tile in read]
    sharp = sum(value >= plan.quality.min_sharpness for value in values)
    refused = sharp < plan.quality.sharp_share * len(values)
    kept = filters.tissue_cells - sum(count.cells for count in filters.removed)
    focus = FilterCount("focus", kept if refused else 0, len(corners) if refused else 0)
    filters = replace(filters, removed=(*filters.removed, focus), sampled=len(values), sharp=sharp)
    if refused:
        raise FilteredSlideError(
            ErrorCode.SLIDE_OUT_OF_FOCUS,
            f"tiles are out of focus: median sharpness {np.median(values):.2f}, the plan asks {plan.quality.min_sharpness:g}",
            where=where,
            value=f"{sharp} of {len(values)} sampled are sharp",
            report=filters,
        )
    return filters


def _region(reader: SlideReader, x: int, y: int, level: int, side: int) -> NDArray[np.uint8] | None:
    try:
        return reader.read_region(x, y, level, side, side)
    except SiteDataError:
        return None
