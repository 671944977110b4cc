"""The audit trail: who did what, in order. Rows are only ever added, and always in the transaction of what they tell of."""

import json

from sqlalchemy import Connection, RowMapping, func, insert, select, text

from pathfed_common import digest
from pathfed_server.db.database import Database
from pathfed_server.db.rows import AuditRow
from pathfed_server.db.schema import audit_event


class AuditStore(Database):
    """Reads the audit trail, and adds to it."""

    def audit(self, *, actor: str, action: str, subject: str, at: float, detail: object = None) -> None:
        """Add one event by itself, such as the start of a server; what changes the database adds its own.

        Args:
            actor: ``operator:<name>`` (``operator`` where the server has no operators by name), ``server``, ``site:<name>``, or
                ``invited:<site>`` for who has that site's invitation and is not admitted.
            action: what was done, such as ``server.started``.
            subject: to what.
            at: UTC seconds.
            detail: a JSON value. Nothing secret.
        """
        with self._write() as connection:
            add_event(connection, actor=actor, action=action, subject=subject, at=at, detail=detail)

    def audit_events(self, *, after: int = 0, until: int | None = None, limit: int | None = None) -> list[AuditRow]:
        """The events with a number above `after`, in order: up to the number `until`, and the first `limit` of them.

        Where transactions run side by side, an event may become visible after one with a greater number: follow with `event_feed`.
        """
        query = select(audit_event).where(audit_event.c.seq > after).order_by(audit_event.c.seq).limit(limit)
        if until is not None:
            query = query.where(audit_event.c.seq <= until)
        with self._read() as connection:
            rows = connection.execute(query).mappings().all()
        return [audit_row(row) for row in rows]

    def newest_event(self) -> int:
        """The number of the newest event that is visible; 0: there is none."""
        with self._read() as connection:
            return connection.execute(select(func.max(audit_event.c.seq))).scalar() or 0

    def event_writers(self) -> frozenset[str]:
        """The open transactions that have added an event; none on SQLite, where a writer waits for the one before it.

        PostgreSQL draws a number after it has locked the table for the transaction, and lets go after the transaction is visible or void.
        So whoever drew a number that is missing is named here, or has ended.
        """
        with self._read() as connection:
            if connection.dialect.name != "postgresql":
                return frozenset()
            return frozenset(connection.execute(text(_WRITERS)).scalars())


_WRITERS = """
    SELECT virtualtransaction FROM pg_locks
    WHERE locktype = 'relation' AND relation = 'audit_event'::regclass AND mode = 'RowExclusiveLock' AND granted
    AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
"""


def audit_row(row: RowMapping) -> AuditRow:
    """A row of the table as a value."""
    return AuditRow(**{**row, "detail": json.loads(row["detail"])})


def add_event(connection: Connection, *, actor: str, action: str, subject: str, at: float, detail: object = None) -> None:
    """Add an event in the caller's transaction."""
    text = digest.canonical({} if detail is None else detail).decode("ascii")
    connection.execute(insert(audit_event).values(at=at, actor=actor, action=action, subject=subject, detail=text))
