"""The site database's tables of plans: those that were received, the site's word on each, and who may sign for it.

A part of `SiteStore`, which says what holds of every method. Words and signatures are append-only by triggers of the database.
"""

import time
from contextlib import AbstractContextManager
from dataclasses import asdict
from typing import Any

import sqlalchemy as sa

from pathfed_client.io.site_records import ApprovalState, Approver, ApproverSignature, ReceivedPlan, StoredApproval
from pathfed_common.digest import Digest
from pathfed_common.plan import plan_from_bytes
from pathfed_common.provenance import cosigned
from pathfed_common.provenance.keys import VerifyKey

META = sa.MetaData()

_APPROVAL = sa.Table(
    "approval",
    META,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("plan", sa.Text, nullable=False, index=True),
    sa.Column("signed_plan", sa.LargeBinary, nullable=False),
    sa.Column("signed_approval", sa.LargeBinary, nullable=False),
    sa.Column("declared_patients", sa.Integer, nullable=False),
    sa.Column("at", sa.Float, nullable=False),
    sa.Column("state", sa.Text, nullable=False),
    sqlite_autoincrement=True,
)

_RECEIVED = sa.Table(
    "received_plan",
    META,
    sa.Column("plan", sa.Text, primary_key=True),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("signed_plan", sa.LargeBinary, nullable=False),
    sa.Column("at", sa.Float, nullable=False),
)

_APPROVER = sa.Table(
    "approver",
    META,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("key", sa.Text, nullable=False),
    sa.Column("at", sa.Float, nullable=False),
    sa.Column("removed_at", sa.Float),
    sa.Index("approver_name", "name", unique=True, sqlite_where=sa.text("removed_at IS NULL")),
    sa.Index("approver_key", "key", unique=True, sqlite_where=sa.text("removed_at IS NULL")),
    sqlite_autoincrement=True,
)

_SIGNATURE = sa.Table(
    "approver_signature",
    META,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("plan", sa.Text, nullable=False, index=True),
    sa.Column("approver", sa.Text, nullable=False),
    sa.Column("envelope", sa.LargeBinary, nullable=False),
    sa.Column("at", sa.Float, nullable=False),
    sqlite_autoincrement=True,
)

#: Tables whose rows are never changed or deleted.
APPEND_ONLY = ("approval", "approver_signature")


