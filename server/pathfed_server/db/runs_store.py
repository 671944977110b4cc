"""Runs in the server database: planned by the operator, taken up by the loop."""

from collections.abc import Sequence

from sqlalchemy import Connection, RowMapping, func, insert, select, update

from pathfed_common.digest import Digest
from pathfed_common.errors import ErrorCode, RoundError
from pathfed_common.ids import RunName, SiteName
from pathfed_server.db.audit_store import add_event
from pathfed_server.db.rows import RunRow
from pathfed_server.db.schema import checkpoint, plan, run, run_site, site
from pathfed_server.db.sites_store import SitesStore
from pathfed_server.rounds.state import Checkpoint, RunProgress, RunState


class RunsStore(SitesStore):
    """Which runs there are, and where each stands."""

    def create_run(self, name: RunName, *, plan_digest: Digest, sites: Sequence[SiteName], at: float, by: str = "operator") -> None:
        """Plan a run over the given sites.

        Raises:
            RoundError: PF520, the name is taken; PF516, no such plan; PF501, no such site.
        """
        with self._write() as connection:
            if connection.dialect.name == "postgresql":
                connection.exec_driver_sql("LOCK TABLE run IN SHARE ROW EXCLUSIVE MODE")
            if connection.execute(select(run.c.name).where(run.c.name == name)).scalar() is not None:
                raise RoundError(ErrorCode.RUN_EXISTS, "a run of this name exists", value=name, remedy="choose another name")
            if connection.execute(select(plan.c.digest).where(plan.c.digest == plan_digest)).scalar() is None:
                raise RoundError(ErrorCode.PLAN_UNKNOWN, "no plan with this digest is published", value=plan_digest)
            known = set(connection.execute(select(site.c.name)).scalars())
            for listed in sites:
                if listed not in known:
                    raise RoundError(ErrorCode.SITE_UNKNOWN, "no site of this name is enrolled", value=listed)
            values = {"name": name, "plan": plan_digest, "state": RunState.PLANNED, "attempt": 0, "failures": 0, "planned_at": at}
            connection.execute(insert(run).values(values))
            names = sorted(set(sites))
            if names:
                connection.execute(insert(run_site), [{"run": name, "site": listed} for listed in names])
            add_event(connection, actor=by, action="run.planned", subject=name, at=at, detail={"plan": plan_digest, "sites": names})

    def run(self, name: RunName) -> RunRow:
        """One run.

        Raises:
            RoundError: PF510, no such run.
        """
        with self._read() as connection:
            return _run_row(connection, demand_run(connection, name))

    def runs(self) -> list[RunRow]:
        """Every run, the oldest first."""
        with self._read() as connection:
            rows = connection.execute(select(run).order_by(run.c.planned_at, run.c.name)).mappings().all()
            return [_run_row(connection, row) for row in rows]

    def stop_run(self, name: RunName, *, at: float, by: str = "operator") -> None:
        """Stop a planned or running run: its loop ends at its next word to the store. Stopping it again changes nothing.

        Raises:
            RoundError: PF510, no such run; PF511, it has finished or failed.
        """
        self._operate(name, RunState.STOPPED, (RunState.PLANNED, RunState.RUNNING), action="run.stopped", at=at, by=by)

    def reopen_run(self, name: RunName, *, at: float, by: str = "operator") -> None:
        """Let a stopped or failed run be taken up again from its last committed round, its failed attempts forgotten.

        Raises:
            RoundError: PF510, no such run; PF511, it is running or finished.
        """
        self._operate(name, RunState.PLANNED, (RunState.STOPPED, RunState.FAILED), action="run.reopened", at=at, by=by)

    def begin_attempt(self, name: RunName, *, at: float) -> RunProgress:
        """See `rounds.ports.RoundStore`."""
        with self._write() as connection:
            row = demand_run(connection, name, lock=True)
            if row["state"] not in (RunState.PLANNED, RunState.RUNNING):
                raise _wrong_state(name, row["state"], "taken up", remedy="reopen a stopped or failed run first; a finished one has ended")
            started = at if row["started_at"] is None else row["started_at"]
            attempt = row["attempt"] + 1
            connection.execute(
                update(run)
                .where(run.c.name == name)
                .values(state=RunState.RUNNING, attempt=attempt, started_at=started, ended_at=None, code=None)
            )
            add_event(connection, actor="server", action="run.taken_up", subject=name, at=at, detail={"attempt": attempt})
            return progress_of(connection, name)

    def progress(self, name: RunName) -> RunProgress:
        """See `rounds.ports.RoundStore`."""
        with self._read() as connection:
            return progress_of(connection, name)

    def finish_run(self, name: RunName, attempt: int, *, at: float) -> None:
        """See `rounds.ports.RoundStore`."""
        self._end(name, attempt, RunState.FINISHED, code=None, at=at)

    def fail_run(self, name: RunName, attempt: int, *, code: str, at: float) -> None:
        """See `rounds.ports.RoundStore`."""
        self._end(name, attempt, RunState.FAILED, code=code, at=at)

    def give_up(self, name: RunName, *, code: str, at: float) -> None:
        """Mark a run failed that is planned or running, whether or not a loop ever took it up; any other run stays as it is.

        Raises:
            RoundError: PF510, no such run.
        """
        with self._write() as connection:
            if demand_run(connection, name, lock=True)["state"] in (RunState.PLANNED, RunState.RUNNING):
                _note_end(connection, name, RunState.FAILED, code=code, at=at)

    def checkpoints(self, name: RunName) -> list[Checkpoint]:
        """The checkpoints of a run, the initial state's first."""
        query = select(checkpoint).where(checkpoint.c.run == name).order_by(checkpoint.c.round_index)
        with self._read() as connection:
            return [_checkpoint(row) for row in connection.execute(query).mappings()]

    def _operate(self, name: RunName, to: RunState, allowed: Sequence[RunState], *, action: str, at: float, by: str) -> None:
        with self._write() as connection:
            row = demand_run(connection, name, lock=True)
            if row["state"] == to:
                return
            if row["state"] not in allowed:
                raise _wrong_state(name, row["state"], action.removeprefix("run."), remedy=f"only a {' or '.join(allowed)} run can be")
            ended = at if to is RunState.STOPPED else None
            connection.execute(update(run).where(run.c.name == name).values(state=to, ended_at=ended, code=None, failures=0))
            add_event(connection, actor=by, action=action, subject=name, at=at)

    def _end(self, name: RunName, attempt: int, to: RunState, *, code: str | None, at: float) -> None:
        with self._write() as connection:
            demand_attempt(connection, name, attempt)
            _note_end(connection, name, to, code=code, at=at)


