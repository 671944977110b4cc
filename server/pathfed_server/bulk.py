"""What the bulk plane gives and takes, from the home's files and the database: the other side of `transport.bulk_service`."""

import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path

from pathfed_common import digest
from pathfed_common.digest import Digest
from pathfed_common.errors import ErrorCode, TransportError
from pathfed_common.ids import RunName, SiteName
from pathfed_common.part_file import manifest_of, read_piece
from pathfed_common.shards import Manifest, Piece, pieces_of
from pathfed_server.db.sql_store import SqlStore
from pathfed_server.home import ServerHome
from pathfed_server.rounds.files import RunFiles
from pathfed_server.rounds.uploads import Uploads

_log = logging.getLogger(__name__)
#: Manifests remembered: of the states that sites ask for now.
_MOST_MANIFESTS = 64


class BulkFiles:
    """Implements `BulkDesk`."""

    def __init__(self, home: ServerHome, store: SqlStore) -> None:
        """Take a home and its open store."""
        self._home, self._store = home, store
        self._uploads = Uploads()
        self._manifests: OrderedDict[Digest, Manifest] = OrderedDict()
        self._lock = threading.Lock()
        self._reading: dict[Digest, threading.Lock] = {}

    def manifest(self, site: SiteName, file: Digest) -> Manifest:
        """See `BulkDesk`. The file is read for it once, by whoever asks first; the others wait."""
        path = self._state(site, file)
        with self._lock:
            reading = self._reading.setdefault(file, threading.Lock())
        with reading:
            with self._lock:
                known = self._manifests.get(file)
            if known is None:
                known = self._read(path, file)
                with self._lock:
                    self._manifests[file] = known
                    while len(self._manifests) > _MOST_MANIFESTS:
                        self._reading.pop(self._manifests.popitem(last=False)[0], None)
        return known

    def shard(self, site: SiteName, file: Digest, index: int, offset: int) -> Iterator[bytes]:
        """See `BulkDesk`."""
        manifest = self.manifest(site, file)
        try:
            start, end = manifest.extent(index)
        except ValueError:
            start, end = 0, 0
        if not 0 <= offset < end - start:
            raise TransportError(ErrorCode.REQUEST_REFUSED, "the file has no such place", where=site)
        return _pieces(self._state(site, file), start + offset, end)

    def begin(self, site: SiteName, run: RunName, round_index: int, manifest: Manifest) -> int:
        """See `BulkDesk`."""
        return self._uploads.begin(self._wanted(site, run, round_index), site, manifest)

    def writer(
        self, site: SiteName, run: RunName, round_index: int, file: Digest, offset: int, *, end: Callable[[], None]
    ) -> Callable[[Piece], int]:
        """See `BulkDesk`."""
        return self._uploads.writer(self._wanted(site, run, round_index), site, file, offset, end=end)

    def close(self) -> None:
        """Close uploads in hand; what is here of them stays."""
        self._uploads.close()

    def _wanted(self, site: SiteName, run: RunName, round_index: int) -> Path:
        """Folder for the site's update of a round that it is asked for."""
        if not self._store.update_wanted(site, run, round_index):
            raise TransportError(ErrorCode.UPDATE_UNWANTED, "the site is not asked, or is done", where=site, value=round_index)
        return RunFiles(self._home.root, run).incoming(round_index)

    def _state(self, site: SiteName, file: Digest) -> Path:
        found = self._store.base_state(site, file)
        path = None if found is None else self._home.root / found[0]
        if path is None or not path.is_file():
            if path is not None:
                _log.error("%s a state's file is missing: %s", ErrorCode.FILE_NOT_OFFERED.value, path)
            raise TransportError(ErrorCode.FILE_NOT_OFFERED, "no such state for this site", where=site, value=digest.short(file))
        return path

    @staticmethod
    def _read(path: Path, file: Digest) -> Manifest:
        found = manifest_of(path)
        if found.file != file:
            _log.error("%s a state's file has changed: %s", ErrorCode.FILE_NOT_OFFERED.value, path)
            raise TransportError(ErrorCode.FILE_NOT_OFFERED, "the state's file has changed", where=path)
        return found


def _pieces(path: Path, start: int, end: int) -> Iterator[bytes]:
    file = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(file, start, end - start, os.POSIX_FADV_SEQUENTIAL)
        for first, last in pieces_of(start, end):
            yield read_piece(file, first, last)
    finally:
        os.close(file)
