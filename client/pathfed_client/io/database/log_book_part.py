"""The site's own log book in the site database."""

from dataclasses import asdict
from typing import Any

import sqlalchemy as sa

from pathfed_client.io.database.connection import SiteDatabase
from pathfed_client.io.database.schema import EVENT
from pathfed_client.io.site_records import Event
from pathfed_common.errors import ErrorCode


class LogBookPart(SiteDatabase):
    """Lines that say what happened at this site."""

    def add_event(self, event: Event) -> None:
        """Write one line into the site's log book."""
        with self._transaction() as connection:
            connection.execute(sa.insert(EVENT).values(**event_values(event)))

    def events(self, limit: int = 100) -> list[Event]:
        """The latest lines, oldest first."""
        with self._transaction(write=False) as connection:
            rows = connection.execute(sa.select(EVENT).order_by(EVENT.c.id.desc()).limit(limit)).all()
        return [
            Event(at=row.at, kind=row.kind, code=None if row.code is None else ErrorCode(row.code), detail=row.detail)
            for row in reversed(rows)
        ]


def event_values(event: Event) -> dict[str, Any]:
    """An event as a row."""
    return asdict(event) | {"code": None if event.code is None else event.code.value}
