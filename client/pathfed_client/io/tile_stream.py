"""Tiles on demand: from a cohort's tile references to pixels.

A tile that cannot be read, or turns out to be of one colour, is left out and never turned white; how many were left out is known here
only, for the site's own log book. With workers (`io.tile_workers`), tiles that were announced are read ahead; which tiles come out, and in
which order, is the same without.
"""

import logging
from collections import deque
from collections.abc import Sequence
from typing import Self

import numpy as np
from numpy.typing import NDArray

from pathfed_client.cohort.cohort import SlideId, TileRef
from pathfed_client.io.site_records import SlideRecord
from pathfed_client.io.site_store import SiteStore
from pathfed_client.io.slide_files import Folders
from pathfed_client.io.tile_index import TileIndex, index_file
from pathfed_client.io.tile_reader import SlideSource, TileReader
from pathfed_client.io.tile_workers import TileJob, TileWorkers, read_into
from pathfed_client.slides.tiling import scan_key
from pathfed_common.errors import HostError
from pathfed_common.plan import CohortPlan

_LOG = logging.getLogger(__name__)
#: Orders under way ahead of the one that is used; the workers' memory bounds how many tiles that is.
_AHEAD = 32
#: Slides whose rows are remembered.
_KNOWN = 10_000


class TileStream:
    """Reads tiles; implements `TileSource`. A context manager, for one thread.

    Equal references give equal pixels as long as the slides do not change; a slide whose size or time differs from what was scanned is
    treated as unreadable until the next scan.

    Attributes:
        left_out: tiles that were asked for and left out, since this stream was made.
    """

    def __init__(
        self, store: SiteStore, slides_folder: Folders, plan: CohortPlan, *, workers: TileWorkers | None = None, open_slides: int = 16
    ) -> None:
        """Make a stream over the slides scanned under a plan's cohort rules.

        Args:
            store: the site database; asked for slides when their tiles are.
            slides_folder: where the slides lie: one folder, or several.
            plan: the cohort rules.
            workers: processes that read, for tiles of `plan.tile_px`; the caller's, who closes them. None: this process reads.
            open_slides: how many slides this process keeps open between calls.
        """
        key = scan_key(plan)
        self.left_out = 0
        self._store = store
        self._key = key
        self._records: dict[SlideId, SlideRecord] = {}
        self._index = TileIndex(index_file(store.tile_folder, key))
        self._px = plan.tile_px
        self._reader = TileReader(slides_folder, open_slides=open_slides)
        self._workers = workers
        self._expected: deque[tuple[TileRef, ...]] = deque()
        self._ordered: deque[tuple[TileRef, ...]] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all slides; the workers are left alone. Safe to call twice."""
        self._drop_orders()
        self._reader.close()
        self._index.close()

    def expect(self, batches: Sequence[Sequence[TileRef]]) -> None:
        """Announce what `read` will be asked for, in this order, so that workers read ahead. Replaces what was announced before."""
        self._drop_orders()
        self._expected = deque(tuple(refs) for refs in batches)
        try:
            self._order_ahead()
        except HostError as error:
            self._do_without_workers(error)

    def read(self, refs: Sequence[TileRef]) -> NDArray[np.uint8]:
        """Decode tiles.

        Args:
            refs: of slides scanned under this stream's rules.

        Returns:
            uint8 RGB (n', tile_px, tile_px, 3) in the order of `refs`, n' <= n: tiles that cannot be read are left out.
        """
        tiles = np.empty((len(refs), self._px, self._px, 3), np.uint8)
        was_read = self._read_into(tiles, tuple(refs))
        kept: NDArray[np.uint8] = tiles[: len(was_read)][np.array(was_read, bool)]
        self.left_out += len(refs) - len(kept)
        return kept

    def _read_into(self, tiles: NDArray[np.uint8], refs: tuple[TileRef, ...]) -> list[bool]:
        """Read into the first places of `tiles`: whether each was read."""
        if self._workers is not None:
            try:
                return self._collected(self._workers, tiles, refs)
            except HostError as error:
                self._do_without_workers(error)
        return [read_into(tile, self._reader, job) for tile, job in zip(tiles, self._jobs(refs), strict=False)]

    def _collected(self, workers: TileWorkers, tiles: NDArray[np.uint8], refs: tuple[TileRef, ...]) -> list[bool]:
        while self._ordered and self._ordered[0] != refs:  # announced, and then not asked for
            self._ordered.popleft()
            workers.collect(None)
        if not self._ordered:
            workers.order(self._jobs(refs))
            self._ordered.append(refs)
        self._ordered.popleft()
        was_read = workers.collect(tiles)
        self._order_ahead()
        return was_read

    def _order_ahead(self) -> None:
        while self._workers is not None and self._expected and len(self._ordered) < _AHEAD:
            refs = self._expected.popleft()
            self._workers.order(self._jobs(refs))
            self._ordered.append(refs)

    def _drop_orders(self) -> None:
        self._expected.clear()
        try:
            while self._workers is not None and self._ordered:
                self._ordered.popleft()
                self._workers.collect(None)
        except HostError as error:
            self._do_without_workers(error)

    def _do_without_workers(self, error: HostError) -> None:
        """No process can be started any more. Whether a site answers may not depend on that: this process reads."""
        _LOG.warning("tiles are read without worker processes: %s", error.what)
        if self._workers is not None:
            self._workers.close()
        self._workers = None
        self._expected.clear()
        self._ordered.clear()

    def _jobs(self, refs: Sequence[TileRef]) -> list[TileJob]:
        """What there is to read: references that the index does not hold, or holds damaged, are left out here already."""
        self._look_up({ref.slide for ref in refs})
        jobs = []
        for ref in refs:
            try:
                jobs.append(self._job(ref))
            except (ValueError, IndexError) as error:
                _LOG.debug("slide %d: tile left out: %s", ref.slide, error)
        return jobs

    def _look_up(self, slides: set[SlideId]) -> None:
        """Know these slides; at most `_KNOWN` and these are known at a time, however many the site has."""
        if len(self._records) > _KNOWN:
            self._records = {number: record for number, record in self._records.items() if number in slides}
        unknown = slides - self._records.keys()
        if unknown:
            self._records |= self._store.slides_of(unknown)

    def _job(self, ref: TileRef) -> TileJob:
        record = self._records.get(ref.slide)
        if record is None or record.tiles is None or record.scan_key != self._key:
            raise ValueError(f"slide {ref.slide} is not of this scan")
        tiles = self._index.read(record.tiles)
        place = tiles.grid.place(*tiles.cell(ref.tile), ref.across, ref.down)
        return TileJob(SlideSource(record.path, record.parts, record.size, record.mtime_ns, tiles.grid), *place)
