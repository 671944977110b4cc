"""Tiles read by processes beside the trainer, ahead of their use.

Each process writes pixels into memory it shares with this one, so that they are copied once. Which pixels come out does not depend on the
number of processes. A slide that crashes or hangs its decoder costs that slide: it is not asked for again while these workers live.
"""

import mmap
import os
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pathfed_client.io.side_process import EndedError, SideProcess, serve
from pathfed_client.io.slide_files import Folders
from pathfed_client.io.tile_reader import SlideSource, TileReader
from pathfed_common.code_digest import module_command
from pathfed_common.errors import ErrorCode, HostError, SiteDataError

#: Seconds one tile may take.
TILE_TIMEOUT_S = 60.0
#: Tiles handed to a process in one message.
CHUNK = 8
#: Messages a process has at a time: one it works on, one that waits, so that it never does.
_DEPTH = 2
_MODULE = "pathfed_client.io.tile_workers"


@dataclass(frozen=True)
class TileJob:
    """One tile: its slide, and its corner (x, y) in pixels of the level it is read from."""

    slide: SlideSource
    x: int
    y: int


@dataclass(eq=False)
class _Chunk:
    """Some tiles of one order, with the place in shared memory of each."""

    jobs: Sequence[TileJob]
    slots: list[int] = field(default_factory=list)
    read: list[bool] | None = None


@dataclass(eq=False)
class _Worker:
    process: SideProcess
    number: int
    chunks: deque[_Chunk] = field(default_factory=deque)


class TileWorkers:
    """Reading processes and the memory they share. A context manager, for one thread.

    Orders are answered in the order they were made. Memory: `slots` tiles, however many are ordered.

    Attributes:
        tile_px: side of a tile, pixels.
    """

    def __init__(self, folders: Folders, tile_px: int, workers: int, *, slots: int = 128, open_slides: int = 16) -> None:
        """Start the processes.

        Args:
            folders: where the slides lie: one folder, or several.
            tile_px: side of a tile, pixels.
            workers: processes, at least 1.
            slots: tiles held at most; at least `CHUNK`.
            open_slides: slides each process keeps open.
        """
        if workers < 1 or slots < CHUNK:
            raise ValueError(f"need at least 1 worker and {CHUNK} slots, got {workers} and {slots}")
        self.tile_px = tile_px
        self._arguments = [
            str(tile_px),
            str(slots),
            str(open_slides),
            *(os.fspath(folder) for folder in ([folders] if isinstance(folders, Path) else folders)),
        ]
        self._memory = os.memfd_create("pathfed-tiles", os.MFD_CLOEXEC)
        os.ftruncate(self._memory, _bytes(tile_px, slots) + _PROGRESS * workers)
        self._tiles, self._progress = _views(self._memory, tile_px, slots)
        self._free = list(range(slots))
        self._waiting: deque[_Chunk] = deque()
        self._orders: deque[list[_Chunk]] = deque()
        self._crashed: set[SlideSource] = set()
        self._unexplained = 0
        self._workers = [self._started(number) for number in range(workers)]

    def __enter__(self) -> "TileWorkers":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes and give the memory back. Safe to call twice."""
        for worker in self._workers:
            worker.process.end()
        self._workers = []
        if self._memory >= 0:
            os.close(self._memory)
            self._memory = -1

    @property
    def is_open(self) -> bool:
        """Whether they have not been closed."""
        return self._memory >= 0

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers."""
        return [worker.process.pid for worker in self._workers]

    def order(self, jobs: Sequence[TileJob]) -> None:
        """Ask for tiles; they are read when memory and a process are free."""
        chunks = [_Chunk(jobs[start : start + CHUNK]) for start in range(0, len(jobs), CHUNK)]
        self._orders.append(chunks)
        self._waiting += chunks
        self._hand_out()

    def collect(self, into: NDArray[np.uint8] | None) -> list[bool]:
        """Wait for the oldest order.

        Args:
            into: uint8 (n, tile_px, tile_px, 3) for the n tiles that were ordered; None to drop them.

        Returns:
            For each tile whether it was read; only then its place in `into` was written.
        """
        read: list[bool] = []
        for chunk in self._orders.popleft():
            while chunk.read is None:
                self._wait()
            if into is not None:
                for place, (slot, was_read) in enumerate(zip(chunk.slots, chunk.read, strict=True), start=len(read)):
                    if was_read:
                        into[place] = self._tiles[slot]
            read += chunk.read
            self._free += chunk.slots
            self._hand_out()
        return read

    def _started(self, number: int) -> _Worker:
        self._progress[number] = _IDLE
        arguments = [str(self._memory), str(number), *self._arguments]
        return _Worker(SideProcess(module_command(_MODULE), arguments, timeout_s=TILE_TIMEOUT_S, pass_fds=[self._memory]), number)

    def _hand_out(self) -> None:
        """Give waiting chunks to the processes with the least to do, as long as there is memory for their tiles."""
        while self._waiting and len(self._free) >= len(self._waiting[0].jobs):
            worker = min(self._workers, key=lambda one: len(one.chunks))
            if len(worker.chunks) >= _DEPTH:
                return
            chunk = self._waiting.popleft()
            chunk.slots = [self._free.pop() for _ in chunk.jobs]
            self._give(worker, chunk)

    def _give(self, worker: _Worker, chunk: _Chunk) -> None:
        tasks = [None if job.slide in self._crashed else (slot, job) for slot, job in zip(chunk.slots, chunk.jobs, strict=True)]
        if not worker.chunks:
            worker.process.more_time()
        worker.chunks.append(chunk)
        worker.process.send(tasks)

    def _wait(self) -> None:
        """Take what the processes have done; replace one that ended."""
        nearest = min(worker.process.deadline for worker in self._workers)
        ends = {worker.process.connection: worker for worker in self._workers}
        told: list[Any] = wait(list(ends), timeout=max(0.0, nearest - time.monotonic()))
        for worker in [ends[end] for end in told] or list(self._workers):
            try:
                self._take(worker) if told else worker.process.check_time()
            except EndedError:
                self._replace(worker)
        self._hand_out()

    def _take(self, worker: _Worker) -> None:
        answer = worker.process.receive()
        if answer is not None:
            worker.chunks.popleft().read = answer
            worker.process.more_time()

    def _replace(self, worker: _Worker) -> None:
        """Start another process; it gets the work of the one that ended, but for the slide that ended it."""
        place = int(self._progress[worker.number])
        if place != _IDLE and worker.chunks:
            self._crashed.add(worker.chunks[0].jobs[place].slide)
        else:
            self._unexplained += 1
            if self._unexplained > _MOST_UNEXPLAINED:
                raise HostError(ErrorCode.PROCESS_ENDED, "reading processes end again and again, at no slide in particular")
        chunks, fresh = worker.chunks, self._started(worker.number)
        self._workers[self._workers.index(worker)] = fresh
        for chunk in chunks:
            self._give(fresh, chunk)