class PlanTables:
    """What a site knows of plans, and has said about them."""

    def _transaction(self, *, write: bool = True) -> AbstractContextManager[sa.Connection]:
        """One transaction of the site database."""
        raise NotImplementedError  # SiteStore's

    # Plans

    def add_received_plan(self, signed_plan: bytes, *, at: float | None = None) -> Digest:
        """Keep a signed plan for people to decide on. The same plan again adds the signatures that it did not have.

        Whose signatures these are is not looked at here: whoever shows a plan or approves it opens it with the server's key.

        Args:
            signed_plan: the envelope, as it was received.
            at: UTC seconds; now if not given.

        Raises:
            ProvenanceError: PF602, not an envelope.
            PlanError: PF1xx, not a plan of this version.
        """
        payload = cosigned.parse(signed_plan, where="received plan").payload
        plan = plan_from_bytes(payload, where="received plan")
        values = {"plan": plan.digest, "name": plan.name, "signed_plan": signed_plan, "at": time.time() if at is None else at}
        same = _RECEIVED.c.plan == plan.digest
        with self._transaction() as connection:
            kept = connection.execute(sa.select(_RECEIVED.c.signed_plan).where(same)).scalar()
            if kept is None:
                connection.execute(sa.insert(_RECEIVED).values(**values))
            elif kept != signed_plan:
                connection.execute(sa.update(_RECEIVED).where(same).values(signed_plan=cosigned.merge(kept, signed_plan)))
        return plan.digest

    def received_plans(self) -> list[ReceivedPlan]:
        """Every plan that was received, in order of time."""
        with self._transaction(write=False) as connection:
            rows = connection.execute(sa.select(_RECEIVED).order_by(_RECEIVED.c.at, _RECEIVED.c.plan)).all()
        return [ReceivedPlan(**row._mapping) for row in rows]

    # The site's word

    def add_approval(self, approval: StoredApproval) -> None:
        """Record the site's word on a plan; the latest word on a plan counts, earlier ones are kept."""
        with self._transaction() as connection:
            connection.execute(sa.insert(_APPROVAL).values(**asdict(approval) | {"state": approval.state.value}))

    def approval(self, plan: Digest) -> StoredApproval | None:
        """The latest word on a plan, or None."""
        query = sa.select(_APPROVAL).where(_APPROVAL.c.plan == plan).order_by(_APPROVAL.c.id.desc()).limit(1)
        with self._transaction(write=False) as connection:
            row = connection.execute(query).one_or_none()
        return None if row is None else _approval(row)

    def approvals(self) -> list[StoredApproval]:
        """The latest word on each plan, in order of time."""
        latest = sa.select(sa.func.max(_APPROVAL.c.id)).group_by(_APPROVAL.c.plan)
        return self._words(sa.select(_APPROVAL).where(_APPROVAL.c.id.in_(latest)).order_by(_APPROVAL.c.id))

    def words(self) -> list[StoredApproval]:
        """Every word on every plan, in order of time."""
        return self._words(sa.select(_APPROVAL).order_by(_APPROVAL.c.id))

    def _words(self, query: sa.Select[Any]) -> list[StoredApproval]:
        with self._transaction(write=False) as connection:
            return [_approval(row) for row in connection.execute(query).all()]

    # Approvers

    def add_approver(self, name: str, key: VerifyKey, *, at: float) -> bool:
        """Let a person sign approvals; whether that could be: the name and the key must be no other approver's."""
        with self._transaction() as connection:
            taken = _APPROVER.c.removed_at.is_(None) & ((_APPROVER.c.name == name) | (_APPROVER.c.key == key.to_text()))
            if connection.execute(sa.select(_APPROVER.c.id).where(taken)).first() is not None:
                return False
            connection.execute(sa.insert(_APPROVER).values(name=name, key=key.to_text(), at=at, removed_at=None))
        return True

    def remove_approver(self, name: str, *, at: float) -> bool:
        """Let a person sign no more, and count none of their signatures from now on; whether there was one of that name."""
        here = (_APPROVER.c.name == name) & _APPROVER.c.removed_at.is_(None)
        with self._transaction() as connection:
            return bool(connection.execute(sa.update(_APPROVER).where(here).values(removed_at=at)).rowcount)

    def approvers(self) -> list[Approver]:
        """Those who may sign, in order of their names."""
        query = sa.select(_APPROVER).where(_APPROVER.c.removed_at.is_(None)).order_by(_APPROVER.c.name)
        with self._transaction(write=False) as connection:
            rows = connection.execute(query).all()
        return [Approver(name=row.name, key=VerifyKey.from_text(row.key), at=row.at) for row in rows]

    def add_signature(self, signature: ApproverSignature) -> None:
        """Keep an approver's signature on a plan."""
        with self._transaction() as connection:
            connection.execute(sa.insert(_SIGNATURE).values(**asdict(signature)))

    def signatures(self, plan: Digest) -> list[ApproverSignature]:
        """The approvers' signatures on a plan, in order of time; whose they are is for the reader to verify."""
        query = sa.select(_SIGNATURE).where(_SIGNATURE.c.plan == plan).order_by(_SIGNATURE.c.id)
        with self._transaction(write=False) as connection:
            rows = connection.execute(query).all()
        return [ApproverSignature(plan=row.plan, approver=row.approver, envelope=row.envelope, at=row.at) for row in rows]


def triggers() -> list[str]:
    """What keeps append-only tables so."""
    return [
        f"CREATE TRIGGER {table}_no_{what.lower()} BEFORE {what} ON {table} BEGIN SELECT RAISE(ABORT, '{table} is append-only'); END"
        for table in APPEND_ONLY
        for what in ("UPDATE", "DELETE")
    ]


def _approval(row: sa.Row[Any]) -> StoredApproval:
    fields = {name: value for name, value in row._mapping.items() if name not in ("id", "state")}
    return StoredApproval(**fields, state=ApprovalState(row.state))
