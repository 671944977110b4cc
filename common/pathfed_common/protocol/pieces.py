"""Messages that carry a piece of a file, written and read without the copies that protobuf makes of it.

Protobuf copies a piece twice at each end, into its message and out of it, which costs a transfer a sixth of its speed
(docs/benchmarks/, bulk transfer). What is written here is byte for byte what protobuf writes, `piece` being the last field of its message;
and what is more than a piece alone is left to protobuf to read.
"""

from typing import TypeAlias

from pathfed_common.protocol import control_pb2 as pb
from pathfed_common.shards import Piece

Kind: TypeAlias = type[pb.GetShardReply] | type[pb.PutShardRequest]

#: Protobuf's wire type of bytes, and the bits of a length that one byte holds (protobuf.dev, Encoding).
_BYTES, _BITS = 2, 7
#: Bytes of the longest length that is read here: pieces have 1 MiB.
_MOST_LENGTH_BYTES = 4


def with_piece(head: pb.GetShardReply | pb.PutShardRequest, piece: Piece) -> bytes:
    """A message, whose other fields `head` has, with a piece."""
    if not piece:
        return head.SerializeToString()
    length, left = bytearray(), len(piece)
    while left >> _BITS:
        length.append(left & 0x7F | 0x80)
        left >>= _BITS
    length.append(left)
    return b"".join((head.SerializeToString(), _tag(type(head)), length, piece))


def piece_of(kind: Kind, data: bytes) -> Piece:
    """The piece of a message, whatever else is in it.

    Raises:
        DecodeError: protobuf's, the message is malformed.
    """
    piece = _alone(kind, data)
    return kind.FromString(data).piece if piece is None else piece


def _alone(kind: Kind, data: bytes) -> memoryview | None:
    """The piece of a message that carries nothing else, in place; None where protobuf is to read it, or to refuse it."""
    if data[:1] != _tag(kind):
        return None
    length = 0
    for place in range(min(_MOST_LENGTH_BYTES, len(data) - 1)):
        byte = data[1 + place]
        length |= (byte & 0x7F) << (_BITS * place)
        if byte < 0x80:
            piece = memoryview(data)[2 + place :]
            return piece if len(piece) == length else None
    return None


def _tag(kind: Kind) -> bytes:
    return bytes([kind.DESCRIPTOR.fields_by_name["piece"].number << 3 | _BYTES])
