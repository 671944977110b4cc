"""The bulk plane on the control port: base states down, updates up, shard by shard.

Whose call it is, the certificate says, as for every call of the control port; that it still stands is asked again while a stream lasts, so
that a revocation cuts it within seconds. What a site may fetch and send, `BulkDesk` decides at every call. A stream carries the rest of one
shard in pieces of 1 MiB; it ends with the shard, with its deadline, or with a message that is none of these. On a line so slow that its
deadline would cut a download, it ends before, between two pieces, and the site asks for the rest.
"""

import time
from collections.abc import Callable, Iterator
from typing import Protocol, TypeVar

from google.protobuf.message import Message

from pathfed_common import shards
from pathfed_common.digest import Digest
from pathfed_common.errors import ErrorCode, TransportError
from pathfed_common.ids import RunName, SiteName, run_name
from pathfed_common.protocol import control_pb2 as pb
from pathfed_common.protocol.pieces import piece_of, with_piece
from pathfed_common.shards import Manifest, Piece
from pathfed_server.transport.control_service import Caller, ControlDesk, known_caller, presented
from pathfed_server.transport.grpc_service import PIECE_LIMIT, Call, Door, Handler, read
from pathfed_server.transport.limits import Places, RateLimit

BULK = "pathfed.control.v1.Bulk"
_HASH_BYTES = 32
#: Largest number of a round that a database holds.
_LARGEST_ROUND = 2**31 - 1
#: Seconds after which a download that is going well is ended: what is on the way has arrived well before its deadline.
_SENDING_S = 60.0
#: Seconds between two questions whether the caller of a stream still stands.
_ASK_S = 5.0
Request = TypeVar("Request", bound=Message)


class BulkDesk(Protocol):
    """Who gives and takes bulk files. Every method may be called from several threads at once, and raises PathfedError where it refuses."""

    def manifest(self, site: SiteName, file: Digest) -> Manifest:
        """What a base state consists of.

        Raises:
            TransportError: PF460, there is none that this site may have.
        """
        ...

    def shard(self, site: SiteName, file: Digest, index: int, offset: int) -> Iterator[bytes]:
        """The rest of a shard, in pieces. Raises as `manifest`; PF416, there is no such place."""
        ...

    def begin(self, site: SiteName, run: RunName, round_index: int, manifest: Manifest) -> int:
        """Begin or take up an update's upload; how many bytes are here.

        Raises:
            TransportError: PF461, none is wanted; PF462, it is too large.
        """
        ...

    def writer(
        self, site: SiteName, run: RunName, round_index: int, file: Digest, offset: int, *, end: Callable[[], None]
    ) -> Callable[[Piece], int]:
        """What takes an upload's pieces (`rounds.uploads`).

        Raises:
            TransportError: PF461, none is wanted; PF466, it ends elsewhere.
        """
        ...


