"""Compressed tiles as a slide file holds them: what a level is made of, and how one tile becomes pixels.

A scanner cuts a level into *native tiles* and compresses each by itself, so a tile of ours that lies inside one costs one decode. The
colour space comes from the file's own tag (TIFF 6.0 section 23, DICOM PS3.3 C.7.6.3.1.2) and is told to the decoder by an Adobe marker
(Adobe Technical Note 5116, section 18), because a decoder left to guess takes RGB for YCbCr and is wrong by up to 254 levels.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

import imagecodecs
import numpy as np
import simplejpeg
from numpy.typing import NDArray

#: Longest side of a native tile that is decoded, pixels; more is a decompression bomb or a file without real tiles.
MOST_TILE_PX = 4096
#: Largest compressed native tile, bytes.
MOST_TILE_BYTES = 1 << 26
#: By how much a JPEG can be shrunk while it is decoded, on the coefficients of its 8 x 8 blocks.
REDUCTIONS = (1, 2, 4, 8)

_START, _END = b"\xff\xd8", b"\xff\xd9"
_IGNORED = frozenset([bytes([0xFF, kind]) for kind in range(0xE0, 0xF0)] + [b"\xff\xfe"])
#: JPEG 2000's start and size marks; a file of the JP2 form has boxes before them.
_SIZES, _JP2_HEAD_BYTES = b"\xff\x4f\xff\x51", 1 << 12
_ADOBE = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00"


class LayoutError(ValueError):
    """A file whose native tiles cannot be found or decoded. The slide may still be readable by OpenSlide."""


class DamagedLayoutError(LayoutError):
    """A file that contradicts itself about where its native tiles lie: whoever reads it may give one place's pixels for another's."""


class Codec(Enum):
    """How native tiles are compressed, and the colours they hold."""

    JPEG_RGB = "jpeg-rgb"
    JPEG_YCBCR = "jpeg-ycbcr"
    JPEG_2000_RGB = "jpeg2000-rgb"

    @property
    def is_jpeg(self) -> bool:
        """Whether tiles can be shrunk while they are decoded."""
        return self is not Codec.JPEG_2000_RGB


class Span(NamedTuple):
    """A native tile's bytes: from `offset` on, `size` of them; no bytes where the scanner skipped empty glass."""

    offset: int
    size: int


