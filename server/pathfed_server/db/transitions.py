"""What happens to a run or a round, in the caller's transaction: the new state, and the audit event that tells of it."""

from collections.abc import Mapping
from typing import Any

from sqlalchemy import Connection, RowMapping, insert, select, update

from pathfed_common.digest import Digest
from pathfed_common.errors import ErrorCode, RoundError
from pathfed_common.ids import RunName
from pathfed_server.db.audit_store import add_event
from pathfed_server.db.schema import round_, run
from pathfed_server.rounds.machine import ENDING, UNDER_WAY, RoundEvent, RunEvent, Transition, move_round, move_run
from pathfed_server.rounds.state import RoundState, RunState

_ACTIONS = {RunEvent.TAKE_UP: "run.taken_up", RunEvent.RESUME: "run.resumed"}
#: Orders that end a round under way, which is then begun again when the run goes on.
_AT_ONCE = (RunEvent.PAUSE_NOW, RunEvent.STOP)


def change_run(connection: Connection, row: RowMapping, event: RunEvent, *, at: float, by: str = "server", **values: object) -> Transition:
    """Let an event happen to a run whose row the caller has locked. An order that finds its work done writes nothing.

    Args:
        connection: the caller's transaction.
        row: the run.
        event: what happens.
        at: UTC seconds.
        by: who did it.
        values: columns to set beside the state.

    Raises:
        RoundError: PF511, a run in this state takes no such event.
    """
    moved = move_run(RunState(row["state"]), event, where=row["name"])
    if not moved.changes and event is not RunEvent.TAKE_UP:
        return moved
    connection.execute(update(run).where(run.c.name == row["name"]).values(state=moved.after, **values))
    detail = {"attempt": values.get("attempt", row["attempt"]), **moved.plain()}
    if values.get("code"):
        detail["code"] = values["code"]
    action = _ACTIONS.get(event, f"run.{moved.after}")
    add_event(connection, actor=by, action=action, subject=row["name"], at=at, detail=detail)
    if event in _AT_ONCE:
        _abandon(connection, row, at=at, by=by)
    return moved


def change_round(
    connection: Connection,
    row: RowMapping,
    round_index: int,
    event: RoundEvent,
    *,
    at: float,
    by: str = "server",
    detail: Mapping[str, Any] | None = None,
    **values: object,
) -> None:
    """Let an event happen to a round.

    Args:
        connection: the caller's transaction.
        row: the run.
        round_index: 1 for the first.
        event: what happens.
        at: UTC seconds.
        by: who did it.
        detail: what the audit event says beside the transition.
        values: columns to set beside the state.

    Raises:
        RoundError: PF511, the round was never opened; PF560, a round in this state takes no such event.
    """
    found = find_round(connection, row["name"], round_index)
    if found is None:
        raise RoundError(ErrorCode.RUN_STATE, "the round was never opened", where=row["name"], value=round_index)
    moved = move_round(RoundState(found["state"]), event, where=f"{row['name']}, round {round_index}")
    here = (round_.c.run == row["name"], round_.c.round_index == round_index)
    connection.execute(update(round_).where(*here).values(state=moved.after, **values))
    _tell(connection, row, round_index, found["attempt"] + (event is RoundEvent.BEGIN_AGAIN), moved, at=at, by=by, detail=detail)


def begin_round(connection: Connection, row: RowMapping, round_index: int, base_state: Digest, *, at: float, deadline: float) -> None:
    """Make a round, or begin it again; it is planned then.

    Raises:
        RoundError: PF560, it is committed; PF511, the run is to rest and the round is not under way.
    """
    found = find_round(connection, row["name"], round_index)
    if row["state"] in ENDING and (found is None or found["state"] not in UNDER_WAY):
        raise RoundError(ErrorCode.RUN_STATE, f"a {row['state']} run begins no round", where=row["name"], value=round_index)
    if found is not None:
        again = found["attempt"] + 1
        change_round(connection, row, round_index, RoundEvent.BEGIN_AGAIN, at=at, attempt=again, offered_at=at, deadline=deadline)
        return
    fresh = {"run": row["name"], "round_index": round_index, "base_state": base_state, "attempt": 1, "state": RoundState.PLANNED}
    connection.execute(insert(round_).values({**fresh, "offered_at": at, "deadline": deadline}))
    made = Transition(event="plan", before=None, after=RoundState.PLANNED)
    _tell(connection, row, round_index, 1, made, at=at, by="server", detail=None)


def find_round(connection: Connection, name: RunName, round_index: int) -> RowMapping | None:
    """A round's row, or None."""
    here = (round_.c.run == name, round_.c.round_index == round_index)
    return connection.execute(select(round_).where(*here)).mappings().first()


def _abandon(connection: Connection, row: RowMapping, *, at: float, by: str) -> None:
    under_way = (round_.c.run == row["name"], round_.c.state.in_(sorted(UNDER_WAY)))
    for index in connection.execute(select(round_.c.round_index).where(*under_way)).scalars().all():
        change_round(connection, row, index, RoundEvent.ABANDON, at=at, by=by)


def _tell(
    connection: Connection,
    row: RowMapping,
    round_index: int,
    offer: int,
    moved: Transition,
    *,
    at: float,
    by: str,
    detail: Mapping[str, Any] | None,
) -> None:
    told = {"attempt": row["attempt"], "round": round_index, "offer": offer, **moved.plain(), **(detail or {})}
    add_event(connection, actor=by, action=f"round.{moved.after}", subject=row["name"], at=at, detail=told)
