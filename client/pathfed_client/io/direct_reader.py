"""Pixels straight from a slide's own compressed tiles, several times faster than compositing them through OpenSlide.

Only ever used for a level after `agrees` found it equal to OpenSlide, bit for bit, on that very slide; OpenSlide opens, validates and is
the fallback. A native tile that is missing or damaged raises: nothing is ever filled with white.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from pathfed_client.slides.dicom_layout import dicom_level
from pathfed_client.slides.dicom_series import is_dicom
from pathfed_client.slides.native import MOST_TILE_BYTES, DamagedLayoutError, Decoder, LayoutError, NativeLevel
from pathfed_client.slides.reader import SlideReader
from pathfed_client.slides.tiff_layout import tiff_levels
from pathfed_common.errors import ErrorCode, SiteDataError

#: Native tiles compared with OpenSlide before a level is trusted.
_COMPARED = 6
#: OpenSlide places pixels to 1/256 of a pixel: nearer than this to a whole one it does not interpolate.
_ALIGNED = 1 / 512
#: Largest mean difference of an interpolated tile from its own pixels, levels of 255; wrong colours or places give tens.
_CLOSE = 8.0
_DICOM_HEAD_BYTES = 132


class DirectLevel:
    """One level of one slide, opened for direct decoding. A context manager; for one thread."""

    def __init__(self, file: Path, number: int, level: NativeLevel, *, name: str) -> None:
        """Use `open_direct`.

        Args:
            file: the file that holds the level.
            number: an open file descriptor of it, owned by this object from now on.
            level: where its native tiles lie.
            name: what to call the slide in errors.
        """
        self.native = level
        self._file = file
        self._number = number
        self._name = name
        self._decoder = Decoder(level)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file. Safe to call twice."""
        if self._number >= 0:
            os.close(self._number)
            self._number = -1

    def read(self, x: int, y: int, width: int, height: int, *, reduce: int = 1) -> NDArray[np.uint8]:
        """Pixels of a rectangle of the level.

        Args:
            x: left edge, pixels of this level, a multiple of `reduce`.
            y: top edge, likewise.
            width: pixels of this level, a multiple of `reduce`; the rectangle lies inside the level.
            height: likewise.
            reduce: shrink while decoding, see `slides.native.REDUCTIONS`; native tiles' sides are multiples of 8 then.

        Returns:
            uint8 RGB (height / reduce, width / reduce, 3). May be a view of a buffer that the next call overwrites.

        Raises:
            SiteDataError: a native tile is missing or damaged (PF206).
            ValueError: the rectangle reaches outside the level, or does not fit `reduce`.
        """
        self._check(x, y, width, height, reduce)
        level = self.native
        first_column, first_row = x // level.tile_width, y // level.tile_height
        last_column, last_row = (x + width - 1) // level.tile_width, (y + height - 1) // level.tile_height
        if (first_column, first_row) == (last_column, last_row):
            return self._part(first_column, first_row, x, y, width, height, reduce)
        pixels = np.empty((height // reduce, width // reduce, 3), np.uint8)
        for row in range(first_row, last_row + 1):
            top, bottom = max(y, row * level.tile_height), min(y + height, (row + 1) * level.tile_height)
            for column in range(first_column, last_column + 1):
                left, right = max(x, column * level.tile_width), min(x + width, (column + 1) * level.tile_width)
                part = self._part(column, row, left, top, right - left, bottom - top, reduce)
                pixels[(top - y) // reduce : (bottom - y) // reduce, (left - x) // reduce : (right - x) // reduce] = part
        return pixels

    def _check(self, x: int, y: int, width: int, height: int, reduce: int) -> None:
        level = self.native
        if x < 0 or y < 0 or width < 1 or height < 1 or x + width > level.width or y + height > level.height:
            raise ValueError(f"{width} x {height} at ({x}, {y}) is not inside a level of {level.width} x {level.height}")
        if reduce > 1 and (x | y | width | height | level.tile_width | level.tile_height) % reduce:
            raise ValueError(f"{width} x {height} at ({x}, {y}) cannot be shrunk by {reduce}")

    def _part(self, column: int, row: int, x: int, y: int, width: int, height: int, reduce: int) -> NDArray[np.uint8]:
        """A rectangle inside one native tile."""
        tile = self._tile(row * self.native.columns + column, reduce)
        left, top = (x - column * self.native.tile_width) // reduce, (y - row * self.native.tile_height) // reduce
        return tile[top : top + height // reduce, left : left + width // reduce]

    def _tile(self, index: int, reduce: int) -> NDArray[np.uint8]:
        try:
            offset, size = self.native.span(index)
            if not 0 < size <= MOST_TILE_BYTES:
                raise LayoutError("a native tile has no data" if size == 0 else f"a native tile claims {size} bytes")
            return self._decoder.decode(os.pread(self._number, size, offset), reduce=reduce)
        except (LayoutError, OSError) as error:
            raise SiteDataError(
                ErrorCode.SLIDE_UNREADABLE, f"a region of the slide cannot be read: {error}", where=self._name, value=f"native tile {index}"
            ) from error


def open_direct(files: Sequence[Path], width: int, height: int, *, name: str) -> DirectLevel | None:
    """Open the level of that size for direct decoding.

    Args:
        files: all files of the slide.
        width: of the level as OpenSlide states it, pixels.
        height: of the level as OpenSlide states it, pixels.
        name: what to call the slide in errors.

    Returns:
        None where the slide has no such level in a form that is decoded directly. Nothing is left open then.

    Raises:
        SiteDataError: a file contradicts itself about where its tiles lie (PF206): OpenSlide might show them in wrong places.
    """
    for file in files:
        try:
            number = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None  # OpenSlide, which is asked next, says what is wrong
        try:
            found = next((level for level in _levels(number) if (level.width, level.height) == (width, height)), None)
            if found is not None:
                opened = DirectLevel(file, number, found, name=name)
                number = -1
                return opened
        except DamagedLayoutError as error:
            raise SiteDataError(ErrorCode.SLIDE_UNREADABLE, f"the slide contradicts itself: {error}", where=name) from error
        except (LayoutError, OSError):
            continue
        finally:
            if number >= 0:
                os.close(number)
    return None


def _levels(number: int) -> tuple[NativeLevel, ...]:
    def read_at(offset: int, size: int) -> bytes:
        if not 0 <= offset < 1 << 62 or not 0 <= size <= MOST_TILE_BYTES:
            raise LayoutError(f"the file points to byte {offset}")
        return os.pread(number, size, offset)

    if not is_dicom(read_at(0, _DICOM_HEAD_BYTES)):
        return tiff_levels(read_at)
    with open(number, "rb", closefd=False) as stream:
        level = dicom_level(stream, read_at)
    return () if level is None else (level,)


def agrees(direct: DirectLevel, reader: SlideReader, level: int) -> bool:
    """Whether direct decoding gives OpenSlide's pixels, bit for bit, on native tiles spread over the level.

    Where a level's downsample is no whole number, OpenSlide itself interpolates between pixels for most places: those are compared
    closely, and the places it does not interpolate bit for bit, the level's first native tile among them.

    Tiles that direct decoding cannot read do not count, be it that OpenSlide gives something for them: its decoder fills up damaged tiles
    without a word, ours refuses them. Half of those compared must have been equal. One that OpenSlide alone refuses means no.

    Args:
        direct: the level, opened directly.
        reader: the same slide through OpenSlide.
        level: number of the level there.
    """
    native, downsample = direct.native, reader.downsamples[level]
    compared, refused = 0, 0
    for index in np.unique(np.linspace(0, native.columns * native.rows - 1, _COMPARED).astype(int)).tolist():
        row, column = divmod(index, native.columns)
        x, y = column * native.tile_width, row * native.tile_height
        width, height = min(native.tile_width, native.width - x), min(native.tile_height, native.height - y)
        x0, y0 = round(x * downsample), round(y * downsample)
        exact = max(abs(x0 - x * downsample), abs(y0 - y * downsample)) < _ALIGNED * downsample
        if not exact:  # interpolation reaches beyond the last row and column
            width, height = max(1, width - 2), max(1, height - 2)
        ours = _pixels_or_none(direct.read, x, y, width, height)
        theirs = _pixels_or_none(reader.read_region, x0, y0, level, width, height)
        if ours is None:
            refused += theirs is not None
            continue
        if theirs is None or not _equal(ours, theirs, exact=exact):
            return False
        compared += 1
    return compared > 0 and compared >= refused


def _equal(one: NDArray[np.uint8], other: NDArray[np.uint8], *, exact: bool) -> bool:
    if exact:
        return np.array_equal(one, other)
    return float(np.abs(one.astype(np.int16) - other).mean()) <= _CLOSE


def _pixels_or_none(read: Callable[..., NDArray[np.uint8]], *region: int) -> NDArray[np.uint8] | None:
    try:
        return read(*region)
    except SiteDataError:
        return None


def trusted_level(reader: SlideReader, files: Sequence[Path], name: str, level: int) -> NativeLevel | None:
    """The native tiles of a slide's level, where decoding them directly was found to give OpenSlide's pixels.

    Args:
        reader: the slide through OpenSlide.
        files: all files of the slide.
        name: what to call the slide in errors.
        level: number of the level.
    """
    direct = open_direct(files, *reader.level_dimensions[level], name=name)
    if direct is None:
        return None
    with direct:
        return direct.native if agrees(direct, reader, level) else None
