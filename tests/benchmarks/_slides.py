"""Large slides for benchmarks, built from the compressed bytes of real tiles, without decoding or encoding a whole slide."""

import math
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import tifffile
from numpy.typing import NDArray

#: Real slides and tiles; see CONTRIBUTING.md.
DATA = Path(os.environ.get("PATHFED_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))
APERIO = DATA / "slides" / "ok" / "CMU-1-Small-Region.svs"
JPEG_2000 = DATA / "slides" / "ok" / "TCGA-CR-7395-01A-01-TS1.svs"
DICOM = DATA / "slides" / "ok" / "dicom_CMU"


def aperio_tiles() -> tuple[list[bytes], bytes]:
    """The compressed 240-px RGB tiles of a real Aperio slide that lie wholly inside it, and their shared tables."""
    with tifffile.TiffFile(APERIO) as file:
        page = file.pages[0]
        assert isinstance(page, tifffile.TiffPage)
        columns = -(-page.imagewidth // 240)
        inside = [
            index
            for index in range(len(page.dataoffsets))
            if (index % columns + 1) * 240 <= page.imagewidth and (index // columns + 1) * 240 <= page.imagelength
        ]
        data = APERIO.read_bytes()
        tiles = [data[page.dataoffsets[index] :][: page.databytecounts[index]] for index in inside]
        return tiles, bytes(page.jpegtables or b"")


def ycbcr_tiles(quality: int = 75) -> list[bytes]:
    """256-px YCbCr 4:2:0 tiles of a real slide's pixels."""
    pixels: NDArray[np.uint8] = tifffile.imread(APERIO, key=0)
    height, width = pixels.shape[:2]
    corners = [(y, x) for y in range(0, height - 256, 256) for x in range(0, width - 256, 256)]
    cut = [np.ascontiguousarray(pixels[y : y + 256, x : x + 256]) for y, x in corners]
    return [simplejpeg.encode_jpeg(tile, quality=quality, colorsubsampling="420") for tile in cut]


def write_slide(
    path: Path, tiles: Sequence[bytes], *, side: int, tile_px: int, photometric: str, tables: bytes = b"", mpp: float = 0.5
) -> None:
    """A tiled TIFF of `side` x `side` pixels whose tiles are these bytes in turn, each written again at its own place, and a small level.

    Args:
        path: where it goes.
        tiles: compressed tiles of `tile_px`.
        side: pixels, rounded up to whole tiles.
        tile_px: side of a tile.
        photometric: "rgb" or "ycbcr": what the bytes hold.
        tables: shared JPEG tables.
        mpp: um/px.
    """
    count = math.ceil(side / tile_px)
    per_cm = 10_000 / mpp
    options: dict[str, Any] = {
        "photometric": photometric,
        "compression": "jpeg",
        "resolutionunit": "CENTIMETER",
        "metadata": None,
        "dtype": np.uint8,
    }
    with tifffile.TiffWriter(path, bigtiff=True) as writer:
        writer.write(
            (tiles[index % len(tiles)] for index in range(count * count)),
            shape=(count * tile_px, count * tile_px, 3),
            tile=(tile_px, tile_px),
            jpegtables=tables or None,
            resolution=(per_cm, per_cm),
            **options,
        )
        small = simplejpeg.encode_jpeg(_thumbnail(tiles, tables, photometric, count), quality=80, colorsubsampling="444")
        shrink = count * tile_px / 512
        writer.write(
            iter([small]),
            shape=(512, 512, 3),
            tile=(512, 512),
            subfiletype=1,
            resolution=(per_cm / shrink, per_cm / shrink),
            **{**options, "photometric": "ycbcr"},
        )


def _thumbnail(tiles: Sequence[bytes], tables: bytes, photometric: str, count: int) -> NDArray[np.uint8]:
    """Each tile's mean colour at its place, 512 x 512."""
    marker = b"\xff\xee" + struct.pack(">H5sHHHB", 14, b"Adobe", 100, 0, 0, int(photometric == "ycbcr"))
    streams = [b"\xff\xd8" + marker + tables[2:-2] + tile[2:] for tile in tiles]
    colours = np.array([simplejpeg.decode_jpeg(stream).reshape(-1, 3).mean(axis=0) for stream in streams])
    grid = colours[np.arange(count * count) % len(tiles)].reshape(count, count, 3)
    place = np.arange(512) * count // 512
    return np.ascontiguousarray(grid[place][:, place].astype(np.uint8))


def whole_streams(tiles: Sequence[bytes], tables: bytes, photometric: str) -> list[bytes]:
    """JPEG streams that need no tables and state their colours: what a plain decoder takes."""
    marker = b"\xff\xee" + struct.pack(">H5sHHHB", 14, b"Adobe", 100, 0, 0, int(photometric == "ycbcr"))
    return [b"\xff\xd8" + marker + tables[2:-2] + tile[2:] for tile in tiles]
