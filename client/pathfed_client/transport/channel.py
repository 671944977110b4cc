"""gRPC to the server: channels, deadlines, repeated calls, and errors as ours.

Every call of the control plane may be repeated: the server answers the same request again as it did before. So a call that was lost is
made again, after a time that grows and is partly random, so that many sites do not come back at once.
"""

import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
from google.protobuf.message import Message

from pathfed_client.egress.entry import EgressKind
from pathfed_client.egress.outlet import Outlet
from pathfed_client.transport.dial import Address, WebProxy, proxy_for
from pathfed_common.error_catalog import CATALOG
from pathfed_common.errors import ErrorCode, PathfedError, TransportError, error_from_dict

DEADLINE_S = 30.0
#: Of a call that carries a stream, seconds: the server takes none of more than 120.
STREAM_S = 110.0
_MOST_BYTES = 16 * 1024 * 1024
_KEEPALIVE_MS = 60_000
_KEEPALIVE_TIMEOUT_MS = 20_000
_CODE = "pathfed-code"
_AGAIN = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.RESOURCE_EXHAUSTED)

Reply = TypeVar("Reply", bound=Message)
Read = TypeVar("Read")


@dataclass(frozen=True)
class Patience:
    """How often and how slowly a lost call is made again.

    Attributes:
        attempts: calls in all, at least 1.
        first_s: seconds before the second, at most; twice that before the next.
        longest_s: seconds between two, at most.
    """

    attempts: int = 4
    first_s: float = 0.5
    longest_s: float = 30.0

    def pauses(self) -> Iterator[float]:
        """Seconds before each further call: the upper half of a time that doubles, drawn at random."""
        for attempt in range(self.attempts - 1):
            most = min(self.longest_s, self.first_s * 2**attempt)
            yield most * (0.5 + 0.5 * random.random())  # noqa: S311 - spreads calls, hides nothing


