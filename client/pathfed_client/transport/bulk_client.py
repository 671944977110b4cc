"""The site's side of the bulk plane: one method for each call of the service `Bulk`, made once.

A call that is cut raises; what has arrived stays with the receiver, and the next call goes on from there. Who tries again, and for how
long, is `pathfed_client.bulk`'s to decide; `passes` says which errors are worth it.
"""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

import grpc

from pathfed_client.egress.entry import EgressKind
from pathfed_client.egress.outlet import Outlet
from pathfed_client.transport.channel import Calls, Patience, answer_unusable
from pathfed_common import digest, shards
from pathfed_common.digest import Digest
from pathfed_common.errors import ErrorCode, PathfedError
from pathfed_common.ids import RunName
from pathfed_common.part_file import PartFile, read_piece
from pathfed_common.protocol import control_pb2 as pb
from pathfed_common.protocol.pieces import piece_of, with_piece
from pathfed_common.shards import Manifest, pieces_of

_SERVICE = pb.DESCRIPTOR.services_by_name["Bulk"].full_name
#: Seconds after which a stream that is going well is ended and the next one begun: well before its deadline.
_SENDING_S = 80.0
#: What passes by itself, sooner or later, when the server says it.
_PASSING = frozenset(
    {
        ErrorCode.SERVER_UNREACHABLE,
        ErrorCode.RATE_LIMITED,
        ErrorCode.CONTROL_INTERNAL,
        ErrorCode.DATABASE_UNAVAILABLE,
        ErrorCode.DISK_FULL,
    }
)
#: What may have been a moment's: a certificate that was just renewed, bytes that were damaged on the way, a connection that was taken over.
_MOMENTARY = frozenset({ErrorCode.IDENTITY_REFUSED, ErrorCode.SHARD_DAMAGED, ErrorCode.UPLOAD_MOVED, ErrorCode.ANSWER_UNUSABLE})


def passes(error: PathfedError) -> bool:
    """Whether the same call will succeed later, without anybody doing anything at this site. A full disk of our own is none of these."""
    return error.code in _PASSING and isinstance(error.__cause__, grpc.RpcError)


def is_momentary(error: PathfedError) -> bool:
    """Whether the same call may succeed at once, or a few times later never."""
    return error.code in _MOMENTARY


@dataclass
class Outbound:
    """An update on its way.

    Attributes:
        path: its file.
        manifest: what it consists of.
        run: the run.
        round_index: the round.
        handed: how far its bytes were handed to the network already: what is sent again is written down again.
    """

    path: Path
    manifest: Manifest
    run: RunName
    round_index: int
    handed: int = 0


class BulkClient:
    """Calls of one site over one connection. A context manager; methods raise as `Calls.call`."""

    def __init__(self, address: str, *, ca: bytes, certificate: bytes, key: bytes, outlet: Outlet, tunnel: int | None = None) -> None:
        """Prepare the connection; arguments as for `ControlClient`."""
        credentials = grpc.ssl_channel_credentials(root_certificates=ca, private_key=key, certificate_chain=certificate)
        self._calls = Calls(address, _SERVICE, credentials, outlet=outlet, tunnel=tunnel, patience=Patience(attempts=1))
        self._address, self._outlet = address, outlet

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        del kind, error, trace
        self.close()

    def close(self) -> None:
        """Close the connection. Safe to call twice."""
        self._calls.close()

    def manifest(self, file: Digest) -> Manifest:
        """What the server says a base state consists of."""
        reply = self._calls.call("GetManifest", pb.GetManifestRequest(file=_bytes(file)), pb.GetManifestReply)
        try:
            return Manifest(file=file, size=reply.size, shards=tuple(Digest("sha256:" + shard.hex()) for shard in reply.shards))
        except ValueError as error:
            raise answer_unusable(f"the list of a file's shards: {error}", self._address) from None

    def fetch_shard(self, part: PartFile) -> None:
        """Fetch the rest of the shard at which a part ends, or as much of it as the server's time for one stream allows.

        Raises:
            TransportError: PF463, its bytes are not those that its digest names; as `Calls.call`.
            HostError: PF901, PF904: it cannot be written.
        """
        index, offset, before = part.index, part.here % shards.SHARD_BYTES, part.here
        request = pb.GetShardRequest(file=_bytes(part.manifest.file), index=index, offset=offset)
        for piece in self._calls.receive("GetShard", request, partial(piece_of, pb.GetShardReply)):
            part.write(piece)
        if part.here == before:
            raise answer_unusable("nothing comes of a shard", self._address)

    def begin(self, update: Outbound) -> int:
        """Announce an update; how many of its bytes lie at the server."""
        manifest = update.manifest
        request = pb.BeginUpdateRequest(
            run=update.run,
            round_index=update.round_index,
            file=_bytes(manifest.file),
            size=manifest.size,
            shards=[_bytes(shard) for shard in manifest.shards],
        )
        return self._place(update, self._calls.call("BeginUpdate", request, pb.BeginUpdateReply, EgressKind.UPDATE_MANIFEST).here)

    def send_shard(self, update: Outbound, here: int) -> int:
        """Send the rest of the shard at which the server's copy ends, as far as time allows; where it ends then.

        Raises:
            HostError: PF901, PF904, PF913: bytes that are sent again cannot be written down; as `Calls.call`.
            OSError: the update cannot be read.
        """
        _, end = update.manifest.extent(here // shards.SHARD_BYTES)
        file = os.open(update.path, os.O_RDONLY)
        try:
            self._write_down(update, file, here, min(end, update.handed))
            reply = self._calls.send("PutShard", _messages(update, file, here, end), pb.PutShardReply)
        finally:
            os.close(file)
        return self._place(update, reply.here)

    def _write_down(self, update: Outbound, file: int, start: int, end: int) -> None:
        """Write down that bytes are sent again which may have left before."""
        if start < end:
            told = digest.of_chunks(read_piece(file, first, last) for first, last in pieces_of(start, end))
            self._outlet.part(self._address, EgressKind.UPDATE_AGAIN, end - start, told, run=update.run, round_index=update.round_index)

    def _place(self, update: Outbound, here: int) -> int:
        if here > update.manifest.size:
            raise answer_unusable("the server says that it has more of an update than there is", self._address)
        return here


def _messages(update: Outbound, file: int, start: int, end: int) -> Iterator[bytes]:
    """The rest of a shard, piece by piece; the first names update and place."""
    until = time.monotonic() + _SENDING_S
    head = pb.PutShardRequest(run=update.run, round_index=update.round_index, file=_bytes(update.manifest.file), offset=start)
    for first, last in pieces_of(start, end):
        piece = read_piece(file, first, last)
        update.handed = max(update.handed, last)
        yield with_piece(head if first == start else pb.PutShardRequest(), piece)
        if time.monotonic() > until:
            return


def _bytes(named: Digest) -> bytes:
    return bytes.fromhex(named.removeprefix("sha256:"))
