"""A slide's tiles as bytes: one bit a source, so that a thousand million tiles are some hundred megabytes that nobody has to load.

    offset  size            what
    0       4               b"PFTM"
    4       2               version, 1
    6       1               level
    7       1               flags: 1 = pixels are decoded directly
    8       8               downsample, float64
    16      4 x 6           width, height, step, crop, reduce, tile_px, uint32
    40      4 x (rows + 1)  tiles before each row, uint32; the last is the number of tiles
    ...     rows x bytes    one bit a source, rows from the top, most significant bit first, each row on whole bytes
    end-16  16              SHA-256 of all before, its first 16 bytes

Everything is little-endian. Finding the n-th tile reads one row's count and one row's bits, wherever the map lies.
"""

import hashlib
import hmac
import struct
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from pathfed_client.slides.tiling import TileGrid

MAGIC = b"PFTM"
VERSION = 1
_HEAD = struct.Struct("<4sHBBd6I")
_CHECK_BYTES = 16
_DIRECT = 1


class DamagedMapError(ValueError):
    """Bytes that are no tile map, or not the one that was written."""


@dataclass(frozen=True, eq=False)
class TileMap:
    """The tiles of one slide, in rows from the top, left to right.

    Attributes:
        grid: how they lie.
        before: uint32 (rows + 1,), tiles before each row.
        bits: uint8 (rows, ceil(columns / 8)), one bit a source.
    """

    grid: TileGrid
    before: NDArray[np.uint32] = field(repr=False)
    bits: NDArray[np.uint8] = field(repr=False)

    def __len__(self) -> int:
        return int(self.before[-1])

    def cell(self, index: int) -> tuple[int, int]:
        """Column and row of the index-th tile's source.

        Raises:
            IndexError: there is no such tile.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"the slide has {len(self)} tiles, asked for number {index}")
        row = int(np.searchsorted(self.before, index, side="right")) - 1
        columns = np.flatnonzero(np.unpackbits(self.bits[row], count=self.grid.columns))
        return int(columns[index - int(self.before[row])]), row

    def cells(self) -> NDArray[np.bool_]:
        """Bool (rows, columns): which sources are tiles."""
        return np.unpackbits(self.bits, axis=1, count=self.grid.columns).astype(bool)

    def corners(self) -> NDArray[np.int64]:
        """Top-left (x, y) of every tile's source, level-0 pixels, int64 (n, 2)."""
        rows, columns = np.nonzero(self.cells())
        corners: NDArray[np.int64] = np.floor(np.stack([columns, rows], axis=1) * self.grid.source_side).astype(np.int64)
        return corners


def make_map(grid: TileGrid, cells: NDArray[np.bool_]) -> TileMap:
    """The map of the sources that are tiles.

    Raises:
        ValueError: `cells` is not (grid.rows, grid.columns).
    """
    if cells.shape != (grid.rows, grid.columns):
        raise ValueError(f"cells must be {(grid.rows, grid.columns)}, got {cells.shape}")
    before = np.zeros(grid.rows + 1, np.uint32)
    np.cumsum(cells.sum(axis=1), out=before[1:])
    return TileMap(grid, before, np.packbits(cells, axis=1))


def to_bytes(tiles: TileMap) -> bytes:
    """The map as bytes."""
    grid = tiles.grid
    sizes = (grid.width, grid.height, grid.step, grid.crop, grid.reduce, grid.tile_px)
    head = _HEAD.pack(MAGIC, VERSION, grid.level, _DIRECT if grid.direct else 0, grid.downsample, *sizes)
    body = head + np.ascontiguousarray(tiles.before, "<u4").tobytes() + tiles.bits.tobytes()
    return body + _check(body)


def from_bytes(data: bytes | memoryview) -> TileMap:
    """The map again; its arrays lie in `data` itself.

    Raises:
        DamagedMapError: not a map, of a later version, or changed since it was written.
    """
    view = memoryview(data)
    if len(view) < _HEAD.size + 4 + _CHECK_BYTES or view[:4] != MAGIC:
        raise DamagedMapError("not a tile map")
    body = view[:-_CHECK_BYTES]
    if not hmac.compare_digest(_check(body), bytes(view[-_CHECK_BYTES:])):
        raise DamagedMapError("the tile map was changed after it was written")
    _, version, level, flags, downsample, *sizes = _HEAD.unpack_from(body)
    if version != VERSION:
        raise DamagedMapError(f"a tile map of version {version}, this pathfed knows {VERSION}")
    width, height, step, crop, reduce, tile_px = sizes
    try:
        grid = TileGrid(
            level=level,
            downsample=downsample,
            width=width,
            height=height,
            step=step,
            crop=crop,
            reduce=reduce,
            tile_px=tile_px,
            direct=bool(flags & _DIRECT),
        )
        before = np.frombuffer(body, "<u4", grid.rows + 1, _HEAD.size)
        bits = np.frombuffer(body, np.uint8, -1, _HEAD.size + before.nbytes).reshape(grid.rows, -(-grid.columns // 8))
    except ValueError as error:
        raise DamagedMapError(f"not a tile map: {error}") from None
    return TileMap(grid, before, bits)


def _check(body: bytes | memoryview) -> bytes:
    return hashlib.sha256(body).digest()[:_CHECK_BYTES]
