"""The way to the server: a TCP connection, through the site's web proxy where one is set, and TLS that trusts the pinned CA alone.

Used by the relay, which all of SuperNode's traffic goes through, and by the check before it.
"""

import asyncio
import base64
import socket
import ssl
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from pathfed_common.errors import ErrorCode, HostError, TransportError
from pathfed_common.files import read_given

CONNECT_WITHIN_S = 15.0
GOODBYE_S = 5.0
_HEAD_LIMIT = 16 * 1024
_PROXY_PORT = 3128
#: A peer that is gone without a word is noticed after about a minute, idle or not.
_KEEPALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 60_000}

Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@dataclass(frozen=True)
class Address:
    """A host and a TCP port."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> "Address":
        """Read HOST:PORT, or [HOST]:PORT.

        Raises:
            ValueError: it is not that.
        """
        host, colon, port = text.rpartition(":")
        host = host.removeprefix("[").removesuffix("]")
        if not colon or not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
            raise ValueError(f"not HOST:PORT: {text[:80]!r}")
        return cls(host, int(port))

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True)
class WebProxy:
    """A proxy that is asked to CONNECT.

    Attributes:
        address: where it listens.
        credentials: `user:password` for it, or None.
    """

    address: Address
    credentials: str | None = field(default=None, repr=False)


def proxy_for(destination: Address, environment: Mapping[str, str]) -> WebProxy | None:
    """The web proxy that `https_proxy` or `HTTPS_PROXY` names for a destination; None where there is none, or `no_proxy` takes it out.

    Raises:
        TransportError: PF451, it is not http://[USER:PASSWORD@]HOST[:PORT].
    """
    name = next((key for key in ("https_proxy", "HTTPS_PROXY") if environment.get(key)), None)
    without = environment.get("no_proxy") or environment.get("NO_PROXY") or ""
    if name is None or _taken_out(destination.host, without):
        return None
    text = environment[name] if "://" in environment[name] else f"http://{environment[name]}"
    try:
        parts = urlsplit(text)
        found = WebProxy(Address(parts.hostname or "", parts.port or _PROXY_PORT), _credentials(parts.username, parts.password))
    except ValueError:
        found = None
    if found is None or not found.address.host or parts.scheme != "http":
        raise TransportError(
            ErrorCode.PROXY_REFUSED,
            "the web proxy's address cannot be used",
            where=f"environment variable {name}",
            remedy="give http://HOST:PORT, or http://USER:PASSWORD@HOST:PORT; the tunnel through it is TLS all the same",
        )
    return found


def _taken_out(host: str, names: str) -> bool:
    """Whether a list of names and domains, with commas between, or `*`, holds a host."""
    found = [name.strip().lstrip(".").lower() for name in names.split(",")]
    return any(name and (name == "*" or host.lower() == name or host.lower().endswith(f".{name}")) for name in found)


def _credentials(user: str | None, password: str | None) -> str | None:
    return None if user is None else f"{unquote(user)}:{unquote(password or '')}"


def trusting(ca_file: Path) -> ssl.SSLContext:
    """TLS 1.2 or later that trusts this CA alone and compares the host's name.

    Where the environment variable SSLKEYLOGFILE is set, as a test does, or somebody who audits this machine's traffic, keys go there.

    Raises:
        HostError: PF904, the file cannot be read or holds no certificate.
    """
    read_given(ca_file)
    try:
        return ssl.create_default_context(cafile=str(ca_file))
    except ssl.SSLError:
        raise HostError(
            ErrorCode.HOME_UNUSABLE,
            "holds no certificate",
            where=ca_file,
            remedy="it is the consortium's CA from the server card; make the site's home again with `pathfed-site init`",
        ) from None


async def connect(destination: Address, proxy: WebProxy | None) -> socket.socket:
    """Open a TCP connection to a destination, or to the proxy on the way. Nothing but the TCP handshake has left when it returns.

    Raises:
        TransportError: PF403, nobody answers.
    """
    there = destination if proxy is None else proxy.address
    loop = asyncio.get_running_loop()
    try:
        places = await loop.getaddrinfo(there.host, there.port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise unreachable(error, there) from error
    failed: Exception = OSError("no address")
    for family, kind, protocol, _, place in places:
        connection = socket.socket(family, kind, protocol)
        connection.setblocking(False)
        try:
            async with asyncio.timeout(CONNECT_WITHIN_S):
                await loop.sock_connect(connection, place)
        except (OSError, TimeoutError) as error:
            connection.close()
            failed = error
        except BaseException:
            connection.close()
            raise
        else:
            keep_alive(connection)
            return connection
    raise unreachable(failed, there) from failed


def keep_alive(connection: socket.socket) -> None:
    """Let the kernel notice a peer that is gone."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        with suppress(AttributeError, OSError):  # not every system has every one
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


