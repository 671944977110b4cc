"""What a site that means no good may send to the bulk plane, over real gRPC: a code is the answer, and no file is the worse for it."""

import hashlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from bulk_world import Run
from control_peer import Peer, call, code_of, control_channel
from google.protobuf.message import Message
from real_control import RealServer

from pathfed_common import digest, shards
from pathfed_common.error_catalog import CATALOG
from pathfed_common.errors import ErrorCode
from pathfed_common.ids import SiteName
from pathfed_common.protocol import control_pb2 as pb
from pathfed_server import app, members
from pathfed_server.db.sql_store import SqlStore
from pathfed_server.rounds import uploads
from pathfed_server.transport import bulk_service
from pathfed_server.transport.limits import Places

SHARD, PIECE = 64 * 1024, 8 * 1024
UPDATE = os.urandom(2 * SHARD + 100)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", SHARD)
    monkeypatch.setattr(shards, "PIECE_BYTES", PIECE)


@pytest.fixture
def run(serving, store: SqlStore, enrolled, plan_file) -> Run:
    """A run of two sites whose first round is open."""
    north, south = enrolled("north"), enrolled("south")
    made = app.publish_plan(serving.root, plan_file, plan_file.with_suffix(".dsse"))
    begun = Run.begin(RealServer(serving, store), "attacked", made, ["north", "south"], os.urandom(SHARD), most_bytes=len(UPDATE))
    begun.peers = {"north": north, "south": south}  # type: ignore[attr-defined]
    return begun


@pytest.fixture
def channel(serving, run) -> Iterator[grpc.Channel]:
    with control_channel(serving, peer_of(run, "north")) as opened:
        yield opened


def peer_of(run: Run, name: str) -> Peer:
    return run.peers[name]  # type: ignore[attr-defined]


