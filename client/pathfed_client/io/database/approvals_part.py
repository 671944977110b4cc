"""Approvals in the site database."""

from dataclasses import asdict
from typing import Any

import sqlalchemy as sa

from pathfed_client.io.database.connection import SiteDatabase
from pathfed_client.io.database.schema import APPROVAL
from pathfed_client.io.site_records import ApprovalState, StoredApproval
from pathfed_common.digest import Digest


class ApprovalsPart(SiteDatabase):
    """The site's word on plans."""

    def add_approval(self, approval: StoredApproval) -> None:
        """Record the site's word on a plan; the latest word on a plan counts, earlier ones are kept."""
        with self._transaction() as connection:
            connection.execute(sa.insert(APPROVAL).values(**asdict(approval) | {"state": approval.state.value}))

    def approval(self, plan: Digest) -> StoredApproval | None:
        """The latest word on a plan, or None."""
        query = sa.select(APPROVAL).where(APPROVAL.c.plan == plan).order_by(APPROVAL.c.id.desc()).limit(1)
        with self._transaction(write=False) as connection:
            row = connection.execute(query).one_or_none()
        return None if row is None else _approval(row)

    def approvals(self) -> list[StoredApproval]:
        """The latest word on each plan, in order of time."""
        latest = sa.select(sa.func.max(APPROVAL.c.id)).group_by(APPROVAL.c.plan)
        with self._transaction(write=False) as connection:
            rows = connection.execute(sa.select(APPROVAL).where(APPROVAL.c.id.in_(latest)).order_by(APPROVAL.c.id)).all()
        return [_approval(row) for row in rows]


def _approval(row: sa.Row[Any]) -> StoredApproval:
    fields = {name: value for name, value in row._mapping.items() if name not in ("id", "state")}
    return StoredApproval(**fields, state=ApprovalState(row.state))