@dataclass(frozen=True, kw_only=True)
class NativeLevel:
    """One level as the file holds it.

    Attributes:
        width: pixels of this level.
        height: pixels of this level.
        tile_width: of a native tile, pixels; those of the last column and row may reach beyond the level.
        tile_height: of a native tile, pixels.
        codec: how native tiles are compressed.
        tables: JPEG tables shared by all tiles, a JPEG stream of its own; empty when each tile has them.
        span: finds a native tile's bytes by its number, counting rows from the top, left to right.

    Raises:
        LayoutError: a size that is not positive, or larger than any real scanner's.
    """

    width: int
    height: int
    tile_width: int
    tile_height: int
    codec: Codec
    tables: bytes = field(repr=False)
    span: Callable[[int], Span] = field(repr=False)

    def __post_init__(self) -> None:
        if not (0 < self.tile_width <= MOST_TILE_PX and 0 < self.tile_height <= MOST_TILE_PX and self.width > 0 and self.height > 0):
            raise LayoutError(f"a level of {self.width} x {self.height} in tiles of {self.tile_width} x {self.tile_height}")

    @property
    def columns(self) -> int:
        """Native tiles side by side."""
        return -(-self.width // self.tile_width)

    @property
    def rows(self) -> int:
        """Native tiles one below another."""
        return -(-self.height // self.tile_height)


class Decoder:
    """Decodes native tiles of one level. Keeps one buffer, so that nothing is allocated per tile; for one thread."""

    def __init__(self, level: NativeLevel) -> None:
        """Make a decoder.

        Raises:
            LayoutError: the shared tables are no JPEG stream.
        """
        self._level = level
        self._head = _START
        if level.codec.is_jpeg:
            self._head += _ADOBE + (b"\x01" if level.codec is Codec.JPEG_YCBCR else b"\x00") + _inner(level.tables)
        self._buffers: dict[int, NDArray[np.uint8]] = {}

    def decode(self, data: bytes, *, reduce: int = 1) -> NDArray[np.uint8]:
        """One native tile.

        Args:
            data: its bytes.
            reduce: shrink by this, one of `REDUCTIONS`; 1 for JPEG 2000.

        Returns:
            uint8 RGB (tile_height / reduce, tile_width / reduce, 3), rounded up. Overwritten by the next call with the same `reduce`.

        Raises:
            LayoutError: the bytes are damaged, or of another size than the level says.
        """
        if reduce not in REDUCTIONS or (reduce > 1 and not self._level.codec.is_jpeg):
            raise ValueError(f"reduce must be one of {REDUCTIONS}, and 1 for JPEG 2000, got {reduce}")
        try:
            return self._jpeg(data, reduce) if self._level.codec.is_jpeg else self._jpeg_2000(data)
        except (ValueError, RuntimeError) as error:
            # simplejpeg raises ValueError, imagecodecs' errors are RuntimeErrors.
            raise LayoutError(f"a native tile cannot be decoded: {error}") from error

    def _jpeg(self, data: bytes, reduce: int) -> NDArray[np.uint8]:
        if data[:2] != _START:
            raise LayoutError("no JPEG stream")
        shape = self._shape(reduce)
        buffer = self._buffers.get(reduce)
        if buffer is None:
            buffer = self._buffers[reduce] = np.empty(shape, np.uint8)
        stream = self._head + data[_marks_end(data) :]
        if reduce == 1:
            return self._checked(simplejpeg.decode_jpeg(stream, buffer=buffer), shape)
        stated = simplejpeg.decode_jpeg_header(stream)[:2]
        if stated != (self._level.tile_height, self._level.tile_width):
            raise LayoutError(f"a native tile of {stated}")
        return self._checked(simplejpeg.decode_jpeg(stream, buffer=buffer, min_height=shape[0], min_width=shape[1]), shape)

    def _jpeg_2000(self, data: bytes) -> NDArray[np.uint8]:
        _check_jpeg_2000(data, self._level.tile_width, self._level.tile_height)
        return self._checked(imagecodecs.jpeg2k_decode(data), self._shape(1))

    def _shape(self, reduce: int) -> tuple[int, int, int]:
        return -(-self._level.tile_height // reduce), -(-self._level.tile_width // reduce), 3

    def _checked(self, pixels: NDArray[np.uint8], shape: tuple[int, int, int]) -> NDArray[np.uint8]:
        if pixels.shape != shape or pixels.dtype != np.uint8:
            raise LayoutError(f"a native tile of {pixels.shape} {pixels.dtype}, expected {shape}")
        return pixels


def _check_jpeg_2000(data: bytes, width: int, height: int) -> None:
    """Refuse a codestream of another size before a decoder makes room for it, or one without its end, which decoders take for granted.

    ITU-T T.800 A.5.1 has the sizes and offsets of the image, A.4.4 the end; a byte may follow it where a file aligns its tiles.
    """
    if data[-2:] != _END and data[-3:-1] != _END:
        raise LayoutError("a native tile without an end")
    at = data.find(_SIZES, 0, _JP2_HEAD_BYTES)
    if at < 0 or len(data) < at + 24:
        raise LayoutError("no JPEG 2000 stream")
    right, bottom, left, top = struct.unpack_from(">IIII", data, at + 8)
    if (right - left, bottom - top) != (width, height):
        raise LayoutError(f"a native tile of {(bottom - top, right - left)}")


def _marks_end(data: bytes) -> int:
    """Where a JPEG stream's own application marks and comments end: one of them could contradict the file's colour tag."""
    at = len(_START)
    while (mark := data[at : at + 2]) in _IGNORED:
        at += len(mark) + int.from_bytes(data[at + 2 : at + 4], "big")
    return at


def _inner(tables: bytes) -> bytes:
    """The shared tables without their own start and end marks."""
    if not tables:
        return b""
    if tables[:2] != _START or tables[-2:] != _END:
        raise LayoutError("the shared JPEG tables are no JPEG stream")
    return tables[_marks_end(tables) : -2]
