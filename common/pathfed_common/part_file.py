"""A file that arrives: it grows from the front, every shard is verified before it counts, and any cut can be resumed from.

Both sides receive in this way (the second place of `common` that touches a disk, see `files`). Guarantees:

- **No half file under a real name.** Bytes lie in a file of their own until every shard is verified and flushed; `finish` renames it.
- **What counts is on the disk.** A shard is flushed before `here` passes its end. After a crash or a power cut what is there is read and
  verified again: whole shards count, and of the begun one what lies there is kept, to be judged when it is whole.
- **A shard that is not what its name says is taken back**, and nothing before it.
- **Full disk**: PF901, and `here` stays where it was.
- **Constant memory**: one piece.
"""

import hashlib
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from pathfed_common import digest, shards
from pathfed_common.digest import Digest
from pathfed_common.errors import ErrorCode, TransportError
from pathfed_common.files import disk_error, sync_folder
from pathfed_common.shards import Manifest, Piece

_MODE = 0o644
#: Bytes after which the disk is told to begin with them, so that little is left to wait for where a shard is flushed.
_AHEAD_BYTES = 4 * shards.PIECE_BYTES


class PartFile:
    """The part of a file that is here. A context manager; for one thread at a time."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        """Take up what lies at `path`, or begin it; its folder must exist.

        Raises:
            HostError: the disk is full (PF901) or cannot be written (PF904).
        """
        self._path, self.manifest = path, manifest
        self._here, self._hash = 0, hashlib.sha256()
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, _MODE)
        except OSError as error:
            raise disk_error(error, path) from error
        try:
            self._take_up()
        except OSError as error:
            self.close()
            raise disk_error(error, path) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def here(self) -> int:
        """How many bytes from the front are here."""
        return self._here

    @property
    def index(self) -> int:
        """The shard that the next byte belongs to; the number of shards when all is here."""
        return len(self.manifest.shards) if self.is_whole else self._here // shards.SHARD_BYTES

    @property
    def is_whole(self) -> bool:
        """Whether every shard is here and verified."""
        return self._here == self.manifest.size

    def write(self, piece: Piece) -> None:
        """Append bytes of the shard that has begun.

        Raises:
            TransportError: PF463, the shard is whole and does not have its digest, or `piece` reaches beyond it. It is taken back.
            HostError: PF901, PF904. Nothing of the piece is kept.
        """
        if self.is_whole:
            raise _damaged(len(self.manifest.shards), "more bytes came than the file has")
        end = self._end()
        if self._here + len(piece) > end:
            self._back_to_start()
            raise _damaged((end - 1) // shards.SHARD_BYTES, "more bytes came than the shard has")
        try:
            _write(self._file, piece, self._here)
            _begin_writing_out(self._file, self._here, self._here + len(piece))
            self._hash.update(piece)
            if self._here + len(piece) == end:
                self._check_shard(end)
        except OSError as error:
            self._forget_from(self._here)
            raise disk_error(error, self._path) from error
        self._here += len(piece)
        if self._here % shards.SHARD_BYTES == 0:
            self._hash = hashlib.sha256()

    def finish(self, target: Path) -> None:
        """Give the whole file its real name, and close it. Another file of that name is replaced.

        Raises:
            ValueError: it is not whole.
            HostError: PF901, PF904.
        """
        if not self.is_whole:
            raise ValueError(f"{self._here} of {self.manifest.size} bytes are here")
        try:
            os.fsync(self._file)
            self.close()
            os.replace(self._path, target)
            sync_folder(target.parent)
        except OSError as error:
            raise disk_error(error, target) from error

    def close(self) -> None:
        """Close the file; what is here stays. Safe to call twice."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _take_up(self) -> None:
        """Read and verify what lies there."""
        found = min(os.fstat(self._file).st_size, self.manifest.size)
        while self._here < found:
            end = min(self._end(), found)
            while self._here < end:
                piece = os.pread(self._file, min(shards.PIECE_BYTES, end - self._here), self._here)
                self._hash.update(piece)
                self._here += len(piece)
            if end == self._end_of(end - 1):
                if self._found() != self.manifest.shards[(end - 1) // shards.SHARD_BYTES]:
                    self._here = (end - 1) // shards.SHARD_BYTES * shards.SHARD_BYTES
                    self._hash = hashlib.sha256()
                    break
                self._hash = hashlib.sha256()
        os.ftruncate(self._file, self._here)

    def _check_shard(self, end: int) -> None:
        index = (end - 1) // shards.SHARD_BYTES
        if self._found() != self.manifest.shards[index]:
            self._back_to_start()
            raise _damaged(index, "the bytes do not have the digest that names the shard")
        os.fsync(self._file)

    def _found(self) -> Digest:
        return Digest("sha256:" + self._hash.hexdigest())

    def _end(self) -> int:
        """Last-plus-one byte of the shard that has begun."""
        return self._end_of(min(self._here, self.manifest.size - 1))

    def _end_of(self, offset: int) -> int:
        return self.manifest.extent(offset // shards.SHARD_BYTES)[1]

    def _back_to_start(self) -> None:
        """Take back what is here of the begun shard."""
        self._forget_from(min(self._here, self.manifest.size - 1) // shards.SHARD_BYTES * shards.SHARD_BYTES)

    def _forget_from(self, place: int) -> None:
        """Cut the file off, and take up what is left of the begun shard."""
        os.ftruncate(self._file, place)
        start = place // shards.SHARD_BYTES * shards.SHARD_BYTES
        self._hash, self._here = hashlib.sha256(), start
        while self._here < place:
            piece = os.pread(self._file, min(shards.PIECE_BYTES, place - self._here), self._here)
            self._hash.update(piece)
            self._here += len(piece)


def manifest_of(path: Path) -> Manifest:
    """The manifest of a file, in one pass.

    Raises:
        ValueError: an empty file, or one that is too large.
        OSError: it cannot be read.
    """
    whole, found, size = hashlib.sha256(), [], 0
    with path.open("rb", buffering=0) as file:
        while True:
            shard, read = hashlib.sha256(), 0
            while read < shards.SHARD_BYTES and (piece := file.read(min(shards.PIECE_BYTES, shards.SHARD_BYTES - read))):
                whole.update(piece)
                shard.update(piece)
                read += len(piece)
            if not read:
                break
            found.append(_digest(shard))
            size += read
    return Manifest(file=_digest(whole), size=size, shards=tuple(found))


def file_digest(path: Path) -> Digest:
    """Digest of a file, read in pieces.

    Raises:
        OSError: it cannot be read.
    """
    return digest.of_chunks(file_pieces(path))


def file_pieces(path: Path) -> Iterator[bytes]:
    """A file's bytes, in pieces.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb", buffering=0) as file:
        while piece := file.read(shards.PIECE_BYTES):
            yield piece


def read_piece(file: int, start: int, end: int) -> bytes:
    """Bytes `start` to `end` (excluded) of an open file.

    Raises:
        OSError: it cannot be read, or is shorter.
    """
    data = os.pread(file, end - start, start)
    if len(data) != end - start:
        raise OSError(f"the file is shorter than {end} bytes")
    return data


def _digest(state: Any) -> Digest:
    return Digest("sha256:" + state.hexdigest())


def _write(file: int, data: Piece, place: int) -> None:
    left = memoryview(data)
    while left:
        written = os.pwrite(file, left, place)
        left, place = left[written:], place + written


def _begin_writing_out(file: int, start: int, end: int) -> None:
    """Have the disk begin to write what lies before `end`, once for every `_AHEAD_BYTES`; what was written from `start` on may reach it.

    Linux begins to write back a range that a program says it does not need (mm/fadvise.c), and keeps its dirty pages in memory for the
    digest that is made later. It is advice: where a system takes none, the flush does it all.
    """
    reached = end // _AHEAD_BYTES * _AHEAD_BYTES
    if start < reached:
        with suppress(OSError):
            os.posix_fadvise(file, reached - _AHEAD_BYTES, _AHEAD_BYTES, os.POSIX_FADV_DONTNEED)


def _damaged(index: int, what: str) -> TransportError:
    return TransportError(ErrorCode.SHARD_DAMAGED, what, where=f"shard {index}")
