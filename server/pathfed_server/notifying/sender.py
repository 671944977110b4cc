"""Telling one receiver: collect, fix a message, send it, note it; again and again. What one receiver does holds up no other.

    after ......... the trail .......... until
      └ the message under way: fixed in the database before the first attempt, made again from the trail for each

At least once: a message is noted as delivered after it was taken, so a kill between the two repeats it under the same id. In bounds:
while a message is under way, and for `every_s` after it, events gather for the next, and a message is as large for ten thousand as for
a hundred.
"""

import logging
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from pathfed_common.errors import ErrorCode, RoundError
from pathfed_server.db.event_feed import EventFeed, EventSource
from pathfed_server.db.notify_rows import ReceiverRow
from pathfed_server.notifying.kinds import Notice, notice_of
from pathfed_server.notifying.message import Collector, Message
from pathfed_server.transport.delivery import Delivered

_LOG = logging.getLogger(__name__)
#: Events of the trail that one message looks through at most.
_MOST_EVENTS = 100_000
_PAGE = 1000
#: So many events that nobody is told of are noted as passed.
_PASS_EVERY = 1000

Value = TypeVar("Value")
#: Hands a message over; raises RoundError PF580 to PF583 when it cannot.
Deliver = Callable[[Message], Delivered]


@dataclass(frozen=True, kw_only=True)
class Pace:
    """Times of a sender, seconds.

    Attributes:
        look_s: between two looks at the trail.
        gather_s: from the first event until the message is fixed: what belongs together happens within moments.
        retry_s: before the first new attempt; doubled each time.
        longest_retry_s: what the doubling ends at.
        database_s: before a database that is away is asked again.
    """

    look_s: float = 1.0
    gather_s: float = 1.0
    retry_s: float = 5.0
    longest_retry_s: float = 900.0
    database_s: float = 5.0

    def wait_s(self, attempts: int, draw: Callable[[], float] = random.random) -> float:
        """How long to wait after so many attempts: half of it for sure, the other half drawn, so that servers do not come all at once."""
        longest = min(self.longest_retry_s, self.retry_s * 2.0 ** min(attempts - 1, 30))
        return longest * (0.5 + 0.5 * draw())


#: The times of a server.
AT_EASE = Pace()


class Places(EventSource, Protocol):
    """What a sender keeps; `db.notify_store.NotifyStore` is one."""

    def receiver(self, name: str) -> ReceiverRow:
        """See `NotifyStore`."""

    def pass_events(self, name: str, *, after: int) -> None:
        """See `NotifyStore`."""

    def begin_message(self, name: str, *, until: int, events: int, at: float) -> None:
        """See `NotifyStore`."""

    def note_failure(self, name: str, *, attempts: int, code: str, next_at: float) -> None:
        """See `NotifyStore`."""

    def note_delivery(self, name: str, *, at: float) -> None:
        """See `NotifyStore`."""

    def give_up_message(self, name: str, *, code: str, at: float) -> None:
        """See `NotifyStore`."""


