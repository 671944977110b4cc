"""Damaged copies of slides, and what a site makes of them: scanned, and every tile read that the scan says is there."""

import contextlib
import csv
import io
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import numpy as np
import tifffile
from numpy.typing import NDArray

from pathfed_client.cohort.cohort import TileRef
from pathfed_client.io.direct_reader import open_direct
from pathfed_client.io.openslide_reader import OpenSlideReader
from pathfed_client.io.scan import scan
from pathfed_client.io.scan_report import CohortEmptyError, ScanReport
from pathfed_client.io.site_store import SiteStore
from pathfed_client.io.slide_files import file_state
from pathfed_client.io.tile_index import TileIndex, index_file
from pathfed_client.io.tile_reader import SlideSource, TileReader
from pathfed_client.io.tile_stream import TileStream
from pathfed_client.io.tile_workers import TileJob, read_into
from pathfed_client.slides.tiling import scan_key, tile_grid
from pathfed_common.errors import ErrorCode, PathfedError
from pathfed_common.plan import CohortPlan, QualityPlan
from pathfed_common.units import Mpp

#: Tiles of this plan are read as they lie at 0.5 um/px: no resampling, so that pixels can be compared. Many tiles count as tissue.
PLAN = CohortPlan(mpp=0.5, tile_px=112, play_px=0, tissue_share=0.05, quality=QualityPlan(min_sharpness=0.0))


