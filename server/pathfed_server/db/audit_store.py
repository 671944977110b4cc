"""The audit trail: who did what, in order. Rows are only ever added, and always in the transaction of what they tell of."""

import json

from sqlalchemy import Connection, insert, select

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

    def audit_events(self, *, after: int = 0) -> list[AuditRow]:
        """The events with a number above `after`, in order."""
        query = select(audit_event).where(audit_event.c.seq > after).order_by(audit_event.c.seq)
        with self._read() as connection:
            rows = connection.execute(query).mappings().all()
        return [AuditRow(**{**row, "detail": json.loads(row["detail"])}) for row in rows]


def add_event(connection: Connection, *, actor: str, action: str, subject: str, at: float, detail: object = None) -> None:
    """Add an event in the caller's transaction."""
    text = digest.canonical({} if detail is None else detail).decode("ascii")
    connection.execute(insert(audit_event).values(at=at, actor=actor, action=action, subject=subject, detail=text))
