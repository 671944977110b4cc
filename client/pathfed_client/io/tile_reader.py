"""One tile after another, from open slides: the part of the tile stream that runs in a worker process.

Pixels come from the file's own compressed tiles where the scan found that to be the same (`io.direct_reader`), and through OpenSlide
otherwise. A tile that cannot be read, or is of one colour, is none: it is never filled with white.
"""

from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pathfed_client.io.direct_reader import DirectLevel, open_direct
from pathfed_client.io.openslide_reader import OpenSlideReader
from pathfed_client.io.slide_files import Folders, file_state, opened_file
from pathfed_client.slides.quality import is_flat
from pathfed_client.slides.tiling import TileGrid
from pathfed_common.errors import ErrorCode, SiteDataError


@dataclass(frozen=True)
class SlideSource:
    """A slide as it was scanned.

    Attributes:
        path: its name in the site database.
        parts: its files, see `io.site_records.SlideRecord`.
        size: bytes, over all its files.
        mtime_ns: latest modification of its files, nanoseconds since 1970 UTC.
        grid: how its tiles are read.
    """

    path: str = field(repr=False)
    parts: tuple[str, ...] = field(repr=False)
    size: int
    mtime_ns: int
    grid: TileGrid


class TileReader:
    """Reads tiles, keeping a bounded number of slides open. A context manager, for one thread."""

    def __init__(self, folders: Folders, *, open_slides: int = 16) -> None:
        """Make a reader.

        Args:
            folders: where the slides lie: one folder, or several.
            open_slides: how many slides are kept open between calls.
        """
        self._folders = folders
        self._limit = open_slides
        self._open: OrderedDict[SlideSource, DirectLevel | OpenSlideReader] = OrderedDict()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all slides. Safe to call twice."""
        while self._open:
            self._open.popitem()[1].close()

    @property
    def open_slides(self) -> int:
        """Slides open now."""
        return len(self._open)

    def drop(self, slide: SlideSource) -> None:
        """Close a slide, so that the next tile of it opens it again."""
        opened = self._open.pop(slide, None)
        if opened is not None:
            opened.close()

    def read(self, slide: SlideSource, x: int, y: int) -> NDArray[np.uint8] | None:
        """One tile.

        Args:
            slide: the slide.
            x: left edge, pixels of the grid's level.
            y: top edge, likewise.

        Returns:
            uint8 RGB (tile_px, tile_px, 3), overwritten by the next call; None where it is of one colour.

        Raises:
            SiteDataError: the slide cannot be opened (PF205), or read there (PF206).
            OSError: the slide is gone.
            ValueError: the slide has changed since it was scanned, or the place is outside it.
        """
        grid = slide.grid
        opened = self._opened(slide)
        if isinstance(opened, DirectLevel):
            pixels = opened.read(x, y, grid.crop, grid.crop, reduce=grid.reduce)
        else:
            corner = round(x * grid.downsample), round(y * grid.downsample)
            pixels = opened.read_region(*corner, grid.level, grid.crop, grid.crop)
            if grid.reduce > 1:
                pixels = np.asarray(Image.fromarray(pixels).reduce(grid.reduce))
        if len(pixels) != grid.tile_px:
            pixels = _resampled(pixels, grid.tile_px)
        return None if is_flat(pixels) else pixels

    def _opened(self, slide: SlideSource) -> DirectLevel | OpenSlideReader:
        if slide in self._open:
            self._open.move_to_end(slide)
            return self._open[slide]
        while len(self._open) >= self._limit:
            self._open.popitem(last=False)[1].close()
        opened, files = opened_file(self._folders, slide.path, slide.parts)
        state = file_state(files)
        if (state.size, state.mtime_ns) != (slide.size, slide.mtime_ns):
            raise ValueError("the slide has changed since it was scanned")
        if slide.grid.direct:
            self._open[slide] = self._direct(slide, files)
        else:
            self._open[slide] = OpenSlideReader(opened, name=slide.path, files=files)
        return self._open[slide]

    def _direct(self, slide: SlideSource, files: tuple[Path, ...]) -> DirectLevel:
        direct = open_direct(files, slide.grid.width, slide.grid.height, name=slide.path)
        if direct is None:
            raise SiteDataError(ErrorCode.SLIDE_UNOPENABLE, "the slide's own tiles are not where they were", where=slide.path)
        return direct


def _resampled(pixels: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """A filter that neither blurs nor aliases."""
    return np.asarray(Image.fromarray(pixels).resize((side, side), Image.Resampling.LANCZOS))
