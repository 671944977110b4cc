"""A mount that answers late, in front of `os.open` and `os.pread`: a page cache before it, and latency and throughput behind.

Run as a module it is a reading process of `pathfed_client.io.tile_workers` on such a mount; the latency comes from the environment.
"""

import os
import sys
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

from pathfed_client.io import tile_workers

PAGE = 4096
LATENCY = "PATHFED_BENCH_LATENCY_S"


class SlowMount:
    """Counts, and hands to `wait`, the seconds each read would take. Patches this process for good.

    Attributes:
        opens: files opened.
        trips: round trips to the mount.
        waited: seconds of waiting in all.
    """

    def __init__(self, *, latency_s: float, bytes_per_s: float, cache_pages: int, wait: Callable[[float], None]) -> None:
        self.opens = self.trips = 0
        self.waited = 0.0
        self.remembers = False
        self._latency, self._rate, self._most, self._wait = latency_s, bytes_per_s, cache_pages, wait
        self._pages: OrderedDict[tuple[int, int], None] = OrderedDict()
        self._remembered: dict[tuple[int, int, int], bytes] = {}
        self._open, self._pread = os.open, os.pread
        os.open, os.pread = self._slow_open, self._slow_pread  # type: ignore[assignment]

    def forget(self, *, remembers: bool, cache_pages: int) -> None:
        """Begin anew: `remembers` puts an unlimited cache that costs nothing in front, of every stretch that was ever read."""
        self._pages.clear()
        self._remembered.clear()
        self.remembers, self._most = remembers, cache_pages
        self.opens = self.trips = 0
        self.waited = 0.0

    def _slow_open(self, path: str, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        self.opens += 1
        self._spend(1, 0)
        return self._open(path, flags, mode, dir_fd=dir_fd)

    def _slow_pread(self, number: int, size: int, offset: int) -> bytes:
        file = os.fstat(number).st_ino
        if self.remembers and (file, offset, size) in self._remembered:
            return self._remembered[file, offset, size]
        runs = missing = 0
        before = False
        for page in range(offset // PAGE, (offset + max(size, 1) - 1) // PAGE + 1):
            there = (file, page) in self._pages
            runs += not there and not before
            missing += not there
            before = not there
            self._pages[file, page] = None
            self._pages.move_to_end((file, page))
        while len(self._pages) > self._most:
            self._pages.popitem(last=False)
        self._spend(runs, missing * PAGE)
        data = self._pread(number, size, offset)
        if self.remembers:
            self._remembered[file, offset, size] = data
        return data

    def _spend(self, trips: int, size: int) -> None:
        self.trips += trips
        seconds = trips * self._latency + size / self._rate
        self.waited += seconds
        self._wait(seconds)


if __name__ == "__main__":
    SlowMount(latency_s=float(os.environ[LATENCY]), bytes_per_s=1e8, cache_pages=1 << 18, wait=time.sleep)
    numbers = [int(word) for word in sys.argv[1:7]]
    tile_workers.main(numbers[0], numbers[1], numbers[2], numbers[3], numbers[4], numbers[5], [Path(word) for word in sys.argv[7:]])
