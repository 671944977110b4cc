"""Rounds in the server database: offers, what became of each site, and the commit that makes a round count."""

from collections.abc import Mapping, Sequence

from sqlalchemy import Connection, RowMapping, and_, delete, exists, insert, select, update

from pathfed_common import digest
from pathfed_common.digest import Digest
from pathfed_common.errors import ErrorCode, RoundError
from pathfed_common.ids import RunName, SiteName
from pathfed_common.provenance.documents import REVOCATION
from pathfed_common.provenance.log_leaves import AnyLeaf, EncoderCommitted, StatementLogged
from pathfed_server.db.audit_store import add_event
from pathfed_server.db.log_store import append_leaves
from pathfed_server.db.rows import RoundRow, StatementRow
from pathfed_server.db.runs_store import RunsStore, demand_attempt, demand_run, progress_of
from pathfed_server.db.schema import (
    approval,
    checkpoint,
    decision,
    participation,
    round_,
    run,
    run_site,
    site,
    update_statement,
)
from pathfed_server.db.transitions import begin_round, change_round, find_round
from pathfed_server.rounds.machine import RoundEvent
from pathfed_server.rounds.state import (
    Candidate,
    Checkpoint,
    Participation,
    ParticipationState,
    RoundOpening,
    RoundResult,
    RoundState,
    RoundTimes,
    SiteState,
)

#: How the audit trail calls outcomes whose code says more than the state.
_ACTIONS = {ErrorCode.UPDATE_LATE.value: "site.late", ErrorCode.UPDATE_NOT_NEEDED.value: "site.not_needed"}
_FIGURES = ("loss_sum", "loss_sum_std", "patients", "patients_std")


