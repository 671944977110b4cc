"""Base states at the site: where they arrive, and those of the last rounds, whose unchanged shards need not travel again.

    base-states/<64 hex>.safetensors   a whole file that had its digest when it was put here
    base-states/<64 hex>.manifest      what it consists of
    base-states/<64 hex>.part          what has arrived of one that is being fetched
    base-states/<64 hex>.damaged       one that was found changed; its sound shards are taken from it

All of it is public, and all of it may be deleted. A file is read whole and compared with its digest each time before it is used, and a
shard that is copied is verified like one that arrives: what a disk has changed is noticed, and only that is fetched again. For one process.
"""

import logging
import os
from contextlib import suppress
from pathlib import Path

from pathfed_common import digest
from pathfed_common.digest import Digest
from pathfed_common.errors import ErrorCode, TransportError
from pathfed_common.files import disk_error, write_atomic
from pathfed_common.part_file import PartFile, file_digest, read_piece
from pathfed_common.shards import Manifest, pieces_of

_WHOLE, _LIST, _PART, _DAMAGED = ".safetensors", ".manifest", ".part", ".damaged"
_log = logging.getLogger(__name__)


class StateCache:
    """The folder of base states."""

    def __init__(self, folder: Path, most_bytes: int) -> None:
        """Take the folder, made if it is not there, and how much earlier states may take.

        Raises:
            HostError: PF901, PF904.
        """
        self._folder, self._most = folder, most_bytes
        #: Shard -> a file that has it, and where.
        self._found: dict[Digest, tuple[Path, int, int]] = {}
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise disk_error(error, folder) from error

    def find(self, file: Digest, size: int) -> Path | None:
        """The file, read and compared now; None: it is not here, or has changed.

        Raises:
            HostError: PF904, it cannot be read or put aside.
        """
        path = self._path(file, _WHOLE)
        try:
            if not path.is_file():
                return None
            if path.stat().st_size == size and file_digest(path) == file:
                os.utime(path)
                return path
            _log.warning("a base state in %s has changed on the disk; what is damaged of it is fetched again", self._folder)
            path.replace(self._path(file, _DAMAGED))
        except OSError as error:
            raise disk_error(error, path) from error
        return None

    def part(self, manifest: Manifest) -> PartFile:
        """What has arrived of a file, to be gone on with.

        Raises:
            HostError: PF901, PF904.
        """
        self._look()
        return PartFile(self._path(manifest.file, _PART), manifest)

    def copy_shard(self, part: PartFile) -> bool:
        """Copy the next shard from a file that has it; whether there was one, and sound.

        Raises:
            HostError: PF901, PF904.
        """
        index = part.index
        start, end = part.manifest.extent(index)
        found = self._found.pop(part.manifest.shards[index], None)
        if found is None or part.here != start or found[2] - found[1] != end - start:
            return False
        path, first, last = found
        try:
            file = os.open(path, os.O_RDONLY)
        except OSError:
            return False  # swept meanwhile
        try:
            for begin, stop in pieces_of(first, last):
                part.write(read_piece(file, begin, stop))
        except (TransportError, OSError):
            return False  # changed on the disk, and PartFile has taken it back; or it cannot be read
        finally:
            os.close(file)
        self._found[part.manifest.shards[index]] = found
        return True

    def keep(self, part: PartFile) -> Path:
        """Put a file that has arrived in its place, and delete what there is no room for; where it is.

        Raises:
            TransportError: PF408, its shards are those of the manifest and yet it is another file: the manifest lied. It is deleted.
            HostError: PF901, PF904.
        """
        file, path = part.manifest.file, self._path(part.manifest.file, _PART)
        if file_digest(path) != file:
            part.close()
            path.unlink(missing_ok=True)
            raise TransportError(
                ErrorCode.BASE_STATE_MISMATCH, "the bytes that arrived are not those the offer names", value=digest.short(file)
            )
        write_atomic(self._path(file, _LIST), part.manifest.to_bytes())
        target = self._path(file, _WHOLE)
        part.finish(target)
        self._path(file, _DAMAGED).unlink(missing_ok=True)
        self.sweep(file)
        return target

    def sweep(self, file: Digest, most_bytes: int | None = None) -> bool:
        """Delete earlier states, the oldest first, until the others take no more than they may; whether any was.

        Args:
            file: the one that is kept whatever it takes.
            most_bytes: less than the usual, where room is needed.
        """
        most, present = self._most if most_bytes is None else most_bytes, _name(file)
        held: list[tuple[float, int, Path]] = []
        for path in self._folder.glob("*"):
            with suppress(OSError):
                state = path.stat()
                if path.stem != present and path.suffix in (_WHOLE, _PART, _DAMAGED):
                    held.append((state.st_mtime, state.st_size, path))
        taken, swept = 0, False
        for _, size, path in sorted(held, reverse=True):
            taken += size
            if taken > most:
                path.unlink(missing_ok=True)
                swept = True
        for path in self._folder.glob(f"*{_LIST}"):
            if path.stem != present and not path.with_suffix(_WHOLE).exists() and not path.with_suffix(_DAMAGED).exists():
                path.unlink(missing_ok=True)
        return swept

    def _look(self) -> None:
        """See which shards are here."""
        self._found.clear()
        for listed in self._folder.glob(f"*{_LIST}"):
            for path in (listed.with_suffix(_DAMAGED), listed.with_suffix(_WHOLE)):
                with suppress(OSError, ValueError):
                    manifest = Manifest.from_bytes(listed.read_bytes())
                    for index, shard in enumerate(manifest.shards if path.is_file() else ()):
                        first, last = manifest.extent(index)
                        self._found[shard] = (path, first, last)

    def _path(self, file: Digest, ending: str) -> Path:
        return self._folder / f"{_name(file)}{ending}"


def _name(file: Digest) -> str:
    return digest.parse(file).removeprefix("sha256:")
