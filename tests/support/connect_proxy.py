"""A hospital's proxy on loopback that knows CONNECT alone, and notes what it was asked."""

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field


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

    async def stop() -> None:
        server.close()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        await asyncio.sleep(0.05)

    server = loop.run_until_complete(asyncio.start_server(serve, "127.0.0.1", 0))
    seen.port = server.sockets[0].getsockname()[1]
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield seen
    finally:
        asyncio.run_coroutine_threadsafe(stop(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError, asyncio.CancelledError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
