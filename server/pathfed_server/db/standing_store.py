"""Where a site stands in the server database: suspended or not, in a run or not, and what became of its last rounds."""

from collections.abc import Sequence

from sqlalchemy import Connection, and_, func, insert, or_, select, update

from pathfed_common.errors import ErrorCode, RoundError
from pathfed_common.ids import RunName, SiteName
from pathfed_server.db.audit_store import add_event
from pathfed_server.db.rows import OutcomeRow
from pathfed_server.db.runs_store import RunsStore, demand_attempt, demand_run
from pathfed_server.db.schema import participation, run_site, site
from pathfed_server.rounds.refusals import FAULTS
from pathfed_server.rounds.state import ParticipationState, RunState, SiteState

_ENDED = (RunState.FINISHED,)


class StandingStore(RunsStore):
    """Suspends and reinstates sites, and takes them into runs and out of them."""

    def suspend_sites(self, run_name: RunName, attempt: int, *, after: int, at: float) -> list[SiteName]:
        """See `rounds.ports.RoundStore`."""
        with self._write() as connection:
            demand_attempt(connection, run_name, attempt)
            standing = and_(site.c.state == SiteState.ENROLLED, site.c.suspended_at.is_(None), run_site.c.left_at.is_(None))
            listed = select(site.c.name, site.c.reinstated_at).join(run_site, run_site.c.site == site.c.name)
            rows = connection.execute(listed.where(run_site.c.run == run_name, standing).order_by(site.c.name)).all()
            found = []
            for name, since in rows:
                refused = _refused_running(connection, name, since=since or 0.0, most=after)
                if after and len(refused) == after:
                    connection.execute(update(site).where(site.c.name == name).values(suspended_at=at))
                    rounds = [f"{run}/{index}" for run, index, _ in refused]
                    detail = {"run": run_name, "rounds": rounds, "codes": [code for *_, code in refused]}
                    add_event(connection, actor="server", action="site.suspended", subject=name, at=at, detail=detail)
                    found.append(SiteName(name))
            return found

    def reinstate_site(self, name: SiteName, *, at: float, by: str = "operator") -> None:
        """End a suspension; the refusals before it count no more. Reinstating a site that is not suspended changes nothing.

        Raises:
            RoundError: PF501, no such site.
        """
        with self._write() as connection:
            row = connection.execute(select(site).where(site.c.name == name).with_for_update()).mappings().first()
            if row is None:
                raise RoundError(ErrorCode.SITE_UNKNOWN, "no site of this name is enrolled", value=name)
            if row["suspended_at"] is None:
                return
            connection.execute(update(site).where(site.c.name == name).values(suspended_at=None, reinstated_at=at))
            add_event(connection, actor=by, action="site.reinstated", subject=name, at=at)

    def change_run_sites(
        self,
        run_name: RunName,
        *,
        add: Sequence[SiteName] = (),
        remove: Sequence[SiteName] = (),
        quorum: int,
        at: float,
        by: str = "operator",
    ) -> tuple[SiteName, ...]:
        """Take sites into a run and out of it, from its next round on; the sites in it after this. What is so already stays.

        Raises:
            RoundError: PF510, no such run; PF511, it is finished; PF501, no such site; PF518, it is revoked; PF503, fewer sites than
                `quorum` would be left.
        """
        with self._write() as connection:
            row = demand_run(connection, run_name, lock=True)
            if row["state"] in _ENDED:
                raise RoundError(ErrorCode.RUN_STATE, "a finished run takes no more sites", where=run_name)
            listed = select(run_site.c.site, run_site.c.left_at).where(run_site.c.run == run_name)
            there = {row.site: row.left_at for row in connection.execute(listed)}
            for name in sorted(set(add)):
                _demand_enrolled(connection, name)
                if name not in there:
                    connection.execute(insert(run_site).values(run=run_name, site=name))
                elif there[name] is None:
                    continue
                _set_left(connection, run_name, name, None)
                add_event(connection, actor=by, action="run.site_added", subject=run_name, at=at, detail={"site": name})
                there[name] = None
            for name in sorted(set(remove)):
                if name not in there:
                    raise RoundError(ErrorCode.SITE_UNKNOWN, "the site is not in the run", where=run_name, value=name)
                if there[name] is None:
                    _set_left(connection, run_name, name, at)
                    add_event(connection, actor=by, action="run.site_removed", subject=run_name, at=at, detail={"site": name})
                    there[name] = at
            left = tuple(SiteName(name) for name in sorted(there) if there[name] is None)
            if remove and len(left) < quorum:
                what = "fewer sites than the plan's quorum would be left"
                raise RoundError(ErrorCode.QUORUM_LOST, what, where=run_name, value=f"{len(left)} of {quorum}")
            return left

    def outcomes(self, name: SiteName, *, most: int) -> list[OutcomeRow]:
        """What became of a site in the last rounds that it was asked in, the latest first."""
        columns = [participation.c[column] for column in OutcomeRow.__dataclass_fields__]
        query = select(*columns).where(participation.c.site == name, participation.c.offered_at.is_not(None))
        query = query.order_by(participation.c.offered_at.desc(), participation.c.round_index.desc()).limit(most)
        with self._read() as connection:
            return [OutcomeRow(**row) for row in connection.execute(query).mappings()]


def _refused_running(connection: Connection, name: SiteName, *, since: float, most: int) -> list[tuple[str, int, str]]:
    """The last answers of a site in order, the latest first: where each, and its code, as long as they were refused for its own faults."""
    judged = or_(
        participation.c.state == ParticipationState.ADMITTED,
        and_(participation.c.state == ParticipationState.REFUSED, participation.c.code.in_(sorted(FAULTS))),
    )
    query = select(participation.c.run, participation.c.round_index, func.coalesce(participation.c.code, ""))
    query = query.where(participation.c.site == name, participation.c.offered_at > since, judged)
    query = query.order_by(participation.c.offered_at.desc(), participation.c.round_index.desc()).limit(most)
    found: list[tuple[str, int, str]] = []
    for run, index, code in connection.execute(query):
        if not code:
            break
        found.append((run, index, code))
    return found


def _demand_enrolled(connection: Connection, name: SiteName) -> None:
    state = connection.execute(select(site.c.state).where(site.c.name == name)).scalar()
    if state is None:
        raise RoundError(ErrorCode.SITE_UNKNOWN, "no site of this name is enrolled", value=name)
    if state != SiteState.ENROLLED:
        raise RoundError(ErrorCode.SITE_REVOKED, "the site is revoked", value=name)


def _set_left(connection: Connection, run_name: RunName, name: SiteName, at: float | None) -> None:
    connection.execute(update(run_site).where(run_site.c.run == run_name, run_site.c.site == name).values(left_at=at))
