"""The people who may sign approvals, and what they have signed, in the site database."""

from dataclasses import asdict

import sqlalchemy as sa

from pathfed_client.io.database.connection import SiteDatabase
from pathfed_client.io.database.schema import APPROVER, APPROVER_SIGNATURE
from pathfed_client.io.site_records import Approver, ApproverSignature
from pathfed_common.digest import Digest
from pathfed_common.provenance.keys import VerifyKey


class ApproversPart(SiteDatabase):
    """Who may sign for the site."""

    def add_approver(self, name: str, key: VerifyKey, *, at: float) -> bool:
        """Let a person sign approvals; whether that could be: the name and the key must be no other approver's."""
        with self._transaction() as connection:
            taken = APPROVER.c.removed_at.is_(None) & ((APPROVER.c.name == name) | (APPROVER.c.key == key.to_text()))
            if connection.execute(sa.select(APPROVER.c.id).where(taken)).first() is not None:
                return False
            connection.execute(sa.insert(APPROVER).values(name=name, key=key.to_text(), at=at, removed_at=None))
        return True

    def remove_approver(self, name: str, *, at: float) -> bool:
        """Let a person sign no more, and count none of their signatures from now on; whether there was one of that name."""
        here = (APPROVER.c.name == name) & APPROVER.c.removed_at.is_(None)
        with self._transaction() as connection:
            return bool(connection.execute(sa.update(APPROVER).where(here).values(removed_at=at)).rowcount)

    def approvers(self) -> list[Approver]:
        """Those who may sign, in order of their names."""
        query = sa.select(APPROVER).where(APPROVER.c.removed_at.is_(None)).order_by(APPROVER.c.name)
        with self._transaction(write=False) as connection:
            rows = connection.execute(query).all()
        return [Approver(name=row.name, key=VerifyKey.from_text(row.key), at=row.at) for row in rows]

    def add_signature(self, signature: ApproverSignature) -> None:
        """Keep an approver's signature on a plan."""
        with self._transaction() as connection:
            connection.execute(sa.insert(APPROVER_SIGNATURE).values(**asdict(signature)))

    def signatures(self, plan: Digest) -> list[ApproverSignature]:
        """The approvers' signatures on a plan, in order of time; whose they are is for the reader to verify."""
        query = sa.select(APPROVER_SIGNATURE).where(APPROVER_SIGNATURE.c.plan == plan).order_by(APPROVER_SIGNATURE.c.id)
        with self._transaction(write=False) as connection:
            rows = connection.execute(query).all()
        return [ApproverSignature(plan=row.plan, approver=row.approver, envelope=row.envelope, at=row.at) for row in rows]
