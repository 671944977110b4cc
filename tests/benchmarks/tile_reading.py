"""Decoding: megapixels per CPU-second of OpenSlide, of direct decoding, and of the limit, on the same bytes.

    .venv/bin/python tests/benchmarks/tile_reading.py [--quick]

A slide of more than 20,000 x 20,000 pixels is built from the compressed bytes of real tiles, in two forms: 240-px RGB tiles with shared
tables, as Aperio writes them, and 256-px YCbCr 4:2:0 tiles. The limit is libjpeg-turbo (simplejpeg) decoding the same tiles, in memory and
made whole beforehand, into one buffer. JPEG 2000 and DICOM are read from real, small slides. Everything runs in one thread of one process,
in turn; what counts is CPU time.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import simplejpeg

# A script's import path holds its own folder alone; benchmarks share modules.
sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.benchmarks import _slides
from tests.benchmarks._harness import Target, arguments, finish, interleaved, machine, tell

from pathfed_client.io.direct_reader import DirectLevel, open_direct, trusted_level
from pathfed_client.io.openslide_reader import OpenSlideReader

_SIDE = 20_160
_TARGETS = {
    "aligned_of_limit_256": Target(">=", 0.85),
    "aligned_of_limit_240": Target(">=", 0.82),
    "aligned_to_openslide_256": Target(">=", 4.8),
    "aligned_to_openslide_240": Target(">=", 4.8),
    "random_to_openslide_256": Target(">=", 2.5),
    "random_to_openslide_240": Target(">=", 2.5),
}


@dataclass(frozen=True)
class Subject:
    """One slide to read: its files, the side of its native tiles, and what decoding alone takes."""

    name: str
    files: Sequence[Path]
    tile_px: int
    limit: Callable[[int], None] | None


def main() -> int:
    """Measure and print."""
    given = arguments(__doc__)
    before = machine()
    with tempfile.TemporaryDirectory(prefix="pathfed-tile-reading-") as folder, ExitStack() as stack:
        figures: dict[str, Any] = {}
        for subject in _subjects(Path(folder)):
            figures |= _measured(subject, stack, blocks=3 if given.quick else 9, tiles=150 if given.quick else 400)
    return finish("tile_reading", {**figures, "quick": given.quick, "machine_before": before}, _TARGETS)


def _subjects(folder: Path) -> list[Subject]:
    aperio, tables = _slides.aperio_tiles()
    ycbcr = _slides.ycbcr_tiles()
    tell(f"building two slides of {_SIDE} x {_SIDE} px from {len(aperio)} and {len(ycbcr)} real tiles")
    _slides.write_slide(folder / "240.tif", aperio, side=_SIDE, tile_px=240, photometric="rgb", tables=tables)
    _slides.write_slide(folder / "256.tif", ycbcr, side=_SIDE, tile_px=256, photometric="ycbcr")
    return [
        Subject("240", [folder / "240.tif"], 240, _limit(_slides.whole_streams(aperio, tables, "rgb"), 240)),
        Subject("256", [folder / "256.tif"], 256, _limit(_slides.whole_streams(ycbcr, b"", "ycbcr"), 256)),
        Subject("jpeg2000", [_slides.JPEG_2000], 256, None),
        Subject("dicom", sorted(_slides.DICOM.iterdir()), 240, None),
    ]


def _limit(streams: Sequence[bytes], side: int) -> Callable[[int], None]:
    buffer = np.empty((side, side, 3), np.uint8)

    def decode(index: int) -> None:
        simplejpeg.decode_jpeg(streams[index % len(streams)], buffer=buffer)

    return decode


def _measured(subject: Subject, stack: ExitStack, *, blocks: int, tiles: int) -> dict[str, Any]:
    plain = stack.enter_context(openslide.OpenSlide(subject.files[0]))
    if subject.limit is None:
        plain.set_cache(openslide.OpenSlideCache(0))  # a small slide would lie in the cache whole, and nothing would be decoded
    reader = stack.enter_context(OpenSlideReader(subject.files[0], name=subject.name))
    width, height = reader.dimensions
    direct = open_direct(subject.files, width, height, name=subject.name)
    if direct is None or trusted_level(reader, subject.files, subject.name, 0) is None:
        raise SystemExit(f"{subject.name} is not decoded directly: the figures would be of OpenSlide against itself")
    stack.enter_context(direct)
    sides = _sides(subject, plain, direct, tiles)
    found = interleaved(sides, blocks, lambda text: None)
    rates = {name: statistics.median(rate for block in values for rate in block) for name, values in found.items()}
    tell(f"{subject.name}: " + ", ".join(f"{name} {rate:.0f} MPix/s" for name, rate in rates.items()))
    figures = {f"mpix_per_cpu_s_{name}_{subject.name}": round(rate, 1) for name, rate in rates.items()}
    if subject.limit is not None:
        figures[f"aligned_of_limit_{subject.name}"] = round(rates["aligned"] / rates["limit"], 3)
        figures[f"half_to_whole_{subject.name}"] = round(rates["half"] / rates["aligned"], 2)
    figures[f"aligned_to_openslide_{subject.name}"] = round(rates["aligned"] / rates["openslide"], 2)
    figures[f"random_to_openslide_{subject.name}"] = round(rates["random"] / rates["openslide_random"], 2)
    return figures


def _sides(subject: Subject, plain: openslide.OpenSlide, direct: DirectLevel, tiles: int) -> dict[str, Callable[[int], list[float]]]:
    """What is compared: each reads that many squares of the native tile's side, at the same places in the same block."""
    side, (width, height) = subject.tile_px, plain.dimensions

    def places(block: int, *, aligned: bool) -> list[tuple[int, int]]:
        random = np.random.default_rng(block)
        if aligned:
            return [(int(x) * side, int(y) * side) for x, y in random.integers(0, [width // side, height // side], (tiles, 2))]
        return [(int(x), int(y)) for x, y in random.integers(0, [width - side, height - side], (tiles, 2))]

    def rate(read: Callable[[int, int], object], block: int, *, aligned: bool) -> list[float]:
        chosen = places(block, aligned=aligned)
        began = time.process_time()
        for x, y in chosen:
            read(x, y)
        return [tiles * side * side / (time.process_time() - began) / 1e6]

    def through_openslide(x: int, y: int) -> object:
        return np.asarray(plain.read_region((x, y), 0, (side, side)))[..., :3]

    def directly(x: int, y: int) -> object:
        return direct.read(x, y, side, side)

    sides: dict[str, Callable[[int], list[float]]] = {
        "openslide": lambda block: rate(through_openslide, block, aligned=True),
        "aligned": lambda block: rate(directly, block, aligned=True),
        "openslide_random": lambda block: rate(through_openslide, block, aligned=False),
        "random": lambda block: rate(directly, block, aligned=False),
    }
    limit = subject.limit
    if limit is not None:
        sides["limit"] = lambda block: rate(lambda x, y: limit(x // side + y // side), block, aligned=True)
        sides["half"] = lambda block: rate(lambda x, y: direct.read(x, y, side, side, reduce=2), block, aligned=True)
    return sides


if __name__ == "__main__":
    sys.exit(main())