class Calls:
    """Calls to one service over one channel."""

    def __init__(
        self,
        address: str,
        service: str,
        credentials: grpc.ChannelCredentials,
        *,
        deadline_s: float = DEADLINE_S,
        outlet: Outlet,
        tunnel: int | None = None,
        patience: Patience | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Prepare a channel; nothing is connected yet.

        Args:
            address: HOST:PORT.
            service: full name of the service.
            credentials: TLS credentials.
            outlet: writes down what leaves.
            tunnel: loopback port of the site's relay, which leads to `address`; None: the way out is the web proxy's, or direct.
            deadline_s: of each call, seconds.
            patience: how lost calls are made again.
            sleep: waits.

        Raises:
            TransportError: PF451, `https_proxy` is no proxy's address; PF433, `address` is not HOST:PORT.
        """
        try:
            there = Address.parse(address)
        except ValueError as error:
            raise answer_unusable(f"the server's address cannot be used: {error}", address) from None
        proxy = None if tunnel is not None else proxy_for(there, os.environ)
        options: list[tuple[str, Any]] = [
            ("grpc.max_receive_message_length", _MOST_BYTES),
            ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
            ("grpc.keepalive_timeout_ms", _KEEPALIVE_TIMEOUT_MS),
            ("grpc.enable_retries", 0),  # repeated here, with codes heeded
            ("grpc.use_local_subchannel_pool", 1),  # a renewed certificate gets connections of its own
            ("grpc.enable_http_proxy", int(proxy is not None)),
        ]
        if proxy is not None:
            options.append(("grpc.http_proxy", _proxy_option(proxy)))
        if tunnel is not None:
            options.append(("grpc.ssl_target_name_override", there.host))
        self._channel = grpc.secure_channel(address if tunnel is None else f"127.0.0.1:{tunnel}", credentials, options=options)
        self._address, self._service, self._deadline_s = address, service, deadline_s
        self._patience = patience or Patience()
        self._outlet, self._sleep = outlet, sleep

    def close(self) -> None:
        """Close the channel. Safe to call twice."""
        self._channel.close()

    def call(self, method: str, request: Message, reply: type[Reply], kind: EgressKind = EgressKind.QUERY) -> Reply:
        """Make a call, again where it was lost. Each time it is written down first, as what `kind` says it is.

        Raises:
            HostError: PF901, PF904, PF913, it cannot be written down; nothing was sent.
            PathfedError: the code that the server answered.
            TransportError: PF401, its certificate is refused; PF403, it cannot be reached; PF433, its answer cannot be used.
        """
        data = request.SerializeToString()
        for pause in self._patience.pauses():
            try:
                return self._once(method, data, reply, kind)
            except grpc.RpcError as error:
                if error.code() not in _AGAIN or _refuses_certificate(error):
                    raise as_error(error, self._address) from error
            self._sleep(pause)
        try:
            return self._once(method, data, reply, kind)
        except grpc.RpcError as error:
            raise as_error(error, self._address) from error

    def receive(self, method: str, request: Message, read: Callable[[bytes], Read], kind: EgressKind = EgressKind.QUERY) -> Iterator[Read]:
        """Make a call that is answered by a stream, once; what `read` makes of each message, as it comes. Raises as `call`, at any."""
        data = request.SerializeToString()
        self._outlet.message(self._address, kind, data)
        made: grpc.UnaryStreamMultiCallable[bytes, Read] = self._channel.unary_stream(
            f"/{self._service}/{method}", request_serializer=None, response_deserializer=read
        )
        streaming = made(data, timeout=STREAM_S)
        try:
            yield from streaming
        except grpc.RpcError as error:
            raise as_error(error, self._address) from error
        finally:
            streaming.cancel()

    def send(self, method: str, messages: Iterator[bytes], reply: type[Reply]) -> Reply:
        """Send a stream of serialised messages, once; its answer. The caller writes down before what they carry. Raises as `call`."""
        made: grpc.StreamUnaryMultiCallable[bytes, Reply] = self._channel.stream_unary(
            f"/{self._service}/{method}", request_serializer=None, response_deserializer=reply.FromString
        )
        try:
            return made(messages, timeout=STREAM_S)
        except grpc.RpcError as error:
            raise as_error(error, self._address) from error

    def _once(self, method: str, data: bytes, reply: type[Reply], kind: EgressKind) -> Reply:
        self._outlet.message(self._address, kind, data)
        made: grpc.UnaryUnaryMultiCallable[bytes, Reply] = self._channel.unary_unary(
            f"/{self._service}/{method}", request_serializer=None, response_deserializer=reply.FromString
        )
        return made(data, timeout=self._deadline_s)


def _proxy_option(proxy: WebProxy) -> str:
    user = "" if proxy.credentials is None else f"{proxy.credentials}@"
    return f"http://{user}{proxy.address}"


def as_error(error: grpc.RpcError, address: str) -> PathfedError:
    """A failed call as one of our errors, by the code that the server sent with it, or by gRPC's own status."""
    stated = [str(entry.value) for entry in error.trailing_metadata() or () if entry.key == _CODE]
    if stated:
        return _of_code(stated[0], address)
    status = error.code()
    if _refuses_certificate(error):
        return TransportError(
            ErrorCode.CERTIFICATE_REFUSED,
            "the server's certificate is refused: it is not the pinned consortium's, is for another host, or has expired",
            where=address,
        )
    if status in _AGAIN:
        return TransportError(
            ErrorCode.SERVER_UNREACHABLE,
            f"the server cannot be reached: {status.name}",
            where=address,
            value=str(error.details() or "")[:200],
            remedy="check the address, the firewall (outbound TCP), the proxy, and that the server runs",
        )
    return answer_unusable(f"the server answered {status.name}", address)


def answer_unusable(what: str, address: str) -> TransportError:
    """PF433: an answer that a server of this version does not give."""
    return TransportError(ErrorCode.ANSWER_UNUSABLE, what, where=address, remedy="compare the versions of pathfed at both ends")


def _of_code(stated: str, address: str) -> PathfedError:
    try:
        entry = CATALOG[ErrorCode(stated)]
        return error_from_dict(
            {"code": stated, "what": f"the server answers: {entry.title}", "where": address, "value": None, "remedy": None}
        )
    except (ValueError, KeyError):
        return answer_unusable(f"the server answers with a code that this version does not know: {stated[:20]!r}", address)


def _refuses_certificate(error: grpc.RpcError) -> bool:
    return "CERTIFICATE_VERIFY_FAILED" in str(error.details() or "")
