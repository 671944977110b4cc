"""Withdrawals in the site database: names that are out for good."""

from collections.abc import Collection

import sqlalchemy as sa
from sqlalchemy.dialects.sqlite import insert as sqlite_insert

from pathfed_client.cohort.withdrawal import Withdrawn, WithdrawnKind
from pathfed_client.io.database.connection import SiteDatabase
from pathfed_client.io.database.log_book_part import event_values
from pathfed_client.io.database.schema import EVENT, SLIDE, WITHDRAWAL
from pathfed_client.io.site_records import Event, SlideStatus
from pathfed_common.errors import ErrorCode

COUNT = sa.select(sa.func.count()).select_from(WITHDRAWAL)


class WithdrawalsPart(SiteDatabase):
    """What was withdrawn."""

    def withdraw(self, names: Collection[Withdrawn], event: Event) -> int:
        """Record withdrawals, take the patients' slides out and note it in the log book: at once and together.

        Slides withdrawn by path or contents are found by those who make a cohort (`io.site_cohort`), which have the key of the names.

        Returns:
            How many names are new.
        """
        values = [{"kind": one.kind.value, "name": one.name, "at": event.at} for one in sorted(names, key=lambda one: (one.kind, one.name))]
        patients = [{"withdrawn": one.name} for one in names if one.kind is WithdrawnKind.PATIENT]
        out = {"status": SlideStatus.REFUSED.value, "reason": ErrorCode.SLIDE_WITHDRAWN.value, "detail": "withdrawn"}
        of_patient = (SLIDE.c.patient == sa.bindparam("withdrawn")) & (SLIDE.c.status != SlideStatus.MISSING.value)
        with self._transaction() as connection:
            before = connection.execute(COUNT).scalar_one()
            if values:
                connection.execute(sqlite_insert(WITHDRAWAL).on_conflict_do_nothing(), values)
            if patients:
                connection.execute(sa.update(SLIDE).where(of_patient).values(**out), patients)
            connection.execute(sa.insert(EVENT).values(**event_values(event)))
            new: int = connection.execute(COUNT).scalar_one() - before
        return new

    def withdrawn(self) -> frozenset[Withdrawn]:
        """All names that were ever withdrawn. They are never taken back, so their number says whether something was added."""
        with self._transaction(write=False) as connection:
            rows = connection.execute(sa.select(WITHDRAWAL.c.kind, WITHDRAWAL.c.name)).all()
        return frozenset(Withdrawn(WithdrawnKind(row.kind), row.name) for row in rows)
