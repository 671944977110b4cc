"""Counting what one connection of the relay sends."""

import hashlib

from pathfed_client.egress.entry import EgressKind, Outgoing
from pathfed_common.digest import Digest

#: An entry is due after this many bytes, or this many seconds with anything sent: what a crash of the relay can leave unlisted.
ENTRY_BYTES = 64 * 2**20
ENTRY_S = 300.0


class ConnectionCount:
    """Bytes and digest of what a connection sent since its last entry. Pure: it makes entries, and stores none.

    The order is the caller's: `opened` is stored before anything is sent, `count` is told of bytes before they are sent, and an entry that
    is due is stored before more are.
    """

    def __init__(self, *, destination: str, connection: str, via: str | None, now: float) -> None:
        """Begin at nothing.

        Args:
            destination: HOST:PORT.
            connection: the connection's name, unlike any other's.
            via: HOST:PORT of the web proxy on the way, or None.
            now: any clock's seconds.
        """
        self._names = {"destination": destination, "connection": connection, "via": via}
        self._restart(now)

    def _restart(self, now: float) -> None:
        self._since, self._size, self._state = now, 0, hashlib.sha256()

    def count(self, data: bytes) -> None:
        """These bytes are about to be sent."""
        self._size += len(data)
        self._state.update(data)

    def due(self, now: float) -> bool:
        """Whether an entry is to be stored before more is sent."""
        return self._size >= ENTRY_BYTES or (self._size > 0 and now - self._since >= ENTRY_S)

    def opened(self) -> Outgoing:
        """The first entry: the connection is about to be opened."""
        return self._entry(EgressKind.CONNECTION_OPENED)

    def entry(self, now: float, *, closed: bool = False) -> Outgoing:
        """What was sent since the entry before; counts from nothing again."""
        made = self._entry(EgressKind.CONNECTION_CLOSED if closed else EgressKind.CONNECTION_SENT)
        self._restart(now)
        return made

    def _entry(self, kind: EgressKind) -> Outgoing:
        told = Digest("sha256:" + self._state.hexdigest())
        return Outgoing(kind=kind, size=self._size, digest=told, **self._names)  # type: ignore[arg-type]
