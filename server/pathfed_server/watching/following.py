"""Following: looking again and again, for as long as somebody watches, also while the database is away for a while."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from pathfed_common import interrupts
from pathfed_common.errors import ErrorCode, RoundError
from pathfed_common.ids import RunName
from pathfed_server.db.event_feed import EventFeed
from pathfed_server.db.rows import AuditRow
from pathfed_server.db.sql_store import SqlStore
from pathfed_server.rounds.state import RunState
from pathfed_server.watching.event_lines import facts_of
from pathfed_server.watching.run_view import ENDED, PACE_ROUNDS, TROUBLE, RunView, view_of

Item = TypeVar("Item")
#: How often a follower looks, seconds.
LOOK_EVERY_S = 1.0
_TROUBLES = 3


def follow(look: Callable[[], Sequence[Item]], tell: Callable[[str], None], *, every_s: float = LOOK_EVERY_S) -> Iterator[Item]:
    """What `look` finds, for ever; a database that does not answer is told of once while it lasts, and waited for.

    Raises:
        KeyboardInterrupt: this process was asked to end.
        PathfedError: what `look` raises, but for a database that is away.
    """
    away = False
    while True:
        interrupts.heed()
        try:
            found = look()
        except RoundError as error:
            if error.code is not ErrorCode.DATABASE_UNAVAILABLE:
                raise
            if not away:
                tell(f"{error.code.value} the database does not answer; waiting for it")
            away, found = True, ()
        else:
            if away:
                tell("the database answers again")
            away = False
        yield from found
        if not found:
            time.sleep(every_s)


def view(store: SqlStore, run: RunName, *, now: float) -> RunView:
    """Where a run stands.

    Raises:
        RoundError: PF510, no such run; PF512, the database is away.
    """
    return view_of(store.run_facts(run, newest=PACE_ROUNDS + 1), store.run_trouble(run, TROUBLE, newest=_TROUBLES), now=now)


class RunWatch:
    """What happens in one run.

    Args:
        store: the open store.
        run: the run.
        feed: the events from where on to watch.
    """

    def __init__(self, store: SqlStore, run: RunName, feed: EventFeed) -> None:
        self._store, self._run, self._feed = store, run, feed

    def look(self) -> Sequence[AuditRow | RunState]:
        """The next events about the run, none when there are none yet; after the last one the state that it ended in."""
        state = self._store.run(self._run).state  # before the events: whatever led to it is among them
        found = next_events(self._feed, lambda row: facts_of(row).run == self._run)
        return [state] if state in ENDED and not found and not self._feed.waiting else found


def next_events(feed: EventFeed, wanted: Callable[[AuditRow], bool]) -> list[AuditRow]:
    """The next page of a feed that holds something wanted; nothing when there is none yet.

    One page alone: were the database lost between two, what was read of the first would be lost with it.
    """
    while rows := feed.read():
        found = [row for row in rows if wanted(row)]
        if found:
            return found
    return []


def all_events(feed: EventFeed, wanted: Callable[[AuditRow], bool]) -> list[AuditRow]:
    """What is wanted of all that a feed has now."""
    found: list[AuditRow] = []
    while rows := feed.read():
        found.extend(row for row in rows if wanted(row))
    return found