@dataclass(frozen=True, kw_only=True)
class Sender:
    """Tells one receiver.

    Attributes:
        name: the receiver.
        consortium: who tells.
        kinds: what the receiver is told of.
        every_s: least time between two messages, seconds.
        give_up_s: a message is given up after so long, seconds.
        deliver: hands a message over; raises RoundError PF580 to PF583 when it cannot.
        places: the open store.
        ended: set when the sender is to end.
        pace: its times.
    """

    name: str
    consortium: str
    kinds: frozenset[str]
    every_s: float
    give_up_s: float
    deliver: Deliver
    places: Places
    ended: threading.Event
    pace: Pace = AT_EASE

    def run(self) -> None:
        """Tell until `ended`."""
        while not self.ended.is_set():
            row = self._asked(lambda: self.places.receiver(self.name))
            if row is None:
                return
            if row.until is None:
                self._begin(row)
            else:
                self._attempt(row)

    def _begin(self, row: ReceiverRow) -> None:
        """Wait for something to tell, and fix a message."""
        if row.sent_at is not None:
            self._pause(min(self.every_s, row.sent_at + self.every_s - time.time()))
        feed = EventFeed(self.places, row.after)
        collector = Collector()
        passed = row.after
        while not self.ended.is_set() and not collector.count:
            self._asked(lambda: self._collect(feed, collector))
            if not collector.count:
                if feed.after - passed >= _PASS_EVERY:
                    self._asked(lambda: self.places.pass_events(self.name, after=feed.after))
                    passed = feed.after
                self._pause(self.pace.look_s)
        self._pause(self.pace.gather_s)
        while not self.ended.is_set() and collector.count and feed.after - row.after < _MOST_EVENTS:
            before = feed.after
            self._asked(lambda: self._collect(feed, collector))
            if feed.after == before:
                break
        if collector.count:
            self._asked(lambda: self.places.begin_message(self.name, until=feed.after, events=collector.count, at=time.time()))

    def _attempt(self, row: ReceiverRow) -> None:
        """Try the message under way once."""
        if row.next_at is not None:
            self._pause(min(row.next_at - time.time(), self.pace.longest_retry_s))
        collector = None if self.ended.is_set() else self._asked(lambda: self._made_again(row))
        if collector is None:
            return
        if not collector.count:  # the receiver asks for other kinds since
            self._asked(lambda: self.places.pass_events(self.name, after=row.until or row.after))
            return
        message = collector.message(self.name, self.consortium)
        try:
            done = self.deliver(message)
        except RoundError as error:
            self._failed(row, error)
            return
        if done.refused:
            _LOG.warning("%s %s: %d recipients were refused", ErrorCode.NOTICE_REFUSED.value, self.name, done.refused)
        _LOG.info("%s: told of %d events (%s)", self.name, message.count, message.id)
        self._asked(lambda: self.places.note_delivery(self.name, at=time.time()))

    def _failed(self, row: ReceiverRow, error: RoundError) -> None:
        now, attempts, code = time.time(), row.attempts + 1, error.code.value
        if row.began_at is not None and now - row.began_at >= self.give_up_s:
            _LOG.error("%s %s: given up after %d attempts: %s", ErrorCode.NOTICE_GIVEN_UP.value, self.name, attempts, error)
            self._asked(lambda: self.places.give_up_message(self.name, code=code, at=now))
            return
        _LOG.warning("%s: attempt %d failed: %s", self.name, attempts, error)
        next_at = now + self.pace.wait_s(attempts)
        self._asked(lambda: self.places.note_failure(self.name, attempts=attempts, code=code, next_at=next_at))

    def _made_again(self, row: ReceiverRow) -> Collector:
        """What the message under way tells, from the trail; every event up to its end was there when it was fixed."""
        collector = Collector()
        after = row.after
        while after < (row.until or 0) and (rows := self.places.audit_events(after=after, until=row.until, limit=_PAGE)):
            for each in rows:
                self._add(collector, notice_of(each))
            after = rows[-1].seq
        return collector

    def _collect(self, feed: EventFeed, collector: Collector) -> None:
        for each in feed.read(_PAGE):
            self._add(collector, notice_of(each))

    def _add(self, collector: Collector, notice: Notice | None) -> None:
        """Take what the receiver asked for; of its own messages that were given up it is not told."""
        if notice is not None and notice.kind in self.kinds and (notice.kind != "notification.failed" or notice.site != self.name):
            collector.add(notice)

    def _asked(self, call: Callable[[], Value]) -> Value | None:
        """What the database answers, asked once at least and waited for while it is away; None: it was, and the sender is to end."""
        told = False
        while True:
            try:
                return call()
            except RoundError as error:
                if error.code is not ErrorCode.DATABASE_UNAVAILABLE:
                    raise
                if not told:
                    _LOG.warning("%s: %s; waiting for the database", self.name, error)
                told = True
            if self.ended.wait(self.pace.database_s):
                return None

    def _pause(self, seconds: float) -> None:
        if seconds > 0:
            self.ended.wait(seconds)
