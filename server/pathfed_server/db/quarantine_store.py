"""Updates that were set aside, in the server database, and what an operator releases of them."""

from sqlalchemy import RowMapping, and_, insert, select, update

from pathfed_common.errors import ErrorCode, RoundError
from pathfed_common.ids import RunName
from pathfed_server.db.audit_store import add_event
from pathfed_server.db.rows import QuarantineRow
from pathfed_server.db.runs_store import RunsStore, demand_attempt, demand_run
from pathfed_server.db.schema import quarantine
from pathfed_server.db.transitions import find_round
from pathfed_server.rounds.machine import UNDER_WAY
from pathfed_server.rounds.refusals import RELEASABLE
from pathfed_server.rounds.state import Quarantined, RoundState

#: While a round is in one of these states, the round loop takes up what is released for it.
_OPEN_ROUND = (UNDER_WAY - {RoundState.ADMITTED}) | {RoundState.FAILED}
_RELEASE = ("released_at", "released_by", "release_reason")


class QuarantineStore(RunsStore):
    """What was set aside, and what became of it."""

    def note_quarantine(self, attempt: int, quarantined: Quarantined) -> None:
        """See `rounds.ports.RoundStore`."""
        values = {**vars(quarantined), "update_digest": quarantined.update}
        del values["update"]
        key = ("run", "round_index", "site", "update_digest", "code")
        with self._write() as connection:
            demand_attempt(connection, quarantined.run, attempt)
            same = and_(*(quarantine.c[column] == values[column] for column in key))
            if connection.execute(select(quarantine.c.seq).where(same)).scalar() is not None:
                return
            connection.execute(insert(quarantine).values(values))
            detail = {"run": quarantined.run, "round": quarantined.round_index, "code": quarantined.code, "update": quarantined.update}
            add_event(connection, actor="server", action="update.quarantined", subject=quarantined.site, at=quarantined.at, detail=detail)

    def quarantined(self, run_name: RunName) -> list[Quarantined]:
        """The updates of a run that were set aside, in order of arrival."""
        return [row.aside for row in self.quarantine(run_name)]

    def quarantine(self, run_name: RunName | None = None) -> list[QuarantineRow]:
        """The entries of one run or of all, in order of arrival.

        Raises:
            RoundError: PF510, no such run.
        """
        query = select(quarantine).order_by(quarantine.c.seq)
        with self._read() as connection:
            if run_name is not None:
                demand_run(connection, run_name)
                query = query.where(quarantine.c.run == run_name)
            return [_row(row) for row in connection.execute(query).mappings()]

    def quarantine_entry(self, number: int) -> QuarantineRow:
        """One entry.

        Raises:
            RoundError: PF567, no such entry.
        """
        with self._read() as connection:
            return _found(connection.execute(select(quarantine).where(quarantine.c.seq == number)).mappings().first(), number)

    def release_quarantined(self, number: int, *, reason: str, at: float, by: str = "operator") -> QuarantineRow:
        """Let an update count that was refused for its norm or for coming late; every other check is made again when it is taken up.

        Releasing it again changes nothing.

        Raises:
            RoundError: PF567, no such entry; PF566, it was refused for another reason, or its round is admitted or committed.
        """
        with self._write() as connection:
            query = select(quarantine).where(quarantine.c.seq == number)
            row = _found(connection.execute(query).mappings().first(), number)
            aside = row.aside
            # The run's lock: between this and the loop's next word nothing else happens to the round.
            run_row = demand_run(connection, aside.run, lock=True)
            if row.released_at is not None:
                return row
            found = find_round(connection, aside.run, aside.round_index)
            state = None if found is None else RoundState(found["state"])
            if aside.code not in RELEASABLE:
                raise _refused(row, f"an update that was refused with {aside.code} is never released")
            if state not in _OPEN_ROUND:
                raise _refused(row, f"its round is {state}")
            values = {"released_at": at, "released_by": by, "release_reason": reason}
            connection.execute(update(quarantine).where(quarantine.c.seq == number).values(values))
            detail = {
                "run": aside.run,
                "attempt": run_row["attempt"],
                "round": aside.round_index,
                "entry": number,
                "code": aside.code,
                "update": aside.update,
                "reason": reason,
            }
            add_event(connection, actor=by, action="quarantine.released", subject=aside.site, at=at, detail=detail)
            return _found(connection.execute(query).mappings().first(), number)

    def released(self, run_name: RunName, round_index: int) -> list[Quarantined]:
        """See `rounds.ports.RoundStore`."""
        here = and_(quarantine.c.run == run_name, quarantine.c.round_index == round_index, quarantine.c.released_at.is_not(None))
        with self._read() as connection:
            rows = connection.execute(select(quarantine).where(here).order_by(quarantine.c.seq)).mappings().all()
        return [_row(row).aside for row in rows]


def _row(row: RowMapping) -> QuarantineRow:
    values = {**row, "update": row["update_digest"]}
    released = {name: values.pop(name) for name in _RELEASE}
    number = values.pop("seq")
    del values["update_digest"]
    return QuarantineRow(number=number, aside=Quarantined(**values), **released)


def _found(row: RowMapping | None, number: int) -> QuarantineRow:
    if row is None:
        raise RoundError(ErrorCode.QUARANTINE_UNKNOWN, "no entry of this number is in quarantine", value=number)
    return _row(row)


def _refused(row: QuarantineRow, why: str) -> RoundError:
    where = f"{row.aside.run}, round {row.aside.round_index}, {row.aside.site}"
    return RoundError(ErrorCode.RELEASE_REFUSED, f"the update cannot be released: {why}", where=where, value=row.number)