def _note_end(connection: Connection, name: RunName, to: RunState, *, code: str | None, at: float) -> None:
    connection.execute(update(run).where(run.c.name == name).values(state=to, ended_at=at, code=code))
    add_event(connection, actor="server", action=f"run.{to}", subject=name, at=at, detail={"code": code} if code else None)


def demand_run(connection: Connection, name: RunName, *, lock: bool = False) -> RowMapping:
    """The run's row; with `lock`, held until the transaction ends.

    Raises:
        RoundError: PF510, no such run.
    """
    query = select(run).where(run.c.name == name)
    row = connection.execute(query.with_for_update() if lock else query).mappings().first()
    if row is None:
        raise RoundError(ErrorCode.RUN_UNKNOWN, "no run of this name", value=name, remedy="`pathfed-server rounds` lists the runs")
    return row


def demand_attempt(connection: Connection, name: RunName, attempt: int) -> None:
    """Lock the run and let only the loop that runs it pass.

    Raises:
        RoundError: PF510, no such run; PF511, it is not running, or a later attempt has taken it up.
    """
    row = demand_run(connection, name, lock=True)
    if row["state"] != RunState.RUNNING:
        raise _wrong_state(name, row["state"], "written to", remedy="its loop ends here")
    if row["attempt"] != attempt:
        raise RoundError(
            ErrorCode.RUN_STATE, "a later attempt has taken the run up", where=name, value=f"{row['attempt']}, this is {attempt}"
        )


def progress_of(connection: Connection, name: RunName) -> RunProgress:
    """Where a run stands, in the caller's transaction.

    Raises:
        RoundError: PF510, no such run.
    """
    row = demand_run(connection, name)
    newest = select(func.max(checkpoint.c.round_index)).where(checkpoint.c.run == name).scalar_subquery()
    last = connection.execute(select(checkpoint).where(checkpoint.c.run == name, checkpoint.c.round_index == newest)).mappings().first()
    return RunProgress(
        run=name,
        plan=Digest(row["plan"]),
        state=RunState(row["state"]),
        attempt=row["attempt"],
        last=None if last is None else _checkpoint(last),
        failures=row["failures"],
    )


def _checkpoint(row: RowMapping) -> Checkpoint:
    return Checkpoint(**{key: value for key, value in row.items() if key not in ("run", "committed_at")})


def _run_row(connection: Connection, row: RowMapping) -> RunRow:
    listed = sorted(connection.execute(select(run_site.c.site).where(run_site.c.run == row["name"])).scalars())
    return RunRow(**{**row, "state": RunState(row["state"])}, sites=tuple(listed))


def _wrong_state(name: RunName, state: str, verb: str, *, remedy: str) -> RoundError:
    return RoundError(ErrorCode.RUN_STATE, f"a {state} run cannot be {verb.replace('_', ' ')}", where=name, remedy=remedy)
