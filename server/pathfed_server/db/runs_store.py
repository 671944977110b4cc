"""Runs in the server database: planned by the operator, taken up by the loop."""

from collections.abc import Sequence

from sqlalchemy import Connection, RowMapping, func, insert, select

from pathfed_common.digest import Digest
from pathfed_common.errors import ErrorCode, RoundError
from pathfed_common.ids import RunName, SiteName
from pathfed_server.db.audit_store import add_event
from pathfed_server.db.rows import RunRow
from pathfed_server.db.schema import checkpoint, plan, run, run_site, site
from pathfed_server.db.sites_store import SitesStore
from pathfed_server.db.transitions import change_run
from pathfed_server.rounds.machine import LIVE, OPEN, RunEvent, move_run
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

    def pause_run(self, name: RunName, *, now: bool = False, at: float, by: str = "operator") -> RunState:
        """Let a run pause after the round under way; its state after this. A run that rests already changes nothing.

        Args:
            name: the run.
            now: pause at once: the round under way is abandoned and begun again when the run is resumed.
            at: UTC seconds.
            by: who did it.

        Raises:
            RoundError: PF510, no such run; PF511, it has finished, failed or been stopped.
        """
        return self._operate(name, RunEvent.PAUSE_NOW if now else RunEvent.PAUSE, at=at, by=by)

    def drain_run(self, name: RunName, *, at: float, by: str = "operator") -> RunState:
        """Let a run stop after the round under way; its state after this. Draining it again changes nothing.

        Raises:
            RoundError: PF510, no such run; PF511, it has finished or failed.
        """
        return self._operate(name, RunEvent.DRAIN, at=at, by=by)

    def stop_run(self, name: RunName, *, at: float, by: str = "operator") -> None:
        """Stop a run at once: its loop ends at its next word to the store. Stopping it again changes nothing.

        Raises:
            RoundError: PF510, no such run; PF511, it has finished or failed.
        """
        self._operate(name, RunEvent.STOP, at=at, by=by)

    def reopen_run(self, name: RunName, *, at: float, by: str = "operator") -> RunState:
        """Let a paused, stopped or failed run go on from its last committed round, its failed attempts forgotten; its state after this.

        A run that was to pause or stop after its round goes on; one that runs anyway is left alone.

        Raises:
            RoundError: PF510, no such run; PF511, it is finished.
        """
        return self._operate(name, RunEvent.RESUME, at=at, by=by)

    def begin_attempt(self, name: RunName, *, at: float) -> RunProgress:
        """See `rounds.ports.RoundStore`."""
        with self._write() as connection:
            row = demand_run(connection, name, lock=True)
            started = at if row["started_at"] is None else row["started_at"]
            values = {"attempt": row["attempt"] + 1, "started_at": started, "ended_at": None, "code": None}
            change_run(connection, row, RunEvent.TAKE_UP, at=at, **values)
            return progress_of(connection, name)

    def progress(self, name: RunName) -> RunProgress:
        """See `rounds.ports.RoundStore`."""
        with self._read() as connection:
            return progress_of(connection, name)

    def rest_run(self, name: RunName, attempt: int, *, at: float) -> RunState:
        """See `rounds.ports.RoundStore`."""
        with self._write() as connection:
            row = demand_attempt(connection, name, attempt)
            ended = at if row["state"] == RunState.DRAINING else None
            return RunState(change_run(connection, row, RunEvent.REST, at=at, ended_at=ended).after)

    def finish_run(self, name: RunName, attempt: int, *, at: float) -> None:
        """See `rounds.ports.RoundStore`."""
        with self._write() as connection:
            change_run(connection, demand_attempt(connection, name, attempt), RunEvent.FINISH, at=at, ended_at=at, code=None)

    def fail_run(self, name: RunName, attempt: int, *, code: str, at: float) -> None:
        """See `rounds.ports.RoundStore`."""
        with self._write() as connection:
            change_run(connection, demand_attempt(connection, name, attempt), RunEvent.FAIL, at=at, ended_at=at, code=code)

    def give_up(self, name: RunName, *, code: str, at: float) -> None:
        """Mark a run failed that should go on, whether or not a loop ever took it up; any other run stays as it is.

        Raises:
            RoundError: PF510, no such run.
        """
        with self._write() as connection:
            row = demand_run(connection, name, lock=True)
            if row["state"] in OPEN:
                change_run(connection, row, RunEvent.FAIL, at=at, ended_at=at, code=code)

    def checkpoints(self, name: RunName) -> list[Checkpoint]:
        """The checkpoints of a run, the initial state's first."""
        query = select(checkpoint).where(checkpoint.c.run == name).order_by(checkpoint.c.round_index)
        with self._read() as connection:
            return [_checkpoint(row) for row in connection.execute(query).mappings()]

    def _operate(self, name: RunName, event: RunEvent, *, at: float, by: str) -> RunState:
        with self._write() as connection:
            row = demand_run(connection, name, lock=True)
            ended = at if move_run(RunState(row["state"]), event, where=name).after == RunState.STOPPED else None
            # Failed attempts are forgotten where an operator looks at the run: it gets all of them again.
            return RunState(change_run(connection, row, event, at=at, by=by, ended_at=ended, code=None, failures=0).after)


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


def demand_attempt(connection: Connection, name: RunName, attempt: int) -> RowMapping:
    """Lock the run and let only the loop that runs it pass; its row.

    Raises:
        RoundError: PF510, no such run; PF511, it is not running, or a later attempt has taken it up.
    """
    row = demand_run(connection, name, lock=True)
    if row["state"] not in LIVE:
        raise RoundError(ErrorCode.RUN_STATE, f"a {row['state']} run cannot be written to", where=name, remedy="its loop ends here")
    if row["attempt"] != attempt:
        raise RoundError(
            ErrorCode.RUN_STATE, "a later attempt has taken the run up", where=name, value=f"{row['attempt']}, this is {attempt}"
        )
    return row


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
    there = (run_site.c.run == row["name"], run_site.c.left_at.is_(None))
    listed = sorted(connection.execute(select(run_site.c.site).where(*there)).scalars())
    return RunRow(**{**row, "state": RunState(row["state"])}, sites=tuple(listed))
