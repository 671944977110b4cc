"""The tile index: the tile maps of all slides scanned under one set of cohort rules, in one memory-mapped file.

    offset  what
    0       b"PFTILES1", then 8 zero bytes
    16      tile maps (pathfed_client.slides.tile_map), each padded to 8 bytes

Guarantees:

- maps are only ever added at the end; which bytes belong to which slide is in the site database, written after the map is on the disk.
  A scan killed in between leaves bytes that nobody refers to, never a slide without its tiles;
- each map carries its own checksum: damage costs the slides it hits, and they are read again by the next scan;
- memory: the file is mapped, so that only the pages that are touched count, and these are the operating system's to take back. A slide of
  30,000 sources is 4.5 kB; a million such slides are 4.5 GB on the disk, of which a drawn tile touches two pages.
"""

import fcntl
import mmap
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from pathfed_client.slides.tile_map import DamagedMapError, TileMap, from_bytes, to_bytes
from pathfed_common.digest import Digest, short
from pathfed_common.errors import ErrorCode, HostError
from pathfed_common.files import disk_error

MAGIC = b"PFTILES1" + bytes(8)
_ALIGN = 8
_CHECK_BYTES = 16


@dataclass(frozen=True)
class IndexEntry:
    """Where one slide's tile map lies.

    Attributes:
        offset: bytes from the beginning of the index.
        size: bytes.
        check: the map's checksum, hex: names its content.
    """

    offset: int
    size: int
    check: str


def index_file(folder: Path, scan_key: Digest) -> Path:
    """The index of one set of cohort rules."""
    return folder / f"{short(scan_key)}.tiles"


class TileIndexWriter:
    """Adds tile maps to an index. A context manager; at most one writer at a time.

    Attributes:
        path: the index.
    """

    def __init__(self, path: Path) -> None:
        """Open the index for adding, making it if it is not there; one that is no index is begun anew.

        Raises:
            HostError: another scan is adding to it (PF904), or it cannot be written (PF901, PF904).
        """
        self.path = path
        self._unsynced = False
        try:
            path.parent.mkdir(mode=0o700, exist_ok=True)
            if path.exists() and not _is_index(path):
                path.unlink()  # never cut short: a reader may have it mapped
            self._number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise disk_error(error, path) from error
        try:
            fcntl.flock(self._number, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(self._number).st_size == 0:
                self._write(MAGIC)
        except BlockingIOError:
            self.close()
            raise HostError(
                ErrorCode.HOME_UNUSABLE, "another scan of this site is running", where=path, remedy="wait for it to end"
            ) from None
        except OSError as error:
            self.close()
            raise disk_error(error, path) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file. Safe to call twice."""
        if self._number >= 0:
            os.close(self._number)
            self._number = -1

    def add(self, tiles: TileMap) -> IndexEntry:
        """Add a slide's map. It counts once `sync` has returned and its entry is in the database.

        Raises:
            HostError: the disk is full (PF901) or fails (PF904); nothing is left half-written.
        """
        data = to_bytes(tiles)
        try:
            offset = self._write(data)
        except OSError as error:
            raise disk_error(error, self.path) from error
        return IndexEntry(offset, len(data), data[-_CHECK_BYTES:].hex())

    def sync(self) -> None:
        """Flush what was added to the disk.

        Raises:
            HostError: the disk is full (PF901) or fails (PF904).
        """
        if self._unsynced:
            try:
                os.fsync(self._number)
            except OSError as error:
                raise disk_error(error, self.path) from error
            self._unsynced = False

    def _write(self, data: bytes) -> int:
        """Write at the end, padded; the place where it lies."""
        end = os.lseek(self._number, 0, os.SEEK_END)
        start = -(-end // _ALIGN) * _ALIGN
        padded = bytes(start - end) + data
        self._unsynced = True
        try:
            written = 0
            while written < len(padded):
                written += os.pwrite(self._number, memoryview(padded)[written:], end + written)
        except OSError:
            os.ftruncate(self._number, end)
            raise
        return start


class TileIndex:
    """Tile maps by their entries, from a mapped file. A context manager; safe to read from several threads."""

    def __init__(self, path: Path) -> None:
        """Map the index; one that is not there is empty.

        Raises:
            HostError: it is there and cannot be read (PF904).
        """
        self._path = path
        self._map: mmap.mmap | None = None
        self._size = 0
        self._remap()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the mapping back once no map that was read from it is in use. Safe to call twice."""
        self._map = None
        self._size = 0

    def read(self, entry: IndexEntry) -> TileMap:
        """One slide's tiles, checked; its arrays lie in the mapped file.

        Raises:
            DamagedMapError: what lies there is not what was written.
        """
        if entry.offset + entry.size > self._size:
            self._remap()
        if self._map is None or entry.offset < len(MAGIC) or entry.offset + entry.size > self._size:
            raise DamagedMapError("the tile index is shorter than it was")
        view = memoryview(self._map)[entry.offset : entry.offset + entry.size]
        if bytes(view[-_CHECK_BYTES:]).hex() != entry.check:
            raise DamagedMapError("another tile map lies there")
        return from_bytes(view)

    def _remap(self) -> None:
        """Map what is there now: a scan may have added to it."""
        try:
            with self._path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size:
                    self._map, self._size = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ), size
        except FileNotFoundError:
            return
        except OSError as error:
            raise HostError(ErrorCode.HOME_UNUSABLE, f"the tile index cannot be read: {error.strerror}", where=self._path) from error


def _is_index(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(len(MAGIC))
    return head in (b"", MAGIC)
