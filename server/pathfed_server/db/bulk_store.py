"""Which bulk files a site may fetch, and for which rounds it may send an update: asked at every call of the bulk plane."""

from sqlalchemy import and_, exists, or_, select

from pathfed_common.digest import Digest
from pathfed_common.ids import RunName, SiteName
from pathfed_common.provenance.documents import REVOCATION
from pathfed_server.db.audit_store import AuditStore
from pathfed_server.db.schema import approval, checkpoint, decision, participation, round_, run, run_site, site
from pathfed_server.rounds.state import ParticipationState, RoundState, SiteState

#: States of a round in which updates may arrive, and of a site in it. Whether one came in time, the round loop decides.
_ROUND_TAKES = tuple(
    state for state in RoundState if state not in (RoundState.PLANNED, RoundState.ADMITTED, RoundState.COMMITTED, RoundState.FAILED)
)
_SITE_MAY = (ParticipationState.OFFERED,)


class BulkStore(AuditStore):
    """Reads alone."""

    def base_state(self, asking: SiteName, state: Digest) -> tuple[str, int] | None:
        """Where a state's file lies, relative to the home, and its length in bytes; None: there is none that this site may have.

        It may have the states of the runs that it takes part in: that list it, and whose plan it has approved. One that was taken out of a
        run may have what was committed until then, since it may still answer the round that was going on.
        """
        in_time = or_(run_site.c.left_at.is_(None), checkpoint.c.committed_at <= run_site.c.left_at)
        asked = and_(checkpoint.c.state == state, run_site.c.site == asking, in_time)
        given = and_(approval.c.site == run_site.c.site, approval.c.plan == run.c.plan)
        taken_back = and_(decision.c.site == run_site.c.site, decision.c.plan == run.c.plan, decision.c.kind == REVOCATION)
        joined = (
            checkpoint.join(run, run.c.name == checkpoint.c.run)
            .join(run_site, run_site.c.run == run.c.name)
            .join(site, site.c.name == run_site.c.site)
            .join(approval, given)
        )
        query = (
            select(checkpoint.c.state_path, checkpoint.c.state_bytes)
            .select_from(joined)
            .where(asked, site.c.state == SiteState.ENROLLED, ~exists().where(taken_back))
        )
        with self._read() as connection:
            row = connection.execute(query).first()
        return None if row is None else (str(row[0]), int(row[1]))

    def update_wanted(self, asking: SiteName, run_name: RunName, round_index: int) -> bool:
        """Whether an update of this round is wanted from the site now: it is asked, and the outcome for it is open."""
        joined = participation.join(
            round_, and_(round_.c.run == participation.c.run, round_.c.round_index == participation.c.round_index)
        ).join(site, site.c.name == participation.c.site)
        query = (
            select(participation.c.site)
            .select_from(joined)
            .where(
                participation.c.run == run_name,
                participation.c.round_index == round_index,
                participation.c.site == asking,
                participation.c.state.in_(_SITE_MAY),
                round_.c.state.in_(_ROUND_TAKES),
                site.c.state == SiteState.ENROLLED,
            )
        )
        with self._read() as connection:
            return connection.execute(query).first() is not None
