"""Where the compressed tiles of a TIFF file lie: just enough of the format to read them without decoding anything else.

Sources: TIFF 6.0 (Adobe, 1992) sections 2, 15 and 22; BigTIFF as libtiff documents it; compressions 33003 and 33005 are Aperio's. Only the
numbers of `_Tag` are read: comments, dates, names and serial numbers are never looked at. A file may claim anything, so every number is
checked against the file's size or a bound before it is used.
"""

import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import IntEnum

from pathfed_client.slides.native import Codec, DamagedLayoutError, LayoutError, NativeLevel, Span

#: Reads that many bytes at that place of the file; fewer at its end.
ReadAt = Callable[[int, int], bytes]

_MOST_DIRECTORIES = 64
_MOST_TAGS = 512
_MOST_TABLE_BYTES = 1 << 16


class _Tag(IntEnum):
    WIDTH = 256
    LENGTH = 257
    BITS = 258
    COMPRESSION = 259
    PHOTOMETRIC = 262
    SAMPLES = 277
    PLANAR = 284
    TILE_WIDTH = 322
    TILE_LENGTH = 323
    TILE_OFFSETS = 324
    TILE_BYTES = 325
    JPEG_TABLES = 347


_WANTED = frozenset(int(tag) for tag in _Tag)
#: TIFF's unsigned number types: struct letter and size. UNDEFINED (7) holds the JPEG tables.
_TYPES: Mapping[int, tuple[str, int]] = {1: ("B", 1), 3: ("H", 2), 4: ("I", 4), 7: ("B", 1), 13: ("I", 4), 16: ("Q", 8), 18: ("Q", 8)}
_CODECS: Mapping[tuple[int, int], Codec] = {
    (7, 2): Codec.JPEG_RGB,
    (7, 6): Codec.JPEG_YCBCR,
    (33005, 2): Codec.JPEG_2000_RGB,
}


@dataclass(frozen=True)
class _Field:
    """Values of one tag, still in the file: `count` numbers of struct type `letter` from byte `at` on."""

    letter: str
    size: int
    count: int
    at: int


@dataclass(frozen=True)
class _Form:
    """Byte order and widths of a TIFF file; `big` is BigTIFF."""

    order: str
    big: bool

    def unpack(self, letters: str, data: bytes) -> tuple[int, ...]:
        try:
            values: tuple[int, ...] = struct.unpack_from(self.order + letters, data)
        except struct.error:
            raise LayoutError("the file ends within its own table of contents") from None
        return values


@dataclass(frozen=True)
class _TileTable:
    """Finds a tile's bytes by two reads; nothing is kept, for a slide may have a million tiles."""

    read_at: ReadAt = field(repr=False)
    form: _Form
    offsets: _Field
    counts: _Field

    def __call__(self, index: int) -> Span:
        if not 0 <= index < min(self.offsets.count, self.counts.count):
            raise LayoutError(f"the file has {self.offsets.count} tiles, asked for number {index}")
        return Span(self._number(self.offsets, index), self._number(self.counts, index))

    def _number(self, found: _Field, index: int) -> int:
        return self.form.unpack(found.letter, self.read_at(found.at + index * found.size, found.size))[0]


def tiff_levels(read_at: ReadAt) -> tuple[NativeLevel, ...]:
    """The tiled images of a TIFF whose tiles can be decoded alone, in the file's order.

    Images that are not tiled (thumbnail, label, macro), not 8-bit RGB or YCbCr, or compressed otherwise are passed over.

    Args:
        read_at: reads the file.

    Raises:
        LayoutError: this is no TIFF, or its table of contents is damaged.
        DamagedLayoutError: an image's tables do not have one entry for each of its tiles.
    """
    form, first = _header(read_at)
    levels = (_level(read_at, form, tags) for tags in _directories(read_at, form, first))
    return tuple(level for level in levels if level is not None)


