"""Is a slide what it says it is? Checks on pixels and numbers that have already been read.

A corrupt file may open and return pixels of one colour, or none, without any error; a resolution may be missing or absurd. Either would
be trained on silently, so either is refused with a code.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pathfed_client.slides.reader import Thumbnail
from pathfed_common.errors import ErrorCode, SiteDataError
from pathfed_common.units import Mpp

#: um/px a scanner's level 0 plausibly has. 28.97, 352.8 and 1000 have been met in real files and are mistakes.
MPP_BOUNDS = (0.1, 2.0)
#: Largest ratio of mpp along x to mpp along y (or the reverse) of square pixels, as a share above 1.
MPP_ANISOTROPY = 0.05

#: Longest side of a slide, pixels: several times the largest that scanners make. More is damage, or made to exhaust memory.
MOST_SIDE_PX = 1 << 19
#: By how much the two sides of a level may be shrunk differently: a share, and pixels of that level, for levels padded to whole tiles.
_SHAPE, _SHAPE_PX = 0.05, 2

_FLAT = 2  # levels of 255 a region may span and still count as one colour
_STRIDE = 8  # every eighth pixel of every eighth row tells nearly always
_LIT = 80.0  # mean of R, G, B above which a pixel is lit from behind
_BLOCK_PX = 16
_PADDING = 2  # a pixel with no channel above this is a scanner's padding


def checked_mpp(mpp: tuple[float, float] | None, *, where: str) -> Mpp:
    """The slide's resolution, if it can be believed.

    Args:
        mpp: um/px along x and y as stated by the file, or None.
        where: the slide's name for errors.

    Raises:
        SiteDataError: absent, outside `MPP_BOUNDS`, or pixels that are not square (PF207).
    """
    if mpp is None:
        raise SiteDataError(ErrorCode.SLIDE_MPP_UNUSABLE, "the file does not state its resolution (um/px)", where=where)
    x, y = mpp
    low, high = MPP_BOUNDS
    if not (math.isfinite(x) and math.isfinite(y) and low <= x <= high and low <= y <= high):
        raise SiteDataError(
            ErrorCode.SLIDE_MPP_UNUSABLE,
            f"the stated resolution is not plausible: level 0 must be {low:g} to {high:g} um/px",
            where=where,
            value=f"{x:g} x {y:g}",
        )
    if max(x, y) > min(x, y) * (1 + MPP_ANISOTROPY):
        raise SiteDataError(ErrorCode.SLIDE_MPP_UNUSABLE, "the slide's pixels are not square", where=where, value=f"{x:g} x {y:g} um/px")
    return Mpp((x + y) / 2)


def check_levels(sizes: Sequence[tuple[int, int]], *, where: str) -> None:
    """Refuse a slide whose stated sizes cannot be a picture's: beyond any scanner's, or levels that are no smaller copies of level 0.

    Args:
        sizes: width and height of each level, pixels of that level, level 0 first.
        where: the slide's name for errors.

    Raises:
        SiteDataError: PF206.
    """
    (width0, height0), *_ = sizes
    for width, height in sizes:
        told = f"{width} x {height}"
        if not (0 < width <= MOST_SIDE_PX and 0 < height <= MOST_SIDE_PX):
            raise SiteDataError(ErrorCode.SLIDE_UNREADABLE, "the slide states a size that no scanner makes", where=where, value=told)
        across, down = width0 / width, height0 / height
        if abs(across - down) > max(across, down) * (_SHAPE + _SHAPE_PX / min(width, height)):
            raise SiteDataError(ErrorCode.SLIDE_UNREADABLE, f"a level is no smaller copy of {width0} x {height0}", where=where, value=told)


def is_flat(pixels: NDArray[np.uint8]) -> bool:
    """Whether a region is all of one colour, as undecodable regions come out. Glass is not: a scanner's noise shows on it.

    Args:
        pixels: uint8 RGB (..., 3), at least one pixel.
    """
    few = pixels[..., ::_STRIDE, ::_STRIDE, :] if pixels.ndim > 2 else pixels
    return _spans_little(few) and _spans_little(pixels)


def _spans_little(pixels: NDArray[np.uint8]) -> bool:
    flat = pixels.reshape(-1, 3)
    return int((flat.max(axis=0) - flat.min(axis=0)).max()) <= _FLAT


def flat_share(pixels: NDArray[np.uint8]) -> float:
    """Share of a region's blocks of 16 x 16 pixels that are of one colour: 0 for tissue or scanned glass, 1 for a constant region.

    A decoder that loses the rest of a tile fills it with one colour, so a region may be constant in part. Measured: at most 11% of
    the blocks of any of the 1,480 real lung tiles, and 34% of any tile of the CMU slide (clean glass after JPEG), are of one colour.

    Args:
        pixels: uint8 RGB (rows, columns, 3), at least one pixel.
    """
    rows, columns = (max(1, size // _BLOCK_PX) for size in pixels.shape[:2])
    high, wide = min(_BLOCK_PX, pixels.shape[0]), min(_BLOCK_PX, pixels.shape[1])
    blocks = pixels[: rows * high, : columns * wide].reshape(rows, high, columns, wide, 3)
    span = blocks.max(axis=(1, 3)) - blocks.min(axis=(1, 3))
    return float((span.max(axis=2) <= _FLAT).mean())


def check_thumbnail(thumbnail: Thumbnail, *, where: str) -> None:
    """Refuse a slide that holds no data, or was not taken in transmitted light.

    In brightfield most of a slide is lit from behind, glass and tissue alike. In fluorescence almost all of it is dark. Black padding
    does not count for either.

    Raises:
        SiteDataError: no data (PF206), or not a brightfield picture (PF208).
    """
    seen = thumbnail.pixels[thumbnail.valid]
    if len(seen) == 0:
        raise SiteDataError(ErrorCode.SLIDE_UNREADABLE, "the whole slide is transparent", where=where)
    picture = seen[seen.max(axis=1) > _PADDING]
    lit = float((picture.mean(axis=1) >= _LIT).mean()) if len(picture) else 0.0
    if lit < 0.5:
        raise SiteDataError(
            ErrorCode.SLIDE_NOT_BRIGHTFIELD,
            "the slide is dark, as fluorescence pictures are; only brightfield slides are trained on",
            where=where,
            value=f"{lit:.0%} of the picture is lit",
        )