def sha(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def announced(data: bytes = UPDATE, **changes: Any) -> pb.BeginUpdateRequest:
    parts = [sha(data[at : at + SHARD]) for at in range(0, len(data), SHARD)]
    values: dict[str, Any] = {"run": "attacked", "round_index": 1, "file": sha(data), "size": len(data), "shards": parts}
    return pb.BeginUpdateRequest(**{**values, **changes})


def pieces(data: bytes = UPDATE, start: int = 0, stop: int = SHARD, file: bytes | None = None, **changes: Any) -> list[pb.PutShardRequest]:
    parts = [data[at : min(at + PIECE, stop)] for at in range(start, stop, PIECE)]
    named = file or sha(data)
    first = pb.PutShardRequest(**{"run": "attacked", "round_index": 1, "file": named, "offset": start, "piece": parts[0], **changes})
    return [first, *(pb.PutShardRequest(piece=part) for part in parts[1:])]


def put(channel: grpc.Channel, messages: Any, timeout: float = 20) -> Any:
    send: Callable[..., Any] = channel.stream_unary(
        "/pathfed.control.v1.Bulk/PutShard",
        request_serializer=lambda message: message if isinstance(message, bytes) else message.SerializeToString(),
        response_deserializer=pb.PutShardReply.FromString,
    )
    return send(iter(messages), timeout=timeout)


def get(channel: grpc.Channel, data: bytes, timeout: float | None = 20) -> list[bytes]:
    receive: Callable[..., Any] = channel.unary_stream("/pathfed.control.v1.Bulk/GetShard")
    return list(receive(data, timeout=timeout))


def answer(work: Callable[..., Any], *arguments: Any) -> str | None:
    """The code of a refusal, whose text is constant."""
    try:
        work(*arguments)
    except grpc.RpcError as error:
        code, text, status = code_of(error), error.details(), error.code().name
    else:
        return None
    assert code is None or text == CATALOG[ErrorCode(code)].title
    return code or status


def here(run: Run) -> int:
    part = run.incoming / "north.part"
    return part.stat().st_size if part.exists() else 0


def test_an_update_that_is_sent_shard_by_shard_is_there(channel, run):
    assert call(channel, "Bulk", "BeginUpdate", announced()).here == 0
    assert put(channel, pieces()).here == SHARD
    assert put(channel, pieces(start=SHARD, stop=2 * SHARD)).here == 2 * SHARD
    assert put(channel, pieces(start=2 * SHARD, stop=len(UPDATE))).here == len(UPDATE)
    assert uploads.arrived(run.incoming, SiteName("north")).read_bytes() == UPDATE
    assert call(channel, "Bulk", "BeginUpdate", announced()).here == len(UPDATE), "a replay is answered as the first was"
    assert answer(lambda: put(channel, pieces())) == "PF466", "nothing is taken any more"


def test_a_truncated_stream_keeps_what_came_and_an_empty_one_is_refused(channel, run):
    call(channel, "Bulk", "BeginUpdate", announced())
    assert put(channel, pieces(stop=3 * PIECE)).here == 3 * PIECE
    assert call(channel, "Bulk", "BeginUpdate", announced()).here == 3 * PIECE
    assert answer(lambda: put(channel, [])) == "PF416"
    assert not uploads.arrived(run.incoming, SiteName("north")).exists()


def test_an_endless_stream_is_cut_at_its_shards_end(channel, run):
    call(channel, "Bulk", "BeginUpdate", announced())
    sent = [0]

    def endless() -> Iterator[pb.PutShardRequest]:
        yield from pieces()
        while True:
            sent[0] += 1
            yield pb.PutShardRequest(piece=os.urandom(PIECE))

    assert answer(lambda: put(channel, endless())) == "PF416"
    assert sent[0] < 1000
    assert here(run) == SHARD, "the shard that was sound stays"


def test_a_shard_whose_digest_lies_is_thrown_away(channel, run):
    lie = [sha(b"a lie"), *announced().shards[1:]]
    call(channel, "Bulk", "BeginUpdate", announced(shards=lie))
    assert answer(lambda: put(channel, pieces())) == "PF463"
    assert here(run) == 0


def test_ten_thousand_tiny_messages_are_refused_at_the_second(channel, run):
    call(channel, "Bulk", "BeginUpdate", announced())
    tiny = [pieces(stop=1)[0], *(pb.PutShardRequest(piece=b"x") for _ in range(10_000))]
    assert answer(lambda: put(channel, tiny)) == "PF416"
    assert here(run) == 1


#: What is changed, and the code of the refusal.
UNFIT: tuple[Any, ...] = (
    ({"size": len(UPDATE) + 1}, "PF462"),
    ({"size": 0, "shards": []}, "PF462"),
    ({"shards": []}, "PF462"),
    ({"shards": [b"short"] * 3}, "PF416"),
    ({"file": b""}, "PF416"),
    ({"run": ""}, "PF416"),
    ({"run": "../../../x"}, "PF416"),
    ({"run": "other"}, "PF461"),
    ({"round_index": 0}, "PF416"),
    ({"round_index": 2**64 - 1}, "PF416"),
    ({"round_index": 2}, "PF461"),
    ({"size": 2**63, "shards": []}, "PF462"),
)


def test_an_announcement_that_does_not_fit_is_refused(channel, run):
    for changes, code in UNFIT:
        assert answer(call, channel, "Bulk", "BeginUpdate", announced(**changes)) == code, changes
    assert not list(run.incoming.glob("north*"))


#: What is changed, and the code of the refusal.
ELSEWHERE: tuple[Any, ...] = (
    ({"offset": PIECE}, "PF466"),
    ({"offset": 2**63}, "PF466"),
    ({"file": sha(b"another")}, "PF466"),
    ({"round_index": 7}, "PF461"),
    ({"piece": b""}, "PF416"),
    ({"piece": os.urandom(PIECE + 1)}, "PF416"),
    ({"file": b"x"}, "PF416"),
)


def test_pieces_for_another_place_are_refused(channel, run):
    call(channel, "Bulk", "BeginUpdate", announced())
    for changes, code in ELSEWHERE:
        assert answer(put, channel, pieces(**changes)) == code, changes
    assert here(run) == 0


#: What is changed, and the code of the refusal.
NOWHERE: tuple[Any, ...] = (
    (pb.GetShardRequest(file=sha(b"none")), "PF460"),
    (pb.GetShardRequest(file=b"short"), "PF416"),
    ({"index": 1}, "PF416"),
    ({"index": 2**63}, "PF416"),
    ({"offset": SHARD}, "PF416"),
    ({"offset": 2**63}, "PF416"),
)


def test_a_place_that_a_file_does_not_have_is_refused(channel, run):
    for request_, code in NOWHERE:
        asked = request_ if isinstance(request_, Message) else pb.GetShardRequest(file=bytes.fromhex(run.digest[7:]), **request_)
        assert answer(get, channel, asked.SerializeToString()) == code, asked


def test_bytes_that_are_no_message_are_refused(channel, run):
    assert answer(lambda: put(channel, [b"\xff\xff\xff"])) == "PF416"
    assert answer(get, channel, b"\xff\xff") == "PF416"
    assert answer(get, channel, b"", None) == "PF416", "a call has a deadline"


def test_a_site_cannot_send_in_anothers_name(serving, run, channel):
    call(channel, "Bulk", "BeginUpdate", announced())
    with control_channel(serving, peer_of(run, "south")) as other:
        assert answer(lambda: put(other, pieces())) == "PF466", "its own upload has not begun"
        call(other, "Bulk", "BeginUpdate", announced())
        put(other, pieces())
    assert here(run) == 0
    assert (run.incoming / "south.part").stat().st_size == SHARD


def test_a_newer_connection_takes_an_upload_over_and_the_older_one_ends(channel, serving, run):
    call(channel, "Bulk", "BeginUpdate", announced())
    go_on, old = threading.Event(), []

    def stuck() -> Iterator[pb.PutShardRequest]:
        yield from pieces(stop=2 * PIECE)
        go_on.wait(30)

    thread = threading.Thread(target=lambda: old.append(answer(lambda: put(channel, stuck(), timeout=60))))
    thread.start()
    last = time.monotonic() + 30
    while here(run) < 2 * PIECE:
        assert time.monotonic() < last
        time.sleep(0.02)
    with control_channel(serving, peer_of(run, "north")) as newer:
        assert put(newer, pieces(start=2 * PIECE)).here == SHARD
    thread.join(30)
    go_on.set()
    assert not thread.is_alive()
    assert old == ["CANCELLED"]
    assert here(run) == SHARD


def test_a_revocation_ends_a_stream_that_is_open(channel, serving, run, monkeypatch):
    monkeypatch.setattr(bulk_service, "_ASK_S", 0.0)
    call(channel, "Bulk", "BeginUpdate", announced())
    revoked = threading.Event()

    def going() -> Iterator[pb.PutShardRequest]:
        for number, message in enumerate(pieces()):
            if number == 3:
                members.revoke(serving.root, SiteName("north"))
                revoked.set()
            yield message

    assert answer(lambda: put(channel, going())) == "PF415"
    assert revoked.is_set()
    assert here(run) < SHARD


def test_transfers_at_once_are_counted_for_each_site():
    places = Places(most=3, of_one=2)
    with places.taken("a"), places.taken("a"), places.taken("b"):
        for name in ("a", "c"):
            with pytest.raises(Exception, match="PF417"), places.taken(name):
                pass
    with places.taken("a"), places.taken("c"):
        pass


def test_a_state_is_for_the_sites_of_its_run_alone(serving, run, enrolled):
    asked = pb.GetManifestRequest(file=bytes.fromhex(run.digest[7:]))
    for name, code in (("south", None), ("stranger", "PF460")):
        peer = enrolled(name) if name == "stranger" else peer_of(run, name)
        with control_channel(serving, peer) as opened:
            assert answer(call, opened, "Bulk", "GetManifest", asked) == code
    assert digest.of_bytes(run.state) == run.digest


def test_the_control_process_does_without_torch():
    """Its memory stays that of a small service: it moves bytes, and looks into none of them."""
    seen = "import sys, pathfed_server.control; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", seen], check=False).returncode == 0