class BulkService:
    """The methods of `BULK`."""

    def __init__(self, sites: ControlDesk, desk: BulkDesk, door: Door, limit: RateLimit, places: Places) -> None:
        """Take the parts; `limit` counts calls by site, and `places` holds streams."""
        self._sites, self._desk, self._door, self._limit, self._places = sites, desk, door, limit, places

    def methods(self) -> dict[str, Handler]:
        """Every method by its name."""
        return {
            "GetManifest": self._door.method(pb.GetManifestRequest, self._manifest),
            "GetShard": self._door.download(pb.GetShardRequest, self._shard),
            "BeginUpdate": self._door.method(pb.BeginUpdateRequest, self._begin),
            "PutShard": self._door.upload(pb.PutShardRequest, self._put),
        }

    def _manifest(self, call: Call, request: pb.GetManifestRequest) -> pb.GetManifestReply:
        found = self._desk.manifest(self._caller(call).site, _digest(request.file))
        return pb.GetManifestReply(size=found.size, shards=[bytes.fromhex(shard.removeprefix("sha256:")) for shard in found.shards])

    def _shard(self, call: Call, request: pb.GetShardRequest) -> Iterator[bytes]:
        caller = self._caller(call)
        pieces = self._desk.shard(caller.site, _digest(request.file), request.index, request.offset)
        stands, until = self._standing(call), time.monotonic() + _SENDING_S
        with self._places.taken(caller.site):
            for piece in pieces:
                stands()
                yield with_piece(pb.GetShardReply(), piece)
                if time.monotonic() > until:
                    return

    def _begin(self, call: Call, request: pb.BeginUpdateRequest) -> pb.BeginUpdateReply:
        caller = self._caller(call)
        run, round_index, file = _round_of(request)
        try:
            manifest = Manifest(file=file, size=request.size, shards=tuple(map(_digest, request.shards)))
        except ValueError:
            raise TransportError(ErrorCode.UPDATE_TOO_LARGE, "no file has these shards", value=caller.site) from None
        return pb.BeginUpdateReply(here=self._desk.begin(caller.site, run, round_index, manifest))

    def _put(self, call: Call, messages: Iterator[bytes], end: Callable[[], None]) -> pb.PutShardReply:
        caller = self._caller(call)
        with self._places.taken(caller.site):
            data = next(messages, None)
            if data is None:
                raise _refused("an upload names what it is of")
            first = read(pb.PutShardRequest.FromString, data, PIECE_LIMIT)
            write = self._desk.writer(caller.site, *_round_of(first), first.offset, end=end)
            return pb.PutShardReply(here=_take(write, first, messages, self._standing(call)))

    def _caller(self, call: Call) -> Caller:
        return known_caller(self._sites, self._limit, call)

    def _standing(self, call: Call) -> Callable[[], None]:
        """A function that asks now and then whether the caller still stands, and raises where it does not."""
        asked = time.monotonic()

        def ask() -> None:
            nonlocal asked
            if time.monotonic() - asked > _ASK_S:
                self._sites.caller(presented(call.certificate, self._sites.consortium))
                asked = time.monotonic()

        return ask


def _take(write: Callable[[Piece], int], first: pb.PutShardRequest, messages: Iterator[bytes], stands: Callable[[], None]) -> int:
    """Take one stream's pieces; how many bytes of the update are here then.

    Every piece but the last is of full size: who cuts a file into tiny messages is turned away.
    """
    left = shards.SHARD_BYTES - first.offset % shards.SHARD_BYTES
    here = first.offset
    piece: Piece = first.piece
    while True:
        if not 0 < len(piece) <= min(left, shards.PIECE_BYTES):
            raise _refused(f"a piece has 1 to {shards.PIECE_BYTES} bytes and ends with its shard")
        stands()
        here, left = write(piece), left - len(piece)
        following = next(messages, None)
        if following is None:
            return here
        if left == 0 or len(piece) != shards.PIECE_BYTES:
            raise _refused("a stream ends with its shard, and all but its last piece are of full size")
        piece = read(_piece, following, PIECE_LIMIT)


def _piece(data: bytes) -> Piece:
    return piece_of(pb.PutShardRequest, data)


def _round_of(request: pb.BeginUpdateRequest | pb.PutShardRequest) -> tuple[RunName, int, Digest]:
    """Run, round and update that a message names."""
    try:
        run = run_name(request.run)
    except ValueError:
        raise _refused("the name of a run is needed") from None
    if not 1 <= request.round_index <= _LARGEST_ROUND:
        raise _refused(f"rounds are 1 to {_LARGEST_ROUND}")
    return run, request.round_index, _digest(request.file)


def _digest(data: bytes) -> Digest:
    if len(data) != _HASH_BYTES:
        raise _refused(f"a digest has {_HASH_BYTES} bytes")
    return Digest("sha256:" + data.hex())


def _refused(what: str) -> TransportError:
    return TransportError(ErrorCode.REQUEST_REFUSED, what)