async def secure(
    connection: socket.socket, destination: Address, proxy: WebProxy | None, tls: ssl.SSLContext | None, *, limit: int = 64 * 1024
) -> Stream:
    """Ask the proxy for the way, where there is one, then shake hands, where there is a context. The connection becomes the stream's.

    Args:
        connection: from `connect`.
        destination: where to; the certificate must be for this host.
        proxy: the web proxy that the connection leads to, or None.
        tls: None: no TLS.
        limit: bytes that the stream reads ahead, at most twice.

    Raises:
        TransportError: PF401, the certificate is refused; PF403, the other side hung up or took too long; PF451, the proxy refuses.
    """
    try:
        if proxy is not None:
            async with asyncio.timeout(CONNECT_WITHIN_S):
                await _tunnel(connection, destination, proxy)
        more: dict[str, Any] = {}
        if tls is not None:
            more = {"server_hostname": destination.host, "ssl_handshake_timeout": CONNECT_WITHIN_S, "ssl_shutdown_timeout": GOODBYE_S}
        return await asyncio.open_connection(sock=connection, ssl=tls, limit=limit, **more)
    except ssl.SSLCertVerificationError as error:
        raise certificate_refused(error, destination) from error
    except (OSError, TimeoutError, EOFError) as error:
        raise unreachable(error, destination) from error


async def close(writer: asyncio.StreamWriter) -> None:
    """Let what was written go out, within `GOODBYE_S`; then the connection is gone, one way or the other."""
    writer.close()
    with suppress(OSError, TimeoutError):
        async with asyncio.timeout(GOODBYE_S):
            await writer.wait_closed()
            return
    writer.transport.abort()


async def _tunnel(connection: socket.socket, destination: Address, proxy: WebProxy) -> None:
    loop = asyncio.get_running_loop()
    lines = [f"CONNECT {destination} HTTP/1.1", f"Host: {destination}"]
    if proxy.credentials is not None:
        lines.append("Proxy-Authorization: Basic " + base64.b64encode(proxy.credentials.encode()).decode())
    await loop.sock_sendall(connection, "\r\n".join([*lines, "", ""]).encode())
    head = b""
    while not head.endswith(b"\r\n\r\n") and len(head) < _HEAD_LIMIT:
        byte = await loop.sock_recv(connection, 1)  # not one more: what follows is the destination's
        if not byte:
            raise EOFError("the web proxy hung up")
        head += byte
    status = head.split(b" ", 2)[1:2]
    if not head.startswith(b"HTTP/1.") or status != [b"200"]:
        raise TransportError(
            ErrorCode.PROXY_REFUSED,
            "the web proxy does not open a way to the server",
            where=proxy.address,
            value=f"CONNECT {destination}: {status[0].decode('ascii', 'replace')[:3] if status else 'no answer of HTTP'}",
            remedy="let the proxy pass this host and port without inspecting TLS; 407 asks for a user and password in https_proxy",
        )


def certificate_refused(error: ssl.SSLCertVerificationError, where: Address) -> TransportError:
    """The server's certificate does not hold."""
    return TransportError(
        ErrorCode.CERTIFICATE_REFUSED,
        f"the server's certificate is refused: {error.verify_message}",
        where=where,
        remedy="ask the operator for a new server card; do not go on with this one",
    )


def unreachable(error: Exception, where: Address) -> TransportError:
    """Nobody answers there."""
    why = "it took too long" if isinstance(error, TimeoutError) else str(error) or type(error).__name__
    return TransportError(
        ErrorCode.SERVER_UNREACHABLE,
        f"the server cannot be reached: {why}",
        where=where,
        remedy="check the address, the firewall (outbound TCP), the proxy if there is one, and that the server runs",
    )
