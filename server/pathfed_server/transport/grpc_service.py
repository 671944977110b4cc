"""What both gRPC ports do alike: how a call is taken, judged and answered, and how a port listens.

A call goes through one function (`Door.method`): it has a deadline, its caller is within the rate, its message is one, and whatever is
raised becomes a gRPC status, the code in the trailing metadata, and a constant text. Nothing that a caller sent, and nothing of the
server's insides, stands in an answer.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeAlias, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from pathfed_common.error_catalog import CATALOG
from pathfed_common.errors import ErrorCode, HostError, PathfedError, TransportError
from pathfed_server.transport.limits import RateLimit

#: Trailing metadata that carries the stable code.
CODE_KEY: Final = "pathfed-code"
#: Longest deadline a call may have, seconds.
LONGEST_CALL_S: Final = 120.0
#: Largest message a site may send, bytes. Cards, requests, approvals and cosignatures have a few kilobytes, a list of shards 128.
REQUEST_LIMIT: Final = 256 * 1024
#: The same of an upload, where each message carries a piece of 1 MiB.
PIECE_LIMIT: Final = 2**20 + 4096
#: Largest answer, bytes: plans of years, or a page of log leaves.
REPLY_LIMIT: Final = 32 * 2**20
#: Calls in hand at once: streams of bulk files hold most of these, each for up to `LONGEST_CALL_S` (see `limits.Places`).
_WORKERS = 64
_MOST_CALLS = 256  # in hand or waiting; beyond them a call is turned away at once
_IDLE_S = 600
_PING_S = 60  # proxies on the way drop connections that are silent for longer

if TYPE_CHECKING:
    #: A method that takes and gives bytes. (At run time the class takes no parameters.)
    Handler: TypeAlias = grpc.RpcMethodHandler[bytes, bytes]
else:
    Handler = grpc.RpcMethodHandler

_log = logging.getLogger(__name__)
Request = TypeVar("Request", bound=Message)
Read = TypeVar("Read")

_STATUS: Final[dict[ErrorCode, grpc.StatusCode]] = {
    ErrorCode.INVITATION_REFUSED: grpc.StatusCode.UNAUTHENTICATED,
    ErrorCode.IDENTITY_REFUSED: grpc.StatusCode.UNAUTHENTICATED,
    ErrorCode.SITE_REVOKED: grpc.StatusCode.PERMISSION_DENIED,
    ErrorCode.ENROLMENT_UNFIT: grpc.StatusCode.INVALID_ARGUMENT,
    ErrorCode.CERTIFICATE_REQUEST: grpc.StatusCode.INVALID_ARGUMENT,
    ErrorCode.REQUEST_REFUSED: grpc.StatusCode.INVALID_ARGUMENT,
    ErrorCode.RECORD_CHANGED: grpc.StatusCode.INVALID_ARGUMENT,
    ErrorCode.RECORD_SIGNATURE: grpc.StatusCode.INVALID_ARGUMENT,
    ErrorCode.RATE_LIMITED: grpc.StatusCode.RESOURCE_EXHAUSTED,
    ErrorCode.CONTROL_INTERNAL: grpc.StatusCode.INTERNAL,
    ErrorCode.DATABASE_UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
    ErrorCode.DISK_FULL: grpc.StatusCode.UNAVAILABLE,
    ErrorCode.SITE_UNKNOWN: grpc.StatusCode.NOT_FOUND,
    ErrorCode.PLAN_UNKNOWN: grpc.StatusCode.NOT_FOUND,
    ErrorCode.FILE_NOT_OFFERED: grpc.StatusCode.NOT_FOUND,
    ErrorCode.UPDATE_TOO_LARGE: grpc.StatusCode.INVALID_ARGUMENT,
    ErrorCode.SHARD_DAMAGED: grpc.StatusCode.DATA_LOSS,
    ErrorCode.UPLOAD_MOVED: grpc.StatusCode.ABORTED,
}


@dataclass(frozen=True)
class Call:
    """What is known of a call beside its message.

    Attributes:
        address: the caller's network address without its port; not to be trusted for more than counting.
        certificate: the caller's TLS certificate, PEM; None on a port that asks for none.
    """

    address: str
    certificate: bytes | None


class Door:
    """How calls are taken on one port."""

    def __init__(self, limit: RateLimit) -> None:
        """Take calls within `limit`, which counts by network address."""
        self._limit = limit

    def method(self, kind: type[Request], handle: Callable[[Call, Request], Message]) -> Handler:
        """A unary method whose messages are read here, so that what is malformed is answered like everything else."""

        def serve(data: bytes, context: grpc.ServicerContext) -> bytes:
            with _answering(kind, context):
                return handle(self._call(context), read(kind.FromString, data)).SerializeToString()

        return grpc.unary_unary_rpc_method_handler(serve)

    def download(self, kind: type[Request], handle: Callable[[Call, Request], Iterator[bytes]]) -> Handler:
        """A method that answers one message with many, which `handle` writes."""

        def serve(data: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
            with _answering(kind, context):
                yield from handle(self._call(context), read(kind.FromString, data))

        return grpc.unary_stream_rpc_method_handler(serve)

    def upload(self, kind: type[Request], handle: Callable[[Call, Iterator[bytes], Callable[[], None]], Message]) -> Handler:
        """A method that takes many messages, which `handle` reads, and answers when they end; given also what ends the call from here."""

        def serve(messages: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
            with _answering(kind, context):
                return handle(self._call(context), messages, lambda: _end(context)).SerializeToString()

        return grpc.stream_unary_rpc_method_handler(serve)

    def _call(self, context: grpc.ServicerContext) -> Call:
        left = context.time_remaining()
        # Without a deadline gRPC gives the time to the end of all times.
        if left is None or left > LONGEST_CALL_S:
            raise TransportError(ErrorCode.REQUEST_REFUSED, f"a call has a deadline of at most {LONGEST_CALL_S:g} s")
        address = _address(context)
        if not self._limit.allows(address):
            raise TransportError(ErrorCode.RATE_LIMITED, "too many calls from one address")
        found = context.auth_context().get("x509_pem_cert")
        return Call(address, bytes(found[0]) if found else None)


def start_server(
    services: Mapping[str, Mapping[str, Handler]], credentials: grpc.ServerCredentials, *, host: str, port: int
) -> grpc.Server:
    """Listen on a port with some services, and with gRPC's health service; without reflection.

    Args:
        services: methods by name, by the service's full name.
        credentials: TLS.
        host: address to listen on.
        port: TCP port.

    Raises:
        HostError: PF902, the port cannot be listened on.
    """
    server = grpc.server(ThreadPoolExecutor(_WORKERS, thread_name_prefix="call"), options=_options(), maximum_concurrent_rpcs=_MOST_CALLS)
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(name, dict(methods)) for name, methods in services.items()])
    healthy = health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(healthy, server)
    for name in ("", *services):
        healthy.set(name, health_pb2.HealthCheckResponse.SERVING)
    try:
        server.add_secure_port(f"[{host}]:{port}" if ":" in host else f"{host}:{port}", credentials)
    except RuntimeError as error:
        raise HostError(ErrorCode.PORT_IN_USE, "the port cannot be listened on", value=f"{host}:{port}") from error
    server.start()
    return server


@dataclass(frozen=True)
class Listening:
    """Servers that listen, and what is closed after them."""

    servers: tuple[grpc.Server, ...]
    close: Callable[[], None] = lambda: None

    def stop(self, grace_s: float) -> None:
        """Take no further call, let those in hand end within `grace_s`, and close."""
        for event in [server.stop(grace_s) for server in self.servers]:
            event.wait()
        self.close()


def _options() -> list[tuple[str, Any]]:
    return [
        ("grpc.so_reuseport", 0),  # a second server on the same port would take half the calls unnoticed
        ("grpc.max_receive_message_length", PIECE_LIMIT),
        ("grpc.max_send_message_length", REPLY_LIMIT),
        ("grpc.max_metadata_size", 8 * 1024),
        ("grpc.max_concurrent_streams", 32),
        ("grpc.server_handshake_timeout_ms", 20_000),
        ("grpc.max_connection_idle_ms", _IDLE_S * 1000),
        ("grpc.keepalive_time_ms", _PING_S * 1000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ]


@contextmanager
def _answering(kind: type[Message], context: grpc.ServicerContext) -> Iterator[None]:
    """Whatever a call raises becomes a status, a code and a constant text; a caller that is gone gets nothing."""
    try:
        yield
    except PathfedError as error:
        _log.info("%s from %s: %s", kind.__name__, _address(context), error.code.value)
        _abort(context, error.code)
    except grpc.RpcError:
        _log.info("%s from %s was cut off", kind.__name__, _address(context))
        raise
    except Exception:
        # The edge: whatever it is, the caller learns a code and nothing else.
        _log.exception("%s from %s failed", kind.__name__, _address(context))
        _abort(context, ErrorCode.CONTROL_INTERNAL)


def _end(context: grpc.ServicerContext) -> None:
    """Let a call end that a newer one has taken over: whoever waits for its messages gives up."""
    context.cancel()


def read(parse: Callable[[bytes], Read], data: bytes, most: int = REQUEST_LIMIT) -> Read:
    """A message, or what `parse` makes of it.

    Raises:
        TransportError: PF416, it is malformed, or has more than `most` bytes.
    """
    if len(data) > most:
        raise TransportError(ErrorCode.REQUEST_REFUSED, f"a message has at most {most} bytes")
    try:
        return parse(data)
    except DecodeError:
        raise TransportError(ErrorCode.REQUEST_REFUSED, "the message is malformed") from None


def _address(context: grpc.ServicerContext) -> str:
    return context.peer().rpartition(":")[0]


def _abort(context: grpc.ServicerContext, code: ErrorCode) -> NoReturn:
    context.set_trailing_metadata(((CODE_KEY, code.value),))
    context.abort(_STATUS.get(code, grpc.StatusCode.FAILED_PRECONDITION), CATALOG[code].title)
    raise AssertionError("abort does not return")