@dataclass(frozen=True, eq=False)
class Original:
    """An undamaged slide.

    Attributes:
        name: its file's name.
        data: the file that is damaged.
        pixels: level 0 as OpenSlide reads it, uint8 RGB (height, width, 3).
        tiles: byte range (start, end) of each native tile of level 0.
        beside: further files of the slide, by name.
    """

    name: str
    data: bytes = field(repr=False)
    pixels: NDArray[np.uint8] = field(repr=False)
    tiles: tuple[tuple[int, int], ...] = field(repr=False)
    tile_size: tuple[int, int]
    beside: dict[str, bytes] = field(default_factory=dict, repr=False)

    def write(self, folder: Path, data: bytes | None = None) -> Path:
        """Write a copy, whose bytes may be others; its file's time is always the same."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in {**self.beside, self.name: self.data if data is None else data}.items():
            (folder / name).write_bytes(content)
            os.utime(folder / name, ns=(10**18, 10**18))
        return folder / self.name


def original(name: str, data: bytes, scratch: Path, beside: dict[str, bytes] | None = None) -> Original:
    """Read a slide as it is before it is damaged."""
    bare = Original(name, data, np.empty((0, 0, 3), np.uint8), (), (0, 0), beside or {})
    file = bare.write(scratch)
    with OpenSlideReader(file, name=name) as reader:
        width, height = reader.dimensions
        pixels = reader.read_region(0, 0, 0, width, height)
        direct = open_direct([file], width, height, name=name)
    assert direct is not None, "the copies are made of slides whose own tiles can be found"
    with direct:
        native = direct.native
        spans = [native.span(index) for index in range(native.columns * native.rows)]
    places = tuple((span.offset, span.offset + span.size) for span in spans)
    return Original(name, data, pixels, places, (native.tile_width, native.tile_height), beside or {})


@dataclass(frozen=True, eq=False)
class Found:
    """What a site made of one slide.

    Attributes:
        code: why it is not used, or None.
        tiles: the tiles that the stream delivered, by their corner (x, y) in level-0 pixels.
        counted: how many tiles the scan counted.
    """

    code: ErrorCode | None
    tiles: dict[tuple[int, int], NDArray[np.uint8]]
    counted: int = 0

    def differing(self, true: NDArray[np.uint8]) -> list[tuple[int, int]]:
        """Corners of delivered tiles that are not what the undamaged slide shows there."""
        return [(x, y) for (x, y), tile in self.tiles.items() if not np.array_equal(tile, true[y : y + len(tile), x : x + tile.shape[1]])]


class Site:
    """A site of one slide, for one plan. A context manager; `scan` and `tiles` may be apart, so that damage can come in between."""

    def __init__(self, home: Path, plan: CohortPlan = PLAN) -> None:
        home.mkdir(parents=True, exist_ok=True)
        self.home, self.plan = home, plan
        self.slides = home / "slides"
        self._stack = contextlib.ExitStack()
        self.store = self._stack.enter_context(SiteStore(home / "site.db"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def scan(self, name: str) -> ErrorCode | None:
        """Scan with the one slide listed; its code."""
        with (self.home / "patients.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("slide", "patient"), (name, "P")])
        try:
            report: ScanReport = scan(self.store, self.slides, self.home / "patients.csv", self.plan, bytes(32), now=0.0)
        except CohortEmptyError as empty:
            report = empty.report
        except PathfedError as error:
            return error.code
        return next((slide.reason for slide in report.slides if slide.path.rpartition("/")[2] == name), ErrorCode.SLIDE_FOLDER_EMPTY)

    def tiles(self) -> dict[tuple[int, int], NDArray[np.uint8]]:
        """Every tile that the stream delivers, by its level-0 corner."""
        found: dict[tuple[int, int], NDArray[np.uint8]] = {}
        cohort = self.store.cohort(scan_key(self.plan))
        with TileStream(self.store, self.slides, self.plan) as stream:
            for patient in cohort.patients:
                for number in range(patient.tile_count):
                    ref = patient.tile(number)
                    tiles = stream.read([ref])
                    if len(tiles):
                        found[self._corner(ref)] = tiles[0].copy()
        return found

    def _corner(self, ref: TileRef) -> tuple[int, int]:
        record = self.store.slides(scan_key(self.plan))[ref.slide]
        assert record.tiles is not None
        with TileIndex(index_file(self.store.tile_folder, scan_key(self.plan))) as index:
            tiles = index.read(record.tiles)
            x, y = tiles.grid.place(*tiles.cell(ref.tile), ref.across, ref.down)
            return round(x * tiles.grid.downsample), round(y * tiles.grid.downsample)


def found(home: Path, slide: Original, data: bytes) -> Found:
    """Scan a damaged copy and read all its tiles."""
    with Site(home) as site:
        slide.write(site.slides, data)
        code = site.scan(slide.name)
        return Found(code, site.tiles())


class Tiles:
    """The tiles of one slide as a worker reads them, on a grid laid when the slide was whole: damage that came after the scan."""

    def __init__(self, slide: Original, folder: Path, plan: CohortPlan = PLAN) -> None:
        self._slide, self._folder = slide, folder
        file = slide.write(folder)
        height, width = slide.pixels.shape[:2]
        direct = open_direct([file], width, height, name=slide.name)
        assert direct is not None
        with direct:
            self.grid = tile_grid(slide_mpp=Mpp(0.5), level=0, downsample=1.0, size=(width, height), plan=plan, native=direct.native)
        assert self.grid.direct
        side = self.grid.crop
        self.places = [(x, y) for y in range(0, height - side + 1, side) for x in range(0, width - side + 1, side)]

    def read(self, data: bytes, places: Sequence[tuple[int, int]] | None = None) -> Found:
        """Put other bytes in the file's place, its time unchanged, and read tiles by their corners."""
        file = self._slide.write(self._folder, data)
        state = file_state([file])
        source = SlideSource(file.name, (), state.size, state.mtime_ns, self.grid)
        tile = np.empty((self.grid.tile_px, self.grid.tile_px, 3), np.uint8)
        with TileReader(self._folder) as reader:
            read = {place: tile.copy() for place in places or self.places if read_into(tile, reader, TileJob(source, *place))}
        return Found(None, read)

    def touching(self, number: int) -> list[tuple[int, int]]:
        """Corners of the tiles that need a native tile."""
        wide, high = self._slide.tile_size
        columns = -(-self._slide.pixels.shape[1] // wide)
        left, top, side = number % columns * wide, number // columns * high, self.grid.crop
        return [(x, y) for x, y in self.places if left - side < x < left + wide and top - side < y < top + high]


def tag_places(data: bytes, *names: str) -> set[int]:
    """Bytes of a TIFF that state these tags: their entries in the directory and their values, of every image."""
    places: set[int] = set()
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        for page in file.pages:
            assert isinstance(page, tifffile.TiffPage)
            for tag in page.tags:
                if tag.name in names:
                    places |= {*range(tag.offset, tag.offset + 12), *range(tag.valueoffset, tag.valueoffset + tag.valuebytecount)}
    return places


def contents_places(data: bytes) -> list[int]:
    """Bytes of a TIFF outside every tile: header, directories and tables."""
    outside = bytearray(b"\1" * len(data))
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        for page in file.pages:
            assert isinstance(page, tifffile.TiffPage)
            for start, size in zip(page.dataoffsets, page.databytecounts, strict=True):
                outside[start : start + size] = bytes(size)
    return [place for place, free in enumerate(outside) if free]


def with_tag(data: bytes, name: str, value: int, *, entry: str = "value", page: int = 0) -> bytes:
    """A classic little-endian TIFF with one number of a tag changed: its first value, its count, or the place it points to."""
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        found = file.pages[page]
        assert isinstance(found, tifffile.TiffPage)
        tag = found.tags[name]
        short = entry == "value" and int(tag.dtype) == 3
        at = {"value": tag.valueoffset, "count": tag.offset + 4, "place": tag.offset + 8}[entry]
    changed = bytearray(data)
    struct.pack_into("<H" if short else "<I", changed, at, value)
    return bytes(changed)


def flipped(data: bytes, place: int, bit: int) -> bytes:
    """One bit changed."""
    changed = bytearray(data)
    changed[place] ^= 1 << bit
    return bytes(changed)


def overwritten(data: bytes, place: int, by: bytes) -> bytes:
    """Some bytes changed; what would reach beyond the end is dropped."""
    return (data[:place] + by + data[place + len(by) :])[: len(data)]


def jpeg_claiming(tile: bytes, width: int, height: int) -> bytes:
    """A JPEG stream whose frame header states another size."""
    at = tile.find(b"\xff\xc0")
    assert at > 0
    return overwritten(tile, at + 5, struct.pack(">HH", height, width))