def _header(read_at: ReadAt) -> tuple[_Form, int]:
    head = read_at(0, 16)
    order = {b"II": "<", b"MM": ">"}.get(head[:2])
    if order is None:
        raise LayoutError("not a TIFF file")
    form = _Form(order, big=False)
    version = form.unpack("H", head[2:4])[0]
    if version == 42:
        return form, form.unpack("I", head[4:8])[0]
    if version == 43 and form.unpack("HH", head[4:8]) == (8, 0):
        return _Form(order, big=True), form.unpack("Q", head[8:16])[0]
    raise LayoutError("not a TIFF file")


def _directories(read_at: ReadAt, form: _Form, first: int) -> Iterator[dict[int, _Field]]:
    seen: set[int] = set()
    at = first
    while at:
        if at in seen or len(seen) >= _MOST_DIRECTORIES:
            raise LayoutError("the file's images refer to each other in a circle, or are too many")
        seen.add(at)
        tags, at = _directory(read_at, form, at)
        yield tags


def _directory(read_at: ReadAt, form: _Form, at: int) -> tuple[dict[int, _Field], int]:
    """One image's wanted tags, and where the next image's directory lies (0 for none)."""
    head, entry, link = ("Q", 20, "Q") if form.big else ("H", 12, "I")
    head_size = struct.calcsize(head)
    (count,) = form.unpack(head, read_at(at, head_size))
    if not 0 < count <= _MOST_TAGS:
        raise LayoutError(f"an image with {count} tags")
    size = count * entry
    data = read_at(at + head_size, size + struct.calcsize(link))
    tags = {}
    for start in range(0, size, entry):
        number, kind = form.unpack("HH", data[start : start + 4])
        if number in _WANTED and kind in _TYPES:
            tags[number] = _field(form, kind, data[start + 4 : start + entry], at + head_size + start + 4)
    return tags, form.unpack(link, data[size:])[0]


def _field(form: _Form, kind: int, rest: bytes, at: int) -> _Field:
    letter, size = _TYPES[kind]
    word = "Q" if form.big else "I"
    width = struct.calcsize(word)
    count, place = form.unpack(word * 2, rest)
    return _Field(letter, size, count, at + width if count * size <= width else place)


def _level(read_at: ReadAt, form: _Form, tags: Mapping[int, _Field]) -> NativeLevel | None:
    if not {_Tag.WIDTH, _Tag.LENGTH, _Tag.TILE_WIDTH, _Tag.TILE_LENGTH, _Tag.TILE_OFFSETS, _Tag.TILE_BYTES} <= tags.keys():
        return None

    def values(tag: _Tag, default: tuple[int, ...], most: int = 8) -> tuple[int, ...]:
        found = tags.get(tag)
        if found is None:
            return default
        if not 0 < found.count <= most:
            raise LayoutError(f"tag {int(tag)} has {found.count} values")
        return form.unpack(f"{found.count}{found.letter}", read_at(found.at, found.count * found.size))

    codec = _CODECS.get((values(_Tag.COMPRESSION, (1,))[0], values(_Tag.PHOTOMETRIC, (0,))[0]))
    if codec is None or set(values(_Tag.BITS, (1,))) != {8} or values(_Tag.SAMPLES, (1,)) != (3,) or values(_Tag.PLANAR, (1,)) != (1,):
        return None
    level = NativeLevel(
        width=values(_Tag.WIDTH, ())[0],
        height=values(_Tag.LENGTH, ())[0],
        tile_width=values(_Tag.TILE_WIDTH, ())[0],
        tile_height=values(_Tag.TILE_LENGTH, ())[0],
        codec=codec,
        tables=bytes(values(_Tag.JPEG_TABLES, (), _MOST_TABLE_BYTES)),
        span=_TileTable(read_at, form, tags[_Tag.TILE_OFFSETS], tags[_Tag.TILE_BYTES]),
    )
    listed = {tags[_Tag.TILE_OFFSETS].count, tags[_Tag.TILE_BYTES].count}
    if listed != {level.columns * level.rows}:
        raise DamagedLayoutError(f"an image of {level.columns} x {level.rows} tiles lists {sorted(listed)}")
    return level
