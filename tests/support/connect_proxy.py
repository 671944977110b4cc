"""A hospital's proxy on loopback that knows CONNECT alone, and notes what it was asked."""

import asyncio
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

from loopback_server import serving


@dataclass
class ConnectProxy:
    """What the proxy saw."""

    port: int = 0
    refuse: bool = False
    heads: list[bytes] = field(default_factory=list)

    @property
    def asked(self) -> list[str]:
        """Where each connection was to go."""
        return [head.split()[1].decode() for head in self.heads]


@contextlib.contextmanager
def proxying(*, refuse: bool = False) -> Iterator[ConnectProxy]:
    """Run one."""
    seen, loop = ConnectProxy(refuse=refuse), asyncio.new_event_loop()
    tasks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        with contextlib.suppress(OSError, asyncio.CancelledError, asyncio.IncompleteReadError), contextlib.closing(writer):
            seen.heads.append(await reader.readuntil(b"\r\n\r\n"))
            if seen.refuse:
                writer.write(b"HTTP/1.1 403 Forbidden\r\n\r\n")
                return
            host, _, port = seen.asked[-1].rpartition(":")
            there_reader, there_writer = await asyncio.open_connection(host, int(port))
            with contextlib.closing(there_writer):
                writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
                await asyncio.wait(
                    [asyncio.ensure_future(_copy(reader, there_writer)), asyncio.ensure_future(_copy(there_reader, writer))],
                    return_when=asyncio.FIRST_COMPLETED,
                )

    with serving(loop, serve) as seen.port:
        yield seen


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError, asyncio.CancelledError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
