"""The way out through a hospital's proxy: HTTP CONNECT, by the variables `https_proxy` and `no_proxy`, in either case."""

import base64
import socket
from dataclasses import dataclass, field
from typing import Self
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies_environment, proxy_bypass_environment  # type: ignore[attr-defined]

from pathfed_common.errors import ErrorCode, HostError

_PORT = 3128
_LONGEST_ANSWER = 16 * 1024


@dataclass(frozen=True)
class Proxy:
    """A proxy.

    Attributes:
        host: its name or address.
        port: its TCP port.
        credentials: "user:password" or None; does not show in `repr`.
    """

    host: str
    port: int
    credentials: str | None = field(default=None, repr=False)

    @classmethod
    def of_environment(cls, host: str) -> Self | None:
        """The proxy that the environment names for a host, or None.

        Raises:
            HostError: PF905, `https_proxy` is no proxy's address.
        """
        named = getproxies_environment().get("https")
        if not named or proxy_bypass_environment(host):
            return None
        try:
            parts = urlsplit(named if "://" in named else f"http://{named}")
            if parts.scheme != "http" or parts.hostname is None:
                raise ValueError("http://[USER:PASSWORD@]HOST:PORT is expected")
            user = None if parts.username is None else f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            return cls(parts.hostname, parts.port or _PORT, user)
        except ValueError as error:
            raise HostError(ErrorCode.SETTINGS_INVALID, f"not a proxy's address: {error}", where="variable https_proxy") from None

    def channel_option(self) -> tuple[str, str]:
        """The proxy as gRPC takes it."""
        user = "" if self.credentials is None else f"{self.credentials}@"
        return ("grpc.http_proxy", f"http://{user}{self.host}:{self.port}")


def connect(address: str, timeout_s: float) -> socket.socket:
    """A TCP connection to HOST:PORT, through the proxy that the environment names for it.

    Raises:
        OSError: nobody answers, or the proxy refuses.
        HostError: PF905, `https_proxy` is no proxy's address.
    """
    host, _, port = address.rpartition(":")
    proxy = Proxy.of_environment(host)
    if proxy is None:
        return socket.create_connection((host, int(port)), timeout=timeout_s)
    connection = socket.create_connection((proxy.host, proxy.port), timeout=timeout_s)
    try:
        _open_tunnel(connection, address, proxy)
    except BaseException:
        connection.close()
        raise
    return connection


def _open_tunnel(connection: socket.socket, address: str, proxy: Proxy) -> None:
    lines = [f"CONNECT {address} HTTP/1.1", f"Host: {address}"]
    if proxy.credentials is not None:
        lines.append("Proxy-Authorization: Basic " + base64.b64encode(proxy.credentials.encode()).decode("ascii"))
    connection.sendall("\r\n".join([*lines, "", ""]).encode())
    answer = b""
    while not answer.endswith(b"\r\n\r\n"):
        more = connection.recv(1)  # nothing behind the answer may be taken from the tunnel
        if not more or len(answer) > _LONGEST_ANSWER:
            raise OSError("the proxy closed the connection")
        answer += more
    status = answer.split(b" ", 2)[1:2]
    if status != [b"200"]:
        raise OSError(f"the proxy refuses: {answer.splitlines()[0][:80].decode('latin-1')}")
