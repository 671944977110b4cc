"""What those who watch read: a run, its rounds and its sites, each from one state of the database. Nothing is written here."""

import json
from collections.abc import Mapping, Sequence

from sqlalchemy import Connection, RowMapping, func, select

from pathfed_common.ids import RunName, SiteName
from pathfed_server.db.audit_store import AuditStore, audit_row
from pathfed_server.db.rows import AuditRow, PlanRow
from pathfed_server.db.runs_store import demand_run
from pathfed_server.db.schema import audit_event, participation, plan, round_, site, update_statement
from pathfed_server.db.watch_rows import Outcome, RoundFacts, RunFacts, SiteFacts

_OF_ROUND = '%"run":%'  # a site is also refused when it asks to be enrolled, and then no run is named


class WatchStore(AuditStore):
    """Reads for `pathfed-server run status`, `rounds` and `sites list`."""

    def run_facts(self, name: RunName, *, newest: int | None = None) -> RunFacts:
        """A run with its rounds, or its `newest` rounds alone, and their sites.

        Raises:
            RoundError: PF510, no such run.
        """
        with self.snapshot() as connection:
            row = demand_run(connection, name)
            found = connection.execute(select(plan).where(plan.c.digest == row["plan"])).mappings().one()
            return RunFacts(
                run=name,
                **{key: row[key] for key in ("code", "attempt", "failures", "planned_at", "started_at", "ended_at")},
                state=str(row["state"]),
                plan=PlanRow(**found),
                committed=_committed(connection, name),
                rounds=_rounds(connection, name, newest),
                epsilon=_epsilon(connection, name),
            )

    def run_trouble(self, name: RunName, actions: Sequence[str], *, newest: int) -> list[AuditRow]:
        """The `newest` events of these kinds about a run itself, the newest first."""
        query = select(audit_event).where(audit_event.c.subject == name, audit_event.c.action.in_(actions))
        with self._read() as connection:
            rows = connection.execute(query.order_by(audit_event.c.seq.desc()).limit(newest)).mappings().all()
        return [audit_row(row) for row in rows]

    def site_facts(self) -> dict[SiteName, SiteFacts]:
        """Every site, revoked ones too."""
        counted = select(update_statement.c.site, func.count()).group_by(update_statement.c.site)
        received = select(participation.c.site, func.max(participation.c.received_at)).group_by(participation.c.site)
        with self.snapshot() as connection:
            names = connection.execute(select(site.c.name)).scalars().all()
            rounds = {row[0]: row[1] for row in connection.execute(counted)}
            last = {row[0]: row[1] for row in connection.execute(received)}
            refusals = _refusals(connection)
        return {
            SiteName(name): SiteFacts(
                site=SiteName(name), rounds=rounds.get(name, 0), last_update_at=last.get(name), last_refusal=refusals.get(name)
            )
            for name in names
        }


def _committed(connection: Connection, name: RunName) -> int:
    return connection.execute(select(func.count()).where(round_.c.run == name, round_.c.committed_at.is_not(None))).scalar_one()


def _rounds(connection: Connection, name: RunName, newest: int | None) -> tuple[RoundFacts, ...]:
    query = select(round_).where(round_.c.run == name).order_by(round_.c.round_index.desc()).limit(newest)
    rows = connection.execute(query).mappings().all()[::-1]
    if not rows:
        return ()
    outcomes: dict[int, list[Outcome]] = {}
    here = (participation.c.run == name, participation.c.round_index >= rows[0]["round_index"])
    for row in connection.execute(select(participation).where(*here).order_by(participation.c.site)).mappings():
        outcomes.setdefault(row["round_index"], []).append(_outcome(row))
    kept = ("attempt", "code", "base_state", "next_state", "offered_at", "deadline", "committed_at")
    return tuple(
        RoundFacts(
            index=row["round_index"],
            state=str(row["state"]),
            **{key: row[key] for key in kept},
            outcomes=tuple(outcomes.get(row["round_index"], ())),
        )
        for row in rows
    )


def _outcome(row: RowMapping) -> Outcome:
    kept = ("site", "code", "offered_at", "received_at", "rounding")
    return Outcome(**{key: row[key] for key in kept}, state=str(row["state"]))


def _epsilon(connection: Connection, name: RunName) -> dict[SiteName, float]:
    """Each site's statement of the last round that it was admitted in."""
    stated = (participation.c.run == name, participation.c.epsilon_plan.is_not(None))
    query = select(participation.c.site, participation.c.epsilon_plan).where(*stated).order_by(participation.c.round_index)
    return {SiteName(who): epsilon for who, epsilon in connection.execute(query)}


def _refusals(connection: Connection) -> dict[str, tuple[int, float, Mapping[str, object]]]:
    """By site, the last event of an update that was refused."""
    newest = (
        select(func.max(audit_event.c.seq))
        .where(audit_event.c.action == "site.refused", audit_event.c.detail.like(_OF_ROUND))
        .group_by(audit_event.c.subject)
    )
    rows = connection.execute(select(audit_event).where(audit_event.c.seq.in_(newest))).mappings()
    return {row["subject"]: (row["seq"], row["at"], json.loads(row["detail"])) for row in rows}
