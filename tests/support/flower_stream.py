"""What a SuperNode's HTTP requests carried: the messages that it pushed, put together again with Flower's own functions."""

from collections.abc import Iterable, Iterator

from flwr.app import Message
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import PushObjectRequest
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents


def requests(stream: bytes) -> Iterator[tuple[str, bytes]]:
    """Path and body of each whole request of a connection.

    Raises:
        ValueError: it is not HTTP/1.1 with bodies of a stated length.
    """
    start = 0
    while start < len(stream):
        stop = stream.find(b"\r\n\r\n", start)
        if stop < 0:
            return
        first, *fields = stream[start:stop].decode("ascii").split("\r\n")
        method, path, version = first.split(" ")
        if (method, version) != ("POST", "HTTP/1.1"):
            raise ValueError(f"not a request of SuperNode's: {first!r}")
        lengths = [int(field.split(":")[1]) for field in fields if field.lower().startswith("content-length:")]
        body = stream[stop + 4 : stop + 4 + lengths[0]]
        if len(body) < lengths[0]:
            return
        yield path, body
        start = stop + 4 + lengths[0]


def pushed_messages(streams: Iterable[bytes]) -> list[Message]:
    """The messages that were pushed over these connections, whole."""
    contents: dict[str, bytes] = {}
    ids: list[str] = []
    for stream in streams:
        for path, body in requests(stream):
            if path == "/v1/fleet/push-object":
                pushed = PushObjectRequest.FromString(body)
                contents[pushed.object_id] = pushed.object_content
            elif path == "/v1/fleet/push-messages":
                ids += [tree.object_id for tree in PushMessagesRequest.FromString(body).message_object_trees]
    messages = [inflate_object_from_contents(one, dict(contents)) for one in dict.fromkeys(ids)]
    return [message for message in messages if isinstance(message, Message)]
