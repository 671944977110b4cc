"""The privacy ledger's entries and the sealed updates in the site database."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from pathfed_client.io.database.connection import SiteDatabase, file_is_damaged
from pathfed_client.io.database.schema import LEDGER, SEALED
from pathfed_client.io.database.withdrawals_part import COUNT
from pathfed_client.io.site_records import SealedUpdate, WithdrawnMeanwhileError
from pathfed_common import digest
from pathfed_common.digest import Digest
from pathfed_common.errors import ErrorCode, HostError, PrivacyError, ProvenanceError, TransportError
from pathfed_common.ids import RunName
from pathfed_common.provenance import dsse


class LedgerPart(SiteDatabase):
    """The ledger's storage port (`entries`, `append`), and sealed updates with the heads their statements name."""

    def __init__(self, path: Path) -> None:
        """Open the database; see `SiteDatabase`."""
        super().__init__(path)
        self._stated: dict[Digest, Digest] = {}

    def entries(self) -> list[bytes]:
        """All ledger entries in order of their sequence numbers.

        Raises:
            PrivacyError: PF304, the database file is torn or damaged.
        """
        try:
            with self._transaction(write=False) as connection:
                return list(connection.execute(sa.select(LEDGER.c.entry).order_by(LEDGER.c.sequence)).scalars())
        except HostError as error:
            if not file_is_damaged(error.__cause__):
                raise
            remedy = "do not train at this site, restore no older copy, keep the file as evidence, and find out what happened to the disk"
            raise PrivacyError(
                ErrorCode.LEDGER_DAMAGED, "the ledger cannot be read: the site database is damaged", where=self.path, remedy=remedy
            ) from error

    def append(self, sequence: int, entry: bytes) -> None:
        """Add one ledger entry; on the disk when this returns.

        Raises:
            PrivacyError: the number is taken or leaves a gap (PF304): another process appended, or the ledger was tampered with.
        """
        try:
            with self._transaction() as connection:
                connection.execute(sa.insert(LEDGER).values(sequence=sequence, entry=entry))
        except HostError as error:
            if not isinstance(error.__cause__, sa.exc.IntegrityError):
                raise
            raise PrivacyError(
                ErrorCode.LEDGER_DAMAGED,
                "the ledger takes entries at its end only",
                where=self.path,
                value=f"sequence {sequence}",
                remedy="run one client per site home, then `pathfed-site ledger verify`",
            ) from error

    def stated_heads(self) -> list[Digest]:
        """The ledger's head that each sealed update's statement names, of all runs, in no order.

        Raises:
            ProvenanceError: PF601, PF602, a stored statement cannot be read.
        """
        with self._transaction(write=False) as connection:
            stored = connection.execute(sa.select(SEALED.c.statement)).scalars().all()
        return [self._stated_head(envelope) for envelope in stored]

    def _stated_head(self, envelope: bytes) -> Digest:
        """Read once a process: there is a statement for every round ever, and they are asked for at every charge."""
        name = digest.of_bytes(envelope)
        if name not in self._stated:
            try:
                # Its one field: reading the whole statement takes three times as long.
                self._stated[name] = digest.parse(json.loads(dsse.parse(envelope).payload)["predicate"]["ledger_head"])
            except (ValueError, TypeError, KeyError) as error:
                what = f"a stored statement cannot be read: {error}"
                raise ProvenanceError(ErrorCode.RECORD_CHANGED, what, where=self.path) from None
        return self._stated[name]

    def put_sealed(self, sealed: SealedUpdate, *, withdrawn: int | None = None) -> None:
        """Keep a finished round's answer. Storing the same answer twice changes nothing.

        Args:
            sealed: the answer.
            withdrawn: number of withdrawn names that its cohort knew of; None where the answer rests on no cohort.

        Raises:
            WithdrawnMeanwhileError: there are more by now; nothing is stored. Compared and stored in one transaction: a withdrawal comes
                before an answer, and then counts for it, or after it.
            TransportError: the round was already answered otherwise (PF409).
        """
        with self._transaction() as connection:
            found = connection.execute(_one_sealed(sealed.run, sealed.round_index)).one_or_none()
            if found is None and withdrawn is not None and connection.execute(COUNT).scalar_one() != withdrawn:
                raise WithdrawnMeanwhileError
            if found is None:
                connection.execute(sa.insert(SEALED).values(**asdict(sealed)))
            elif (found.statement, found.update) != (sealed.statement, sealed.update):
                raise TransportError(
                    ErrorCode.ROUND_OUT_OF_ORDER,
                    "this round was already answered with another update",
                    where=f"run {sealed.run}, round {sealed.round_index}",
                )

    def get_sealed(self, run: str, round_index: int) -> SealedUpdate | None:
        """The answer to a round, or None when it was not answered yet."""
        with self._transaction(write=False) as connection:
            row = connection.execute(_one_sealed(run, round_index)).one_or_none()
        return None if row is None else _sealed(row)

    def sealed_rounds(self) -> dict[RunName, int]:
        """The latest answered round of each run."""
        query = sa.select(SEALED.c.run, sa.func.max(SEALED.c.round_index)).group_by(SEALED.c.run)
        with self._transaction(write=False) as connection:
            return {RunName(run): index for run, index in connection.execute(query)}

    def last_sealed(self, run: str) -> SealedUpdate | None:
        """The answer to the latest answered round of a run, or None."""
        query = sa.select(SEALED).where(SEALED.c.run == run).order_by(SEALED.c.round_index.desc()).limit(1)
        with self._transaction(write=False) as connection:
            row = connection.execute(query).one_or_none()
        return None if row is None else _sealed(row)


def _one_sealed(run: str, round_index: int) -> sa.Select[Any]:
    return sa.select(SEALED).where((SEALED.c.run == run) & (SEALED.c.round_index == round_index))


def _sealed(row: sa.Row[Any]) -> SealedUpdate:
    return SealedUpdate(**row._mapping)
