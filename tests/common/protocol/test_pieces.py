"""Messages with a piece are what protobuf would write, and say what protobuf would read; without copying."""

from typing import Any

import pytest
from google.protobuf.message import DecodeError
from hypothesis import example, given
from hypothesis import strategies as st

from pathfed_common.protocol import control_pb2 as pb
from pathfed_common.protocol.pieces import piece_of, with_piece

KINDS: tuple[Any, ...] = (pb.GetShardReply, pb.PutShardRequest)
HEADS = (pb.GetShardReply(), pb.PutShardRequest(), pb.PutShardRequest(run="r", round_index=3, file=b"f" * 32, offset=2**40))


@pytest.mark.parametrize("head", HEADS, ids=lambda head: f"{type(head).__name__} {len(str(head))}")
@pytest.mark.parametrize("size", [0, 1, 127, 128, 2**14 - 1, 2**14, 2**20, 2**21 + 5])
def test_what_is_written_is_protobufs(head: Any, size: int) -> None:
    piece = b"\xa5" * size
    written = with_piece(head, piece)
    named = {field.name: value for field, value in head.ListFields()}
    assert written == type(head)(**named, piece=piece).SerializeToString()
    assert piece_of(type(head), written) == piece


def as_protobuf_reads(kind: Any, data: bytes) -> bytes | None:
    try:
        return bytes(kind.FromString(data).piece)
    except DecodeError:
        return None


@given(
    st.sampled_from(KINDS),
    st.sampled_from([b"", b"\x0a", b"\x2a"]),
    st.one_of(st.binary(max_size=6), st.integers(0, 40).map(lambda number: bytes([number]))),
    st.binary(max_size=40),
)
@example(pb.PutShardRequest, b"\x2a", b"\x83\x00", b"abc")  # a length that is longer than it must be
@example(pb.PutShardRequest, b"\x2a", b"\x83\x80\x80\x80\x00", b"abc")
@example(pb.PutShardRequest, b"\x2a", b"\x01", b"a\x2a\x01b")  # the same field twice: the last counts
@example(pb.PutShardRequest, b"\x2a", b"\x83\x80\x80\x80\x80\x80\x80\x80\x80\x80", b"abc")
def test_what_is_read_is_what_protobuf_reads(kind: Any, tag: bytes, length: bytes, rest: bytes) -> None:
    data = tag + length + rest
    try:
        found = bytes(piece_of(kind, data))
    except DecodeError:
        assert as_protobuf_reads(kind, data) is None
    else:
        assert found == as_protobuf_reads(kind, data)


def test_a_piece_alone_is_read_in_its_place() -> None:
    data = with_piece(pb.PutShardRequest(), b"x" * 2**20)
    found = piece_of(pb.PutShardRequest, data)
    assert isinstance(found, memoryview)
    assert found.obj is data
