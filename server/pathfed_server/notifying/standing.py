"""How the receivers stand: for `pathfed-server notify status`."""

from collections.abc import Mapping
from typing import Any

from pathfed_server.db.event_feed import EventFeed
from pathfed_server.db.notify_rows import ReceiverRow
from pathfed_server.db.sql_store import SqlStore
from pathfed_server.notifying.kinds import KINDS, notice_of
from pathfed_server.notifying.settings import Receiver, Webhook

#: Events that are looked through for what a receiver has not been told yet.
_LOOKED_THROUGH = 100_000


def standing(store: SqlStore, each: Mapping[str, Receiver]) -> list[dict[str, Any]]:
    """Each receiver of the settings, and what it has been told."""
    kept = {row.receiver: row for row in store.receivers()}
    return [_row(store, receiver, kept.get(name)) for name, receiver in sorted(each.items())]


def _row(store: SqlStore, receiver: Receiver, row: ReceiverRow | None) -> dict[str, Any]:
    kinds = frozenset(receiver.settings.events or KINDS)
    told: dict[str, Any] = {
        "receiver": receiver.name,
        "by": "webhook" if isinstance(receiver, Webhook) else "mail",
        "to": receiver.place,
        "events": sorted(kinds),
        "state": _state(row),
        "pending": 0 if row is None else _pending(store, row.after, kinds),
    }
    names = ("attempts", "code", "began_at", "next_at", "sent", "sent_at", "given_up")
    return told | {name: None if row is None else getattr(row, name) for name in names}


def _state(row: ReceiverRow | None) -> str:
    if row is None:
        return "not begun"  # `pathfed-server start` has not run with these settings
    return "failing" if row.until is not None and row.attempts else "sending" if row.until is not None else "idle"


def _pending(store: SqlStore, after: int, kinds: frozenset[str]) -> int:
    """How many events the receiver has not been told of."""
    feed, found, looked = EventFeed(store, after), 0, 0
    while looked < _LOOKED_THROUGH and (rows := feed.read()):
        looked += len(rows)
        found += sum(notice.kind in kinds for row in rows if (notice := notice_of(row)) is not None)
    return found
