"""How far each receiver of notifications has been told. What it is told is the audit trail itself, so only places in it are kept here.

A message is fixed, as a stretch of the trail, before it is sent, and marked when it has arrived: whoever is killed between the two sends
the same message again, under the same name.
"""

from collections.abc import Collection

from sqlalchemy import Connection, delete, insert, select, update

from pathfed_server.db.audit_store import AuditStore, add_event
from pathfed_server.db.notify_rows import ReceiverRow
from pathfed_server.db.schema import notification

_NONE_UNDER_WAY = {"until": None, "events": 0, "began_at": None, "attempts": 0, "next_at": None}


class NotifyStore(AuditStore):
    """Implements `notifying.sender.Places`."""

    def receivers(self) -> list[ReceiverRow]:
        """Every receiver that was ever kept and not forgotten, in name order."""
        with self._read() as connection:
            rows = connection.execute(select(notification).order_by(notification.c.receiver)).mappings().all()
        return [ReceiverRow(**row) for row in rows]

    def receiver(self, name: str) -> ReceiverRow:
        """One receiver, which is kept."""
        with self._read() as connection:
            return ReceiverRow(**connection.execute(select(notification).where(notification.c.receiver == name)).mappings().one())

    def keep_receivers(self, names: Collection[str], *, after: int) -> None:
        """Begin with receivers that are new, after the event of that number, and forget those that are not named."""
        with self._write() as connection:
            known = set(connection.execute(select(notification.c.receiver)).scalars())
            connection.execute(delete(notification).where(notification.c.receiver.in_(known.difference(names))))
            for name in sorted(set(names) - known):
                connection.execute(insert(notification).values(receiver=name, after=after, sent=0, given_up=0, **_NONE_UNDER_WAY))

    def pass_events(self, name: str, *, after: int) -> None:
        """Note that nothing up to that event is for the receiver; no message is under way then."""
        with self._write() as connection:
            _set(connection, name, after=after, **_NONE_UNDER_WAY)

    def begin_message(self, name: str, *, until: int, events: int, at: float) -> None:
        """Fix the message that is sent next."""
        with self._write() as connection:
            _set(connection, name, until=until, events=events, began_at=at, attempts=0, next_at=None)

    def note_failure(self, name: str, *, attempts: int, code: str, next_at: float) -> None:
        """Note that the message under way could not be delivered, and when it is tried again."""
        with self._write() as connection:
            _set(connection, name, attempts=attempts, code=code, next_at=next_at)

    def note_delivery(self, name: str, *, at: float) -> None:
        """Note that the message under way has arrived."""
        with self._write() as connection:
            _set(
                connection,
                name,
                after=notification.c.until,
                sent=notification.c.sent + 1,
                sent_at=at,
                code=None,
                **_NONE_UNDER_WAY,
            )

    def give_up_message(self, name: str, *, code: str, at: float) -> None:
        """Give the message under way up, which the audit trail tells: of which events, and why."""
        with self._write() as connection:
            row = connection.execute(select(notification).where(notification.c.receiver == name)).mappings().one()
            _set(connection, name, after=row["until"], given_up=row["given_up"] + 1, code=code, **_NONE_UNDER_WAY)
            detail = {"code": code, "events": row["events"], "after": row["after"], "until": row["until"], "attempts": row["attempts"]}
            add_event(connection, actor="server", action="notification.failed", subject=name, at=at, detail=detail)


def _set(connection: Connection, name: str, **values: object) -> None:
    connection.execute(update(notification).where(notification.c.receiver == name).values(**values))
