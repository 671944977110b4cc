"""Updates that arrive: where they lie, and how they grow, in the control plane's process.

    runs/<run>/spool/round-000002/incoming/
        terms.json              how large an update of this round may be; written by the round loop before it sends an offer
        <site>.manifest         what the site has announced
        <site>.part             what is here of it
        <site>.safetensors      all of it, every shard verified; the round loop takes it from here

One update for each site and round: a site may begin another one only as long as the first is not whole. A part outlives the crash of any
process. Whose call it is and whether it may be made is decided before (`desks`); what the update is worth, by `admission`, which reads the
whole file against the signed digest.
"""

import json
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from pathfed_common import digest
from pathfed_common.digest import Digest
from pathfed_common.errors import ErrorCode, TransportError
from pathfed_common.files import disk_error, write_atomic
from pathfed_common.ids import SiteName
from pathfed_common.part_file import PartFile
from pathfed_common.shards import Manifest, Piece

_TERMS = "terms.json"
#: Uploads kept open; the one that was begun longest ago is closed first, and read again when it goes on.
_MOST_OPEN = 256


def allow(incoming: Path, most_bytes: int) -> None:
    """Let updates of a round arrive, each of so many bytes at most.

    Raises:
        HostError: PF901, PF904.
    """
    write_atomic(incoming / _TERMS, digest.canonical({"most_bytes": most_bytes}))


def arrived(incoming: Path, site: SiteName) -> Path:
    """Where a site's whole update lies; the file is there whole or not at all."""
    return incoming / f"{site}.safetensors"


def transfer_seconds(incoming: Path, site: SiteName) -> float:
    """How long a site's update was on its way, cuts and pauses included: from its announcement to its last byte."""
    with suppress(OSError):
        return max(0.0, arrived(incoming, site).stat().st_mtime - (incoming / f"{site}.manifest").stat().st_mtime)
    return 0.0


@dataclass
class _Upload:
    """One site's update of one round, as it grows."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    part: PartFile | None = None
    turn: int = 0
    end_former: Callable[[], None] = lambda: None


class Uploads:
    """The uploads of one process. Safe for several threads."""

    def __init__(self) -> None:
        """None has begun; what lies in files is taken up when its site goes on."""
        self._lock = threading.Lock()
        self._open: dict[tuple[Path, SiteName], _Upload] = {}

    def begin(self, incoming: Path, site: SiteName, manifest: Manifest) -> int:
        """Begin an upload, or take it up; how many bytes from its front are here. The same again changes nothing.

        Raises:
            TransportError: PF461, the round takes no updates, or has another one of this site whole; PF462, it is too large.
            HostError: PF901, PF904.
        """
        if manifest.size > _most_bytes(incoming):
            raise TransportError(ErrorCode.UPDATE_TOO_LARGE, "the plan's updates are smaller", where=site, value=manifest.size)
        upload = self._upload(incoming, site)
        with upload.lock:
            announced = _announced(incoming, site)
            if arrived(incoming, site).exists():
                if announced is None or announced.file != manifest.file:
                    raise TransportError(ErrorCode.UPDATE_UNWANTED, "another update of this round is here", where=site)
                return manifest.size
            if upload.part is not None and upload.part.manifest == manifest:
                return upload.part.here
            _close(upload)
            part = incoming / f"{site}.part"
            try:
                if announced != manifest:
                    part.unlink(missing_ok=True)
                    write_atomic(incoming / f"{site}.manifest", manifest.to_bytes())
            except OSError as error:
                raise disk_error(error, part) from error
            upload.part = PartFile(part, manifest)
            return self._settle(incoming, site, upload)

    def writer(self, incoming: Path, site: SiteName, file: Digest, offset: int, *, end: Callable[[], None]) -> Callable[[Piece], int]:
        """A function that takes the next piece of an upload and says how many bytes are here then.

        Args:
            incoming: the round's folder.
            site: whose update it is.
            file: digest of the whole update.
            offset: where the first piece belongs.
            end: ends the caller's stream; called when a newer one takes the upload over.

        Raises:
            TransportError: PF466, the upload has not begun, ends elsewhere, or is taken over (by the function: PF463, too).
        """
        upload = self._upload(incoming, site)
        with upload.lock:
            if upload.part is None or upload.part.manifest.file != file or upload.part.here != offset:
                raise _moved(site)
            upload.end_former()
            upload.turn, upload.end_former = upload.turn + 1, end
            turn = upload.turn

        def write(piece: Piece) -> int:
            with upload.lock:
                if upload.part is None or upload.turn != turn:
                    raise _moved(site)
                upload.part.write(piece)
                return self._settle(incoming, site, upload)

        return write

    def close(self) -> None:
        """Close what is open; the files stay."""
        with self._lock:
            uploads = list(self._open.values())
            self._open.clear()
        for upload in uploads:
            with upload.lock:
                _close(upload)

    def _upload(self, incoming: Path, site: SiteName) -> _Upload:
        with self._lock:
            upload = self._open.pop((incoming, site), None) or _Upload()
            self._open[incoming, site] = upload  # the newest is last
            oldest = next(iter(self._open)) if len(self._open) > _MOST_OPEN else None
            old = None if oldest is None else self._open.pop(oldest)
        if old is not None:
            with old.lock:
                _close(old)
        return upload

    def _settle(self, incoming: Path, site: SiteName, upload: _Upload) -> int:
        """Give an update that is whole its name; how many bytes of it are here."""
        part = upload.part
        assert part is not None, "called with an open part"  # noqa: S101
        if part.is_whole:
            part.finish(arrived(incoming, site))
            _close(upload)
            with self._lock:
                self._open.pop((incoming, site), None)
        return part.here


def _close(upload: _Upload) -> None:
    if upload.part is not None:
        upload.part.close()
        upload.part = None


def _most_bytes(incoming: Path) -> int:
    try:
        return int(json.loads((incoming / _TERMS).read_bytes())["most_bytes"])
    except (OSError, ValueError, KeyError, TypeError):
        raise TransportError(ErrorCode.UPDATE_UNWANTED, "the round takes no updates", where=incoming.parent.name) from None


def _announced(incoming: Path, site: SiteName) -> Manifest | None:
    with suppress(OSError, ValueError):
        return Manifest.from_bytes((incoming / f"{site}.manifest").read_bytes())
    return None


def _moved(site: SiteName) -> TransportError:
    return TransportError(ErrorCode.UPLOAD_MOVED, "the upload ends elsewhere, or another connection goes on with it", where=site)
