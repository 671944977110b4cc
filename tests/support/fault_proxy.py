"""A hospital's web proxy that fails as networks fail, on command: cut, reset in mid-stream, half-open, slow, far away.

It knows CONNECT alone, so that a site reaches the server through it by `https_proxy`, with its own TLS and no address changed; or it leads
to one place (`to`), for a client that takes a port. Faults hold for connections that are open and for those to come, unless it says
otherwise. Bytes are counted as they leave the proxy.
"""

import asyncio
import contextlib
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

from loopback_server import serving

_CHUNK = 16 * 1024
#: What waits in front of a slow line, bytes each way of a connection, as in a router: who sends more has to wait.
_QUEUE = 64 * 1024
_ENDLESS = 2**62
_LOOK_S = 0.02
T = TypeVar("T")


@dataclass
class FaultProxy:
    """The proxy and what is wrong with it. Every attribute may be changed while it runs.

    Attributes:
        port: where it listens.
        is_cut: connections are reset and new ones refused, as by a firewall that says so.
        is_silent: nothing passes and nothing is said, while connections stay open; new ones are accepted and never answered.
        latency_s: seconds that every byte takes longer, each way.
        bytes_per_s: most that passes each way, over all connections together; None: no limit.
        resets: bytes up after which the next connections are reset, one each; when none is left they last.
        up: bytes carried towards the server, by destination.
        down: bytes carried back, by destination.
        opened: connections so far, by destination.
    """

    port: int = 0
    is_cut: bool = False
    is_silent: bool = False
    latency_s: float = 0.0
    bytes_per_s: float | None = None
    resets: list[int] = field(default_factory=list)
    up: Counter[str] = field(default_factory=Counter)
    down: Counter[str] = field(default_factory=Counter)
    opened: Counter[str] = field(default_factory=Counter)
    _lines: "set[_Line]" = field(default_factory=set, repr=False)
    #: When each way is free again, on the loop's clock: up, down.
    _free_at: dict[bool, float] = field(default_factory=lambda: {True: 0.0, False: 0.0}, repr=False)
    _loop: asyncio.AbstractEventLoop | None = field(default=None, repr=False)

    def cut(self) -> None:
        """Cut every line now, and refuse new ones until `mend`."""
        self.is_cut = True
        self._each(lambda line: line.reset())

    def silence(self) -> None:
        """Go half-open: pass nothing more and say nothing."""
        self.is_silent = True

    def strand(self) -> None:
        """Go half-open on the connections of now alone, for good: those that come after work."""
        self._each(lambda line: line.strand())

    def reset_open(self) -> None:
        """Reset what is open; new connections work."""
        self._each(lambda line: line.reset())

    def mend(self) -> None:
        """Nothing is wrong any more."""
        self.is_cut = self.is_silent = False
        self.latency_s, self.bytes_per_s = 0.0, None
        self.resets.clear()

    @property
    def connections(self) -> int:
        """How many lines are open."""
        return len(self._lines)

    async def take_turn(self, size: int, *, up: bool) -> None:
        """Wait for as long as bytes take that share the line with those of every other connection."""
        if self.bytes_per_s is not None:
            now = asyncio.get_running_loop().time()
            self._free_at[up] = max(now, self._free_at[up]) + size / self.bytes_per_s
            await asyncio.sleep(self._free_at[up] - now)

    def _each(self, work: "Callable[[_Line], None]") -> None:
        assert self._loop is not None
        done = threading.Event()

        def all_of_them() -> None:
            for line in list(self._lines):
                work(line)
            done.set()

        self._loop.call_soon_threadsafe(all_of_them)
        assert done.wait(30)


class _Line:
    """One connection through the proxy."""

    def __init__(self, proxy: FaultProxy, place: str, ends: tuple[asyncio.StreamWriter, asyncio.StreamWriter]) -> None:
        self.proxy, self.place, self._ends = proxy, place, ends
        self.left = proxy.resets.pop(0) if proxy.resets else _ENDLESS
        self.is_stranded = False

    def reset(self) -> None:
        for writer in self._ends:
            there = writer.get_extra_info("socket")
            with contextlib.suppress(OSError, AttributeError):
                there.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()

    def strand(self) -> None:
        self.is_stranded = True

    async def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, up: bool) -> None:
        """Carry one way until it ends."""
        waiting: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(4096)
        loop = asyncio.get_running_loop()

        async def deliver() -> None:
            while True:
                at, data = await waiting.get()
                await asyncio.sleep(max(0.0, at - loop.time()))
                while self.is_stranded or self.proxy.is_silent:
                    await asyncio.sleep(_LOOK_S)
                await self.proxy.take_turn(len(data), up=up)
                if not data:
                    writer.write_eof()
                    return
                writer.write(data)
                await writer.drain()
                (self.proxy.up if up else self.proxy.down)[self.place] += len(data)
                self.left -= len(data) if up else 0
                if self.left < 0:
                    self.reset()

        delivering = asyncio.ensure_future(deliver())
        with contextlib.suppress(OSError, asyncio.CancelledError):
            while data := await reader.read(_CHUNK):
                while self.proxy.bytes_per_s is not None and waiting.qsize() * _CHUNK >= _QUEUE:
                    await asyncio.sleep(_LOOK_S)
                await waiting.put((loop.time() + self.proxy.latency_s, data))
            await waiting.put((loop.time() + self.proxy.latency_s, b""))
        with contextlib.suppress(OSError, RuntimeError, asyncio.CancelledError):
            await delivering


@contextlib.contextmanager
def fault_proxy(*, to: str | None = None, host: str = "127.0.0.1") -> Iterator[FaultProxy]:
    """Run one.

    Args:
        to: HOST:PORT that every connection leads to, in place of CONNECT.
        host: address that it listens on.
    """
    proxy, loop = FaultProxy(), asyncio.new_event_loop()
    proxy._loop = loop

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.CancelledError, asyncio.IncompleteReadError), contextlib.closing(writer):
            if proxy.is_cut:
                writer.transport.abort()
                return
            while proxy.is_silent:
                await asyncio.sleep(_LOOK_S)
            place = to or (await reader.readuntil(b"\r\n\r\n")).split()[1].decode()
            host, _, port = place.rpartition(":")
            there_reader, there_writer = await asyncio.open_connection(host, int(port))
            with contextlib.closing(there_writer):
                if to is None:
                    writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
                for end in (writer, there_writer):
                    end.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _QUEUE)
                proxy.opened[place] += 1
                line = _Line(proxy, place, (writer, there_writer))
                proxy._lines.add(line)
                try:
                    await asyncio.gather(line.carry(reader, there_writer, up=True), line.carry(there_reader, writer, up=False))
                finally:
                    proxy._lines.discard(line)

    with serving(loop, serve, host) as proxy.port:
        yield proxy
