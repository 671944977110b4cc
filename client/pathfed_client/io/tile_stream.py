"""Tiles on demand: from a cohort's tile references to pixels.

Nothing is cached on the disk. A tile that cannot be read, or turns out to be of one colour, is left out and never turned white; how
many were left out is known here only, for the site's own log book.
"""

import logging
from collections import OrderedDict
from collections.abc import Sequence
from typing import Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pathfed_client.cohort.cohort import SlideId, TileRef
from pathfed_client.io.openslide_reader import OpenSlideReader
from pathfed_client.io.site_records import SlideRecord
from pathfed_client.io.site_store import SiteStore
from pathfed_client.io.slide_files import Folders, file_state, opened_file
from pathfed_client.slides.quality import is_flat
from pathfed_client.slides.tiling import scan_key
from pathfed_common.errors import SiteDataError
from pathfed_common.plan import CohortPlan

_LOG = logging.getLogger(__name__)


class TileStream:
    """Reads tiles with OpenSlide; implements `TileSource`. A context manager, for one thread.

    Equal references give equal pixels as long as the slides do not change; a slide whose size or time differs from what was scanned is
    treated as unreadable until the next scan.

    Attributes:
        left_out: tiles that were asked for and left out, since this stream was made.
    """

    def __init__(self, store: SiteStore, slides_folder: Folders, plan: CohortPlan, *, open_slides: int = 16) -> None:
        """Make a stream over the slides scanned under a plan's cohort rules.

        Args:
            store: the site database; read once, here.
            slides_folder: where the slides lie: one folder, or several.
            plan: the cohort rules.
            open_slides: how many slides are kept open between calls.
        """
        self.left_out = 0
        self._records = store.slides(scan_key(plan))
        self._folder = slides_folder
        self._px = plan.tile_px
        self._limit = open_slides
        self._open: OrderedDict[SlideId, OpenSlideReader] = OrderedDict()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all slides. Safe to call twice."""
        while self._open:
            self._open.popitem()[1].close()

    def read(self, refs: Sequence[TileRef]) -> NDArray[np.uint8]:
        """Decode tiles.

        Args:
            refs: of slides scanned under this stream's rules; each tile inside its slide.

        Returns:
            uint8 RGB (n', tile_px, tile_px, 3) in the order of `refs`, n' <= n: tiles that cannot be read are left out.
        """
        tiles = []
        for ref in refs:
            try:
                tile = self._tile(ref)
            except (SiteDataError, OSError, MemoryError, ValueError) as error:
                # Whether a site answers may not depend on one slide: a tile is left out whatever its decoder says.
                _LOG.debug("slide %d: tile left out: %s", ref.slide, error)
                self._drop(ref.slide)
                tile = None
            if tile is None:
                self.left_out += 1
            else:
                tiles.append(tile)
        return np.stack(tiles) if tiles else np.empty((0, self._px, self._px, 3), np.uint8)

    def _tile(self, ref: TileRef) -> NDArray[np.uint8] | None:
        record = self._records.get(ref.slide)
        if record is None or record.grid is None:
            raise ValueError(f"slide {ref.slide} is not of this scan")
        side = record.grid.level_px
        pixels = self._reader(ref.slide, record).read_region(ref.x, ref.y, record.grid.level, side, side)
        if side != self._px:
            pixels = np.asarray(Image.fromarray(pixels).resize((self._px, self._px), _filter(side, self._px)))
        return None if is_flat(pixels) else pixels

    def _reader(self, slide: SlideId, record: SlideRecord) -> OpenSlideReader:
        if slide in self._open:
            self._open.move_to_end(slide)
            return self._open[slide]
        opened, files = opened_file(self._folder, record.path, record.parts)
        state = file_state(files)
        if (state.size, state.mtime_ns) != (record.size, record.mtime_ns):
            raise ValueError("the slide has changed since it was scanned")
        while len(self._open) >= self._limit:
            self._open.popitem(last=False)[1].close()
        self._open[slide] = OpenSlideReader(opened, name=record.path, files=files)
        return self._open[slide]

    def _drop(self, slide: SlideId) -> None:
        reader = self._open.pop(slide, None)
        if reader is not None:
            reader.close()


def _filter(side: int, px: int) -> Image.Resampling:
    """Plain means where pixels merge in whole blocks, else a filter that neither blurs nor aliases."""
    if side < px:
        return Image.Resampling.BICUBIC
    return Image.Resampling.BOX if side % px == 0 else Image.Resampling.LANCZOS