class RoundsStore(RunsStore):
    """Implements `rounds.ports.RoundStore` together with `RunsStore`, `QuarantineStore` and `StandingStore`."""

    def candidates(self, run_name: RunName) -> list[Candidate]:
        """See `rounds.ports.RoundStore`."""
        with self._read() as connection:
            plan_digest = demand_run(connection, run_name)["plan"]
            given = and_(approval.c.site == site.c.name, approval.c.plan == plan_digest)
            of_site = and_(decision.c.site == site.c.name, decision.c.plan == plan_digest)
            columns = (
                site.c.name.label("site"),
                site.c.state,
                site.c.evidence_key,
                approval.c.declared_patients,
                approval.c.reply_slots,
                approval.c.envelope.label("approval"),
                exists().where(of_site, decision.c.kind == REVOCATION).label("revoked"),
                site.c.suspended_at.is_not(None).label("suspended"),
                run_site.c.left_at.is_not(None).label("left"),
            )
            joined = run_site.join(site, run_site.c.site == site.c.name).outerjoin(approval, given)
            rows = connection.execute(select(*columns).select_from(joined).where(run_site.c.run == run_name)).mappings().all()
        # SQLite has no truth values of its own.
        found = (
            Candidate(**{**row, "state": SiteState(row["state"]), **{name: bool(row[name]) for name in ("revoked", "suspended", "left")}})
            for row in rows
        )
        return sorted(found, key=lambda candidate: candidate.site)

    def commit_initial(self, run_name: RunName, attempt: int, initial: Checkpoint, *, at: float) -> None:
        """See `rounds.ports.RoundStore`."""
        if initial.round_index != 0:
            raise ValueError(f"the initial state is round 0's, got {initial.round_index}")
        with self._write() as connection:
            demand_attempt(connection, run_name, attempt)
            if progress_of(connection, run_name).last is not None:
                raise RoundError(ErrorCode.RUN_STATE, "the run has an initial state already", where=run_name)
            connection.execute(insert(checkpoint).values(run=run_name, committed_at=at, **vars(initial)))
            add_event(connection, actor="server", action="run.initial_state", subject=run_name, at=at, detail={"state": initial.state})
            append_leaves(connection, [EncoderCommitted(run=run_name, round_index=0, state=initial.state)])

    def open_round(self, opening: RoundOpening) -> None:
        """See `rounds.ports.RoundStore`."""
        name, index, at = opening.run, opening.round_index, opening.offered_at
        with self._write() as connection:
            row = demand_attempt(connection, name, opening.attempt)
            _demand_next(connection, name, index, opening.base_state)
            begin_round(connection, row, index, opening.base_state, at=at, deadline=opening.deadline)
            _write_participations(connection, name, index, opening.participations, {})
            if opening.asks:
                asked = [each.site for each in opening.participations if each.state is ParticipationState.OFFERED]
                detail = {"deadline": opening.deadline, "sites": sorted(asked)}
                change_round(connection, row, index, RoundEvent.OFFER, at=at, detail=detail)

    def advance_round(self, run_name: RunName, attempt: int, round_index: int, event: RoundEvent, *, at: float) -> None:
        """See `rounds.ports.RoundStore`."""
        with self._write() as connection:
            change_round(connection, demand_attempt(connection, run_name, attempt), round_index, event, at=at)

    def note_participation(self, run_name: RunName, attempt: int, round_index: int, noted: Participation, *, at: float) -> None:
        """See `rounds.ports.RoundStore`."""
        with self._write() as connection:
            row = demand_attempt(connection, run_name, attempt)
            found = find_round(connection, run_name, round_index)
            # Admitted: an operator has released an update while the round was being admitted.
            if found is None or found["state"] not in (RoundState.COLLECTING, RoundState.ADMITTED):
                change_round(connection, row, round_index, RoundEvent.DECIDE, at=at)
            _write_participations(connection, run_name, round_index, [noted], {}, only=noted.site)
            offer = 0 if found is None else found["attempt"]
            detail = {"run": run_name, "round": round_index, "offer": offer, **({"code": noted.code} if noted.code else {})}
            action = _ACTIONS.get(noted.code or "", f"site.{noted.state}")
            add_event(connection, actor="server", action=action, subject=noted.site, at=at, detail=detail)

    def commit_round(self, result: RoundResult, statements: Mapping[SiteName, bytes]) -> None:
        """See `rounds.ports.RoundStore`."""
        admitted = [each.site for each in result.participations if each.state is ParticipationState.ADMITTED]
        if sorted(admitted) != sorted(statements) or sorted(admitted) != sorted(result.weights):
            raise ValueError(f"statements and weights are those of the admitted sites {admitted}")
        with self._write() as connection:
            row = demand_attempt(connection, result.run, result.attempt)
            _demand_next(connection, result.run, result.round_index, result.base_state)
            detail = {"state": result.checkpoint.state, "sites": sorted(admitted)}
            closing = {"next_state": result.checkpoint.state, "committed_at": result.committed_at, "code": None, **vars(result.times)}
            at = result.committed_at
            change_round(connection, row, result.round_index, RoundEvent.COMMIT, at=at, detail=detail, **closing)
            _write_participations(connection, result.run, result.round_index, result.participations, result.weights)
            for name, envelope in sorted(statements.items()):
                values = {"run": result.run, "round_index": result.round_index, "site": name, "digest": digest.of_bytes(envelope)}
                connection.execute(insert(update_statement).values(**values, envelope=envelope))
            connection.execute(insert(checkpoint).values(run=result.run, committed_at=result.committed_at, **vars(result.checkpoint)))
            connection.execute(update(run).where(run.c.name == result.run).values(failures=0))
            append_leaves(connection, _round_leaves(result, statements))

    def fail_round(
        self, run_name: RunName, attempt: int, round_index: int, participations: Sequence[Participation], *, code: str, at: float
    ) -> int:
        """See `rounds.ports.RoundStore`."""
        with self._write() as connection:
            row = demand_attempt(connection, run_name, attempt)
            failures = 1 + int(row["failures"])
            reasons = {each.site: each.code or each.state.value for each in participations}
            detail = {"code": code, "failures": failures, "sites": reasons}
            change_round(connection, row, round_index, RoundEvent.FAIL, at=at, detail=detail, code=code)
            _write_participations(connection, run_name, round_index, participations, {})
            connection.execute(update(run).where(run.c.name == run_name).values(failures=failures))
            if code == ErrorCode.QUORUM_LOST:
                lost = {"round": round_index, "failures": failures, "sites": reasons}
                add_event(connection, actor="server", action="quorum.lost", subject=run_name, at=at, detail=lost)
        return failures

    def rounds(self, run_name: RunName) -> list[RoundRow]:
        """The rounds of a run, in order."""
        query = select(round_).where(round_.c.run == run_name).order_by(round_.c.round_index)
        with self._read() as connection:
            return [_round_row(row) for row in connection.execute(query).mappings()]

    def participations(self, run_name: RunName, round_index: int) -> list[Participation]:
        """What became of each site in a round, in site order."""
        query = select(participation).where(participation.c.run == run_name, participation.c.round_index == round_index)
        with self._read() as connection:
            rows = connection.execute(query).mappings().all()
        return sorted((_participation(row) for row in rows), key=lambda each: each.site)

    def statements(self, run_name: RunName) -> list[StatementRow]:
        """The admitted statements of a run, by round and site."""
        query = select(update_statement).where(update_statement.c.run == run_name)
        with self._read() as connection:
            rows = [StatementRow(**dict(row)) for row in connection.execute(query).mappings()]
        return sorted(rows, key=lambda row: (row.round_index, row.site))

    def contributions(self, run_name: RunName) -> dict[SiteName, tuple[int, ...]]:
        """By site, the committed rounds of a run that its update counted in."""
        query = select(update_statement.c.site, update_statement.c.round_index).where(update_statement.c.run == run_name)
        found: dict[SiteName, list[int]] = {}
        with self._read() as connection:
            for name, index in connection.execute(query):
                found.setdefault(SiteName(name), []).append(index)
        return {name: tuple(sorted(found[name])) for name in sorted(found)}