#: Bytes a process says its progress in: the place, within its chunk, of the tile it works on.
_PROGRESS = 8
_IDLE = -1
#: Endings with no tile under way after which something else than a slide must be wrong.
_MOST_UNEXPLAINED = 16


def _bytes(tile_px: int, slots: int) -> int:
    return slots * tile_px * tile_px * 3


def _views(memory: int, tile_px: int, slots: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The shared memory as tiles (slots, tile_px, tile_px, 3), and behind them one number a process."""
    mapped = mmap.mmap(memory, 0)
    size = _bytes(tile_px, slots)
    tiles = np.frombuffer(mapped, np.uint8, size).reshape(slots, tile_px, tile_px, 3)
    return tiles, np.frombuffer(mapped, np.uint8, -1, size).view(np.int64)


def main(end: int, memory: int, number: int, tile_px: int, slots: int, open_slides: int, folders: Folders) -> None:
    """A reading process."""
    tiles, progress = _views(memory, tile_px, slots)
    with TileReader(folders, open_slides=open_slides) as reader:

        def work(tasks: Sequence[tuple[int, TileJob] | None]) -> list[bool]:
            read = []
            for place, task in enumerate(tasks):
                progress[number] = place
                read.append(task is not None and read_into(tiles[task[0]], reader, task[1]))
            progress[number] = _IDLE
            return read

        serve(end, work)


def read_into(tile: NDArray[np.uint8], reader: TileReader, job: TileJob) -> bool:
    """Read one tile; false when there is none to be had.

    Whether a site answers may not depend on one slide: a tile is left out whatever its decoder says.
    """
    try:
        pixels = reader.read(job.slide, job.x, job.y)
    except (SiteDataError, OSError, MemoryError, ValueError):
        reader.drop(job.slide)
        return False
    if pixels is None:
        return False
    tile[:] = pixels
    return True


if __name__ == "__main__":
    numbers = [int(word) for word in sys.argv[1:7]]
    main(numbers[0], numbers[1], numbers[2], numbers[3], numbers[4], numbers[5], [Path(word) for word in sys.argv[7:]])
