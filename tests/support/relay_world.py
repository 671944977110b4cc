"""A relay with a real server behind it, a real client in front and a real record on the disk, in one event loop."""

import asyncio
import contextlib
import datetime
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

from pathfed_client.egress.entry import EgressKind, Outgoing
from pathfed_client.io.egress_log import EgressLog
from pathfed_client.transport.dial import Address, WebProxy, trusting
from pathfed_client.transport.relay import Relay, Way
from pathfed_client.transport.relay_certificate import make_certificate
from pathfed_server.transport.certificates import make_tls

NOW = datetime.datetime.now(datetime.UTC)
Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@dataclass
class Server:
    """A TLS server that does with each connection what a test says, and remembers what came."""

    port: int
    handler: Handler
    came: bytearray = field(default_factory=bytearray)
    connections: int = 0


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Send everything back."""
    while data := await reader.read(1 << 16):
        writer.write(data)
        await writer.drain()


async def never_reads(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Take nothing for ever."""
    del reader, writer
    await asyncio.sleep(600)


def reset(writer: asyncio.StreamWriter) -> None:
    """End a connection with a TCP reset."""
    there = writer.get_extra_info("socket")
    there.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


@contextlib.asynccontextmanager
async def serving(folder: Path, handler: Handler = echo, *, plain: bool = False, port: int = 0) -> AsyncIterator[Server]:
    """A server on loopback whose certificate's CA is written to `folder`/ca.pem, or is there from an earlier one."""
    context = None
    if not plain:
        if not (folder / "cert").exists():
            tls = make_tls("test", ["127.0.0.1"], now=NOW)
            for name, data in {"ca.pem": tls.ca_certificate, "cert": tls.certificate, "key": tls.key}.items():
                (folder / name).write_bytes(data)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(folder / "cert", folder / "key")
    server = Server(0, handler)
    tasks: set[asyncio.Task[None]] = set()

    async def begin(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        server.connections += 1
        noted = _Noting(reader, server.came)
        with contextlib.suppress(OSError, asyncio.CancelledError):
            await server.handler(noted, writer)  # type: ignore[arg-type]
        with contextlib.suppress(OSError, asyncio.CancelledError):
            writer.close()
            await writer.wait_closed()

    listener = await asyncio.start_server(begin, "127.0.0.1", port, ssl=context)
    server.port = listener.sockets[0].getsockname()[1]
    try:
        yield server
    finally:
        listener.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0)


class _Noting:
    """A reader that notes what it reads."""

    def __init__(self, reader: asyncio.StreamReader, came: bytearray) -> None:
        self._reader, self._came = reader, came

    async def read(self, most: int) -> bytes:
        data = await self._reader.read(most)
        self._came += data
        return data


@dataclass
class Relayed:
    """A relay with one way out."""

    relay: Relay
    port: int
    folder: Path

    async def client(self, *, plain: bool = False) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection to the relay, as SuperNode makes one; `plain`: as to the tunnel."""
        if plain:
            return await asyncio.open_connection("127.0.0.1", self.port)
        context = trusting(self.folder / "relay" / "ca.pem")
        return await asyncio.open_connection("127.0.0.1", self.port, ssl=context, server_hostname="127.0.0.1")

    def left(self) -> list[Outgoing]:
        """What the record holds, verified."""
        with EgressLog(self.folder / "egress.db") as record:
            record.verified()
            return [entry.sent for entry in record.entries()]

    def sent(self) -> int:
        """Bytes that connections carried."""
        return sum(one.size for one in self.left())

    def closed(self) -> bool:
        """Whether every connection that was opened was written down as closed."""
        kinds = [one.kind for one in self.left()]
        return kinds.count(EgressKind.CONNECTION_OPENED) == kinds.count(EgressKind.CONNECTION_CLOSED) > 0


@contextlib.asynccontextmanager
async def relaying(
    folder: Path,
    port: int,
    *,
    tunnel: bool = False,
    proxy: WebProxy | None = None,
    bytes_per_s: float | None = None,
    ca: Path | None = None,
    host: str = "127.0.0.1",
) -> AsyncIterator[Relayed]:
    """A relay on loopback that leads to `host`:`port`; its files and record lie in `folder`."""
    EgressLog.create(folder / "egress.db")
    made = make_certificate(folder / "relay", "127.0.0.1", now=NOW)
    inner = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    inner.load_cert_chain(made.certificate, made.key)
    tls = {} if tunnel else {"inner": inner, "outer": trusting(ca or folder / "ca.pem")}
    with EgressLog(folder / "egress.db") as record:
        relay = Relay(record, bytes_per_s=bytes_per_s)
        try:
            listening = await relay.serve(Way(port=0, destination=Address(host, port), proxy=proxy, **tls))
            yield Relayed(relay, listening, folder)
        finally:
            await relay.close()


async def until(look: Callable[[], object], within_s: float = 30.0) -> None:
    """Wait until something holds; fails when it does not."""
    async with asyncio.timeout(within_s):
        while not look():
            await asyncio.sleep(0.02)


async def end(writer: asyncio.StreamWriter) -> None:
    """Close a client's connection, whatever state it is in."""
    with contextlib.suppress(OSError):
        writer.close()
        await writer.wait_closed()
