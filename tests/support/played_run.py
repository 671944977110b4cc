"""A run as its rows and events, written straight into a database: what those who watch read, whatever wrote it."""

from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, create_engine, insert, update

from pathfed_common import digest
from pathfed_common.ids import RunName, SiteName
from pathfed_common.plan import Plan
from pathfed_server.db import schema
from pathfed_server.db.audit_store import add_event

RUN = RunName("lung-1")
SITES = tuple(SiteName(f"hospital-{name}") for name in ("east", "north", "south"))
#: When the run was planned, UTC seconds.
BEGIN = 1_795_000_000.0
PLAN = Plan.model_validate(
    {
        "name": "lung",
        "privacy": {"expected_patients": 8.0, "noise_multiplier": 1.0, "clip_norm": 1.0, "epsilon_limit": 4.0},
        "rounds": {"count": 4, "quorum": 2, "deadline_s": 600.0},
    }
)


@dataclass
class Played:
    """A run over three sites; each step is one transaction."""

    url: str

    def __post_init__(self) -> None:
        self._engine = create_engine(self.url.replace("postgresql://", "postgresql+psycopg://"))

    def close(self) -> None:
        self._engine.dispose()

    def plan(self, state: str = "running") -> None:
        with self._engine.begin() as connection:
            for name in SITES:
                key = {"evidence_key": f"key of {name}", "flower_key": f"node of {name}", "state": "enrolled", "enrolled_at": BEGIN}
                connection.execute(insert(schema.site).values(name=name, **key))
            kept = {"digest": PLAN.digest, "name": PLAN.name, "canonical": PLAN.canonical_bytes(), "signed": b"", "published_at": BEGIN}
            connection.execute(insert(schema.plan).values(**kept))
            values = {"name": RUN, "plan": PLAN.digest, "state": state, "attempt": 1, "failures": 0, "planned_at": BEGIN}
            connection.execute(insert(schema.run).values(**values))
            connection.execute(insert(schema.run_site), [{"run": RUN, "site": name} for name in SITES])
            _event(connection, "run.planned", RUN, BEGIN, {"sites": list(SITES)})

    def round(self, index: int, *, seconds: float = 60.0, refused: str | None = None) -> None:
        """A committed round that began where the one before it ended; the last site is refused with a code, if one is given."""
        ended = BEGIN + index * seconds
        with self._engine.begin() as connection:
            _round(connection, index, "committed", ended - seconds, next_state=_state(index), committed_at=ended)
            for name in SITES:
                code = refused if name == SITES[-1] else None
                _site(connection, index, name, "refused" if code else "admitted", ended - 1, code)
                if code:
                    _event(connection, "site.refused", name, ended - 1, {"run": RUN, "round": index, "code": code})
            _event(connection, "round.committed", RUN, ended, {"round": index, "sites": list(SITES)})

    def failed(self, index: int, at: float, code: str = "PF503") -> None:
        """A round that failed for want of two sites."""
        with self._engine.begin() as connection:
            _round(connection, index, "failed", at - 600, code=code)
            for name in SITES[:2]:
                _site(connection, index, name, "silent", None, "PF515")
            _site(connection, index, SITES[2], "admitted", at - 1, None)
            sites = {SITES[0]: "PF515", SITES[1]: "PF515", SITES[2]: "admitted"}
            _event(connection, "round.failed", RUN, at, {"round": index, "code": code, "failures": 1, "sites": sites})

    def end(self, state: str, at: float, code: str | None = None) -> None:
        with self._engine.begin() as connection:
            connection.execute(update(schema.run).values(state=state, ended_at=at, code=code))
            _event(connection, f"run.{state}", RUN, at, {"code": code} if code else None)


def _event(connection: Connection, action: str, subject: str, at: float, detail: object) -> None:
    add_event(connection, actor="server", action=action, subject=subject, at=at, detail=detail)


def _state(index: int) -> str:
    return digest.of_value(["state", index])


def _round(connection: Connection, index: int, state: str, offered_at: float, **more: Any) -> None:
    values = {"run": RUN, "round_index": index, "state": state, "attempt": 1, "base_state": _state(index - 1), "offered_at": offered_at}
    connection.execute(insert(schema.round_).values(**values, deadline=offered_at + 600, **more))


def _site(connection: Connection, index: int, name: SiteName, state: str, received_at: float | None, code: str | None) -> None:
    values: dict[str, Any] = {"run": RUN, "round_index": index, "site": name, "state": state, "code": code, "received_at": received_at}
    if state == "admitted":
        statement = digest.of_value([index, name])
        values |= {"update_digest": statement, "statement": statement, "epsilon_plan": index * 0.1 + SITES.index(name) * 0.01}
        kept = {"run": RUN, "round_index": index, "site": name, "digest": statement, "envelope": b""}
        connection.execute(insert(schema.update_statement).values(**kept))
    connection.execute(insert(schema.participation).values(**values))
