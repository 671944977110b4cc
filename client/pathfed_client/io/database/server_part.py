"""The site's talk with the server in the site database: plans, words, own leaves and receipts, alarms, facts."""

from dataclasses import asdict
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.sqlite import insert as sqlite_insert

from pathfed_client.io.database.connection import SiteDatabase
from pathfed_client.io.database.schema import ALARM, OWN_LEAF, RECEIVED_PLAN, SERVER_FACT, WORD
from pathfed_client.io.server_records import Alarm, OwnLeaf, ReceivedPlan, Word
from pathfed_common.digest import Digest
from pathfed_common.errors import ErrorCode
from pathfed_common.provenance import cosigned


class ServerPart(SiteDatabase):
    """What came from the server, and what is on its way to it."""

    def add_received_plan(self, plan: ReceivedPlan) -> bool:
        """Keep a published plan, whose signature was checked; whether it is new. The same plan again adds the signatures it lacked.

        Raises:
            ProvenanceError: PF602, not an envelope around a plan, or around another one than before.
        """
        same = RECEIVED_PLAN.c.plan == plan.plan
        with self._transaction() as connection:
            kept = connection.execute(sa.select(RECEIVED_PLAN.c.signed_plan).where(same)).scalar()
            if kept is None:
                connection.execute(sa.insert(RECEIVED_PLAN).values(**asdict(plan)))
            elif kept != plan.signed_plan:
                connection.execute(sa.update(RECEIVED_PLAN).where(same).values(signed_plan=cosigned.merge(kept, plan.signed_plan)))
        return kept is None

    def received_plans(self) -> list[ReceivedPlan]:
        """All plans that came, the first first."""
        with self._transaction(write=False) as connection:
            rows = connection.execute(sa.select(RECEIVED_PLAN).order_by(RECEIVED_PLAN.c.at, RECEIVED_PLAN.c.plan)).all()
        return [ReceivedPlan(**row._mapping) for row in rows]

    def received_plan(self, plan: Digest) -> ReceivedPlan | None:
        """One plan by its digest, or None."""
        with self._transaction(write=False) as connection:
            row = connection.execute(sa.select(RECEIVED_PLAN).where(RECEIVED_PLAN.c.plan == plan)).one_or_none()
        return None if row is None else ReceivedPlan(**row._mapping)

    def add_word(self, envelope: bytes, leaf: bytes, at: float) -> None:
        """Put a signed word on its way to the server; the same again changes nothing. Inside `together` with the decision it is about."""
        with self._transaction() as connection:
            connection.execute(sqlite_insert(WORD).values(envelope=envelope, leaf=leaf, at=at).on_conflict_do_nothing())

    def words(self, *, waiting: bool = False) -> list[Word]:
        """All words, or those that the server has not taken, in the order they were given."""
        query = sa.select(WORD).order_by(WORD.c.id)
        with self._transaction(write=False) as connection:
            rows = connection.execute(query.where(WORD.c.taken_at.is_(None)) if waiting else query).all()
        return [_word(row) for row in rows]

    def word_taken(self, word: Word, at: float) -> None:
        """The server has taken a word: from now on its leaf must come into the log."""
        with self._transaction() as connection:
            connection.execute(sa.update(WORD).where(WORD.c.envelope == word.envelope).values(taken_at=at, code=None))
            connection.execute(sqlite_insert(OWN_LEAF).values(leaf=word.leaf, promised_at=at).on_conflict_do_nothing())

    def word_refused(self, word: Word, code: ErrorCode) -> None:
        """The server has refused a word; it stays on its way."""
        with self._transaction() as connection:
            connection.execute(sa.update(WORD).where(WORD.c.envelope == word.envelope).values(code=code.value))

    def add_own_leaf(self, leaf: bytes, promised_at: float | None) -> None:
        """Look for a leaf in the log from now on. Of one that is known already, a promise is noted that was not there before."""
        known = (OWN_LEAF.c.leaf == leaf) & OWN_LEAF.c.promised_at.is_(None) & OWN_LEAF.c.receipt.is_(None)
        with self._transaction() as connection:
            connection.execute(sqlite_insert(OWN_LEAF).values(leaf=leaf, promised_at=promised_at).on_conflict_do_nothing())
            connection.execute(sa.update(OWN_LEAF).where(known).values(promised_at=promised_at))

    def own_leaves(self, *, without_receipt: bool = False) -> list[OwnLeaf]:
        """This site's leaves, or those whose receipt has not come yet."""
        query = sa.select(OWN_LEAF).order_by(OWN_LEAF.c.promised_at, OWN_LEAF.c.leaf)
        with self._transaction(write=False) as connection:
            rows = connection.execute(query.where(OWN_LEAF.c.receipt.is_(None)) if without_receipt else query).all()
        return [OwnLeaf(**row._mapping) for row in rows]

    def put_receipt(self, leaf: bytes, receipt: bytes, at: float) -> None:
        """Keep the co-signed proof that a leaf is in the log; a receipt is for good."""
        with self._transaction() as connection:
            without = (OWN_LEAF.c.leaf == leaf) & OWN_LEAF.c.receipt.is_(None)
            connection.execute(sa.update(OWN_LEAF).where(without).values(receipt=receipt, received_at=at))

    def raise_alarm(self, alarm: Alarm) -> bool:
        """Record an alarm, unless the same one stands already; whether it is new."""
        stands = (ALARM.c.code == alarm.code.value) & (ALARM.c.subject == alarm.subject) & ALARM.c.ended_at.is_(None)
        with self._transaction() as connection:
            if connection.execute(sa.select(ALARM.c.id).where(stands)).first() is not None:
                return False
            connection.execute(sa.insert(ALARM).values(**asdict(alarm) | {"code": alarm.code.value}))
        return True

    def end_alarm(self, code: ErrorCode, subject: str, at: float) -> None:
        """Say that what an alarm was about is no longer so; the alarm stays on record."""
        stands = (ALARM.c.code == code.value) & (ALARM.c.subject == subject) & ALARM.c.ended_at.is_(None)
        with self._transaction() as connection:
            connection.execute(sa.update(ALARM).where(stands).values(ended_at=at))

    def alarms(self, *, standing: bool = True) -> list[Alarm]:
        """The alarms that stand, or all there ever were, the first first."""
        query = sa.select(ALARM).order_by(ALARM.c.id)
        with self._transaction(write=False) as connection:
            rows = connection.execute(query.where(ALARM.c.ended_at.is_(None)) if standing else query).all()
        return [_alarm(row) for row in rows]

    def set_facts(self, facts: dict[str, str]) -> None:
        """Keep what was last known of the server, by name."""
        with self._transaction() as connection:
            for name, value in facts.items():
                new = sqlite_insert(SERVER_FACT).values(name=name, value=value)
                connection.execute(new.on_conflict_do_update(index_elements=["name"], set_={"value": value}))

    def facts(self) -> dict[str, str]:
        """What was last known of the server."""
        with self._transaction(write=False) as connection:
            return {row.name: row.value for row in connection.execute(sa.select(SERVER_FACT))}


def _word(row: sa.Row[Any]) -> Word:
    fields = {name: value for name, value in row._mapping.items() if name not in ("id", "code")}
    return Word(**fields, code=None if row.code is None else ErrorCode(row.code))


def _alarm(row: sa.Row[Any]) -> Alarm:
    fields = {name: value for name, value in row._mapping.items() if name not in ("id", "code")}
    return Alarm(**fields, code=ErrorCode(row.code))
