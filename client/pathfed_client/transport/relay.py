"""The relay: the one way out for SuperNode's traffic, and for the control plane's.

SuperNode speaks TLS to a port of the loopback, with a certificate made for this start alone; the relay takes that off, counts and digests
every byte, and speaks TLS to the server, whose certificate must be of the pinned CA. A second port is a tunnel for the control plane, which
brings mutual TLS of its own, and is counted all the same. Guarantees:

- **Nowhere else.** Each port leads to one destination, fixed at the start. What a client sends cannot change it.
- **Nobody else.** A connection whose other end is not a socket of this process's own user is closed before anything it says is read
  (PF450). Where the system does not tell (no Linux), every one is closed.
- **No entry, no byte.** `connection-opened` is on the disk before anything of a connection leaves; then an entry after every 64 MB or
  300 s. Where an entry cannot be written, the connection is cut.
- **Constant memory.** One part of 64 kB at most in each direction waits in each connection; whoever reads slowly slows the other side down.
- **No connection hangs.** A peer that is gone without a word, one that takes nothing for `STALL_S`, and a connection where nothing moves
  for `IDLE_S` are given up; a reset on either side ends both.
- **Limited.** What leaves keeps to the site's `bandwidth_mbit_s`, over all connections.

Where the server cannot be reached, SuperNode is answered `503`, which it takes as a reason to try again.
"""

import asyncio
import logging
import os
import secrets
import socket
import ssl
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from pathfed_client.egress.connection import ConnectionCount
from pathfed_client.egress.entry import Outgoing
from pathfed_client.egress.outlet import EgressPort
from pathfed_client.transport.bandwidth import Bandwidth
from pathfed_client.transport.dial import GOODBYE_S, Address, Stream, WebProxy, close, connect, keep_alive, secure
from pathfed_client.transport.peer import owner_of
from pathfed_common.errors import ErrorCode, HostError, PathfedError

LOOPBACK = "127.0.0.1"
#: Exit status of the relay's process when the server's certificate is refused: nothing can go on until somebody has looked at it.
CERTIFICATE_REFUSED = 71
IDLE_S = 600.0
STALL_S = 120.0
_MOST_CONNECTIONS = 64
_HANDSHAKE_S = 10.0
#: Seconds after which a destination that is still away is told of again. It is tried every two or three.
_TELL_AGAIN_S = 600.0
_AWAY = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Way:
    """One port of the relay and where it leads.

    Attributes:
        port: on the loopback; 0: any that is free.
        destination: the only place it leads to.
        proxy: the web proxy on the way, or None.
        inner: TLS towards the client; None: its bytes are carried as they are (a tunnel).
        outer: TLS towards the destination; None with a tunnel.
    """

    port: int
    destination: Address
    proxy: WebProxy | None = None
    inner: ssl.SSLContext | None = field(default=None, repr=False)
    outer: ssl.SSLContext | None = field(default=None, repr=False)