def _round_leaves(result: RoundResult, statements: Mapping[SiteName, bytes]) -> list[AnyLeaf]:
    """The admitted statements in site order, then the state they led to."""
    run_name, index = result.run, result.round_index
    leaves: list[AnyLeaf] = [
        StatementLogged(site=name, run=run_name, round_index=index, statement=digest.of_bytes(envelope))
        for name, envelope in sorted(statements.items())
    ]
    return [*leaves, EncoderCommitted(run=run_name, round_index=index, state=result.checkpoint.state)]


def _demand_next(connection: Connection, run_name: RunName, round_index: int, base_state: Digest) -> None:
    last = progress_of(connection, run_name).last
    if last is None or (last.round_index + 1, last.state) != (round_index, base_state):
        stands = "no initial state" if last is None else f"round {last.round_index}"
        raise RoundError(
            ErrorCode.RUN_STATE,
            "a round follows the last committed one and starts from its state",
            where=run_name,
            value=f"{round_index} after {stands}",
        )


def _write_participations(
    connection: Connection,
    run_name: RunName,
    round_index: int,
    rows: Sequence[Participation],
    weights: Mapping[SiteName, float],
    *,
    only: SiteName | None = None,
) -> None:
    """Replace the round's rows, or one site's."""
    here = and_(participation.c.run == run_name, participation.c.round_index == round_index)
    connection.execute(delete(participation).where(here if only is None else and_(here, participation.c.site == only)))
    for each in rows:
        values = {**vars(each), "update_digest": each.update, "weight": weights.get(each.site)}
        del values["update"], values["figures"]
        figures = {name: each.figures.get(name) for name in _FIGURES}
        connection.execute(insert(participation).values(run=run_name, round_index=round_index, **values, **figures))


def _participation(row: RowMapping) -> Participation:
    values = {**row, "update": row["update_digest"], "state": ParticipationState(row["state"])}
    figures = {name: values.pop(name) for name in _FIGURES}
    for name in ("run", "round_index", "update_digest", "weight"):
        del values[name]
    return Participation(**values, figures={name: value for name, value in figures.items() if value is not None})


def _round_row(row: RowMapping) -> RoundRow:
    values = {**row, "state": RoundState(row["state"])}
    durations = {name: values.pop(name) for name in RoundTimes.__dataclass_fields__}
    return RoundRow(**values, times=RoundTimes(**durations) if row["exchange_s"] is not None else None)
