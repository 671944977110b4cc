"""A limit on what leaves a second, shared by all connections of the relay."""

import asyncio
import socket
import time
from contextlib import suppress

#: What may go at once after a pause, seconds of the limit.
_BURST_S = 0.25
_SHALLOW, _SEGMENT = 4 * 1024, 1460
#: Bytes a second below which a line counts as slow.
_SLOW = 2_500_000.0
_LARGEST, _SMALLEST = 64 * 1024, 512


class Bandwidth:
    """A token bucket that holds one number, whatever goes through it.

    Over any span of T seconds at most `rate * (T + _BURST_S)` bytes are let through, and one part; parts are served in the order they ask.
    """

    def __init__(self, bytes_per_s: float | None) -> None:
        """Take the limit; None: there is none.

        Raises:
            ValueError: it is not above 0.
        """
        if bytes_per_s is not None and not bytes_per_s > 0:
            raise ValueError(f"bytes_per_s must be above 0, got {bytes_per_s}")
        self._rate = bytes_per_s
        self._free_at = 0.0

    @property
    def part(self) -> int:
        """How many bytes to send at once at most, so that a slow line goes evenly."""
        return _LARGEST if self._rate is None else int(min(_LARGEST, max(_SMALLEST, self._rate * _BURST_S)))

    def shallow(self, listening: socket.socket) -> socket.socket:
        """Let what is sent to a socket of the loopback, which does not listen yet, wait at its sender and not in the kernel.

        On slow lines only. The kernel would take megabytes at once, and SuperNode, which waits 30 s for an answer from when it has written
        a request of 5 MB, would give up and send the same again, for ever.
        """
        if self._rate is not None and self._rate < _SLOW:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SHALLOW)
            with suppress(AttributeError, OSError):  # a sender's buffer grows with the size of segments, 64 kB on the loopback
                listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, _SEGMENT)
        return listening

    def delay(self, size: int, now: float) -> float:
        """Take leave for `size` bytes at `now` (any clock's seconds); how long to wait before sending them."""
        if self._rate is None:
            return 0.0
        begin = max(self._free_at, now - _BURST_S)
        self._free_at = begin + size / self._rate
        return max(0.0, begin - now)

    async def take(self, size: int) -> None:
        """Wait until `size` bytes may be sent."""
        wait = self.delay(size, time.monotonic())
        if wait > 0:
            await asyncio.sleep(wait)
