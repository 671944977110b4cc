"""Following the audit trail: every event once, in the order of its number, and none is ever passed over.

On PostgreSQL transactions run side by side. One that drew the number 7 may still be open when number 8 is visible, and a reader that goes
on after 8 would never see 7. So a reader stops at a gap in the numbers while a transaction is open that may fill it. A gap that stays,
for its transaction was rolled back, is passed when every transaction that was open when the gap was first seen has ended; those that
began later cannot have drawn its number. Nobody is made to wait but the reader.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from pathfed_server.db.rows import AuditRow

_WRITERS_POLL_S = 0.05


class EventSource(Protocol):
    """What a feed reads from; `AuditStore` is one."""

    def audit_events(self, *, after: int = 0, until: int | None = None, limit: int | None = None) -> list[AuditRow]:
        """See `AuditStore`."""

    def newest_event(self) -> int:
        """See `AuditStore`."""

    def event_writers(self) -> frozenset[str]:
        """See `AuditStore`."""


@dataclass(frozen=True)
class _Fence:
    """Gaps up to the number `until` may be filled by `writers` alone."""

    until: int
    writers: frozenset[str]


class EventFeed:
    """The events after a number, page by page.

    Args:
        source: the open store.
        after: the number of the last event that is known.
    """

    def __init__(self, source: EventSource, after: int = 0) -> None:
        self._source = source
        self._fence: _Fence | None = None
        #: The number of the last event that was given out: where another feed resumes.
        self.after = after
        #: Whether events are visible that the last `read` held back.
        self.waiting = False

    @classmethod
    def from_now(cls, source: EventSource) -> "EventFeed":
        """The events after those that are visible now, and after those that were being written when it was called: it waits for them."""
        newest = source.newest_event()
        writers = source.event_writers()
        while writers & source.event_writers():
            time.sleep(_WRITERS_POLL_S)
        return cls(source, newest)

    def read(self, limit: int = 1000) -> list[AuditRow]:
        """The next events, `limit` at most; none when there are none yet."""
        rows = self._source.audit_events(after=self.after, limit=limit)
        found = _up_to_gap(rows, self.after)
        if len(found) < len(rows):
            found = self._at_gap(found, rows[-1].seq, limit)
        self.waiting = bool(rows) and not found
        if found:
            self.after = found[-1].seq
        return found

    def _at_gap(self, found: list[AuditRow], newest: int, limit: int) -> list[AuditRow]:
        """What can be given out, where numbers below the visible event `newest` are missing."""
        writers = self._source.event_writers()  # after the rows were read: see the module's text
        if self._fence is None or self._fence.until <= self.after:
            self._fence = _Fence(newest, writers)
        if self._fence.writers & writers:
            return found
        until, self._fence = self._fence.until, None
        return self._source.audit_events(after=self.after, until=until, limit=limit)


def _up_to_gap(rows: Sequence[AuditRow], after: int) -> list[AuditRow]:
    return [row for number, row in enumerate(rows, start=after + 1) if row.seq == number]