class Relay:
    """Serves ways out until it is closed. Belongs to one event loop."""

    def __init__(self, record: EgressPort, *, bytes_per_s: float | None = None, now: Callable[[], float] = time.monotonic) -> None:
        """Take the record that everything is written to, and the limit of what leaves (None: none)."""
        self._record = record
        self._bandwidth = Bandwidth(bytes_per_s)
        self._now = now
        self._writing = ThreadPoolExecutor(1, "egress-record")  # one thread: entries keep their order, and the loop goes on meanwhile
        self._session = secrets.token_hex(4)
        self._count = 0
        self._open: set[asyncio.Task[None]] = set()
        self._servers: list[asyncio.Server] = []
        self._told_away: dict[Address, tuple[str, float]] = {}
        self._refused: asyncio.Future[PathfedError] = asyncio.get_running_loop().create_future()

    async def serve(self, way: Way) -> int:
        """Listen for one way out; the port.

        Raises:
            OSError: the port is taken.
        """

        async def begin(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None, "a connection's coroutine runs in a task"  # noqa: S101
            self._open.add(task)
            try:
                await self._admit((reader, writer), way)
            except asyncio.CancelledError:
                pass  # the relay is being closed, which waits for this task
            finally:
                self._open.discard(task)

        tls: dict[str, Any] = {}
        if way.inner is not None:
            tls = {"ssl": way.inner, "ssl_handshake_timeout": _HANDSHAKE_S, "ssl_shutdown_timeout": GOODBYE_S}
        listening = self._bandwidth.shallow(_bound(way.port))
        server = await asyncio.start_server(begin, sock=listening, limit=self._bandwidth.part, **tls)
        self._servers.append(server)
        return int(server.sockets[0].getsockname()[1])

    async def certificate_refused(self) -> PathfedError:
        """Wait until a server shows a certificate that does not hold: nothing can go on then."""
        return await asyncio.shield(self._refused)

    async def close(self) -> None:
        """Stop listening, end every connection and write down what it sent."""
        for server in self._servers:
            server.close()
        for task in list(self._open):
            task.cancel()
        await asyncio.gather(*self._open, return_exceptions=True)
        self._writing.shutdown()

    async def _admit(self, client: Stream, way: Way) -> None:
        """See who it is, then carry."""
        writer = client[1]
        try:
            owner = owner_of(writer.get_extra_info("peername"), writer.get_extra_info("sockname"))
            if owner != os.geteuid():
                _log.error("%s a process of another user (%s) spoke to the relay and was refused", ErrorCode.RELAY_STRANGER.value, owner)
            elif len(self._open) > _MOST_CONNECTIONS:
                _log.error("%s too many connections at once; one is refused", ErrorCode.RELAY_STRANGER.value)
            else:
                keep_alive(writer.get_extra_info("socket"))
                await self._carry(client, way)
        except (OSError, EOFError, TimeoutError) as error:
            _log.info("a connection ended: %s", type(error).__name__)
        finally:
            await close(writer)

    async def _carry(self, client: Stream, way: Way) -> None:
        """Open the way to the server and pass bytes both ways until either side has ended."""
        try:
            connection = await connect(way.destination, way.proxy)
        except PathfedError as error:
            await self._away(client, way, error)
            return
        self._count += 1
        via = None if way.proxy is None else str(way.proxy.address)
        name = f"{self._session}-{self._count}"
        count = ConnectionCount(destination=str(way.destination), connection=name, via=via, now=self._now())
        try:
            with connection:
                await self._write_down(count.opened())
                try:
                    await self._over(connection, client, way, count)
                finally:
                    await asyncio.shield(self._write_down(count.entry(self._now(), closed=True)))
        except HostError as error:
            _log.error("%s %s: the connection is cut", error.code.value, error.what)

    async def _over(self, connection: socket.socket, client: Stream, way: Way, count: ConnectionCount) -> None:
        """Carry a client's bytes over a connection that is written down as opened."""
        try:
            server = await secure(connection, way.destination, way.proxy, way.outer, limit=self._bandwidth.part)
        except PathfedError as error:
            await self._away(client, way, error)
            return
        if self._told_away.pop(way.destination, None):
            _log.info("%s is there again", way.destination)
        try:
            await self._both_ways(client, server, count)
        finally:
            await close(server[1])

    async def _away(self, client: Stream, way: Way, error: PathfedError) -> None:
        """Say why, now and then, and answer what the client asks with `503`."""
        line = f"{error.code.value} {error.what} ({error.where})"
        told, told_at = self._told_away.get(way.destination, ("", 0.0))
        if line != told or self._now() >= told_at + _TELL_AGAIN_S:
            _log.error("%s", line)
            self._told_away[way.destination] = line, self._now()
        if error.code is ErrorCode.CERTIFICATE_REFUSED and not self._refused.done():
            self._refused.set_result(error)
        if way.inner is not None:
            async with asyncio.timeout(_HANDSHAKE_S):
                await client[0].read(self._bandwidth.part)
                client[1].write(_AWAY)
                await client[1].drain()

    async def _both_ways(self, client: Stream, server: Stream, count: ConnectionCount) -> None:
        async def out(data: bytes) -> None:
            await self._bandwidth.take(len(data))
            if count.due(self._now()):
                await self._write_down(count.entry(self._now()))
            count.count(data)

        async def back(data: bytes) -> None:
            del data  # what comes in is not counted

        moved = _Moved(self._now())
        tasks = [
            asyncio.create_task(self._pump(client[0], server[1], out, moved)),
            asyncio.create_task(self._pump(server[0], client[1], back, moved)),
            asyncio.create_task(self._idle(moved)),
        ]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            ends = await asyncio.gather(*tasks, return_exceptions=True)
        for end in ends:
            if isinstance(end, Exception):
                raise end

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, note: Callable[[bytes], Awaitable[None]], moved: "_Moved"
    ) -> None:
        """Pass bytes one way until that side has ended. Each part is noted before it is passed on."""
        while data := await reader.read(self._bandwidth.part):
            moved.at = self._now()
            await note(data)
            writer.write(data)
            async with asyncio.timeout(STALL_S):
                await writer.drain()
            moved.at = self._now()

    async def _idle(self, moved: "_Moved") -> None:
        """Return when nothing has moved for `IDLE_S`."""
        while (left := moved.at + IDLE_S - self._now()) > 0:
            await asyncio.sleep(left)

    async def _write_down(self, sent: Outgoing) -> None:
        await asyncio.get_running_loop().run_in_executor(self._writing, self._record.append, sent)


def _bound(port: int) -> socket.socket:
    """A socket at a port of the loopback; nobody listens yet."""
    made = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((LOOPBACK, port))
    except OSError:
        made.close()
        raise
    return made


@dataclass
class _Moved:
    """When a connection last moved a byte, either way."""

    at: float
