"""Sites, plans and approvals in the server database."""

from typing import Any

from sqlalchemy import Connection, RowMapping, Select, func, insert, select, update

from pathfed_common import digest
from pathfed_common.digest import Digest, short
from pathfed_common.errors import ErrorCode, RoundError
from pathfed_common.ids import SiteName
from pathfed_common.provenance import dsse
from pathfed_common.provenance.documents import REJECTION, REVOCATION, Approval
from pathfed_common.provenance.log_leaves import PlanApproved, PlanDecided, PlanPublished, SiteRevoked
from pathfed_common.provenance.values import decode_value
from pathfed_common.units import UtcSeconds
from pathfed_server.db.audit_store import add_event
from pathfed_server.db.log_store import LogStore, append_leaves
from pathfed_server.db.membership import end_access, enrol_site, lock_table
from pathfed_server.db.rows import ApprovalRow, DecisionRow, PlanRow, SiteRow
from pathfed_server.db.schema import approval, decision, plan, site, update_statement
from pathfed_server.rounds.state import SiteState


class SitesStore(LogStore):
    """Who may take part, in what. What the transparency log holds of it is appended in the same transaction."""

    def add_site(self, name: SiteName, *, evidence_key: str, flower_key: str, at: float, by: str = "operator") -> None:
        """Enrol a site by its card alone; it gets no certificate.

        Raises:
            RoundError: PF502, the name or one of the keys is taken; revoked sites keep theirs.
            ValueError: `evidence_key` is not a public evidence key.
        """
        with self._write() as connection:
            leaf = enrol_site(connection, name, evidence_key=evidence_key, flower_key=flower_key, at=at, by=by)
            append_leaves(connection, [leaf])

    def revoke_site(self, name: SiteName, *, at: float, by: str = "operator") -> None:
        """Revoke a site for good, with every certificate and invitation it has; revoking it again changes nothing.

        Raises:
            RoundError: PF501, no such site.
        """
        with self._write() as connection:
            found = _site(connection.execute(select(site).where(site.c.name == name).with_for_update()).mappings().first(), name)
            if found.state is SiteState.REVOKED:
                return
            connection.execute(update(site).where(site.c.name == name).values(state=SiteState.REVOKED, revoked_at=at))
            end_access(connection, name, at=at)
            # What the site leaves behind: nothing takes these updates out again.
            detail = {"updates": _updates_of(connection, name)}
            add_event(connection, actor=by, action="site.revoked", subject=name, at=at, detail=detail)
            append_leaves(connection, [SiteRevoked(site=name, at=UtcSeconds(at))])

    def site(self, name: SiteName) -> SiteRow:
        """One site.

        Raises:
            RoundError: PF501, no such site.
        """
        with self._read() as connection:
            return _site(connection.execute(select(site).where(site.c.name == name)).mappings().first(), name)

    def sites(self) -> list[SiteRow]:
        """Every site, revoked ones too, in name order."""
        with self._read() as connection:
            return sorted((_site(row, "") for row in connection.execute(select(site)).mappings()), key=lambda row: row.name)

    def add_plan(self, plan_digest: Digest, *, name: str, canonical: bytes, signed: bytes, at: float, by: str = "operator") -> None:
        """Publish a plan; publishing it again changes nothing."""
        with self._write() as connection:
            lock_table(connection, "plan")
            if connection.execute(select(plan.c.digest).where(plan.c.digest == plan_digest)).scalar() is not None:
                return
            connection.execute(insert(plan).values(digest=plan_digest, name=name, canonical=canonical, signed=signed, published_at=at))
            add_event(connection, actor=by, action="plan.published", subject=plan_digest, at=at, detail={"name": name})
            append_leaves(connection, [PlanPublished(plan=plan_digest)])

    def set_plan_signatures(self, plan_digest: Digest, signed: bytes, *, at: float, by: str = "operator") -> None:
        """Keep a published plan's envelope with more signatures; with the same ones nothing changes.

        Raises:
            RoundError: PF516, no such plan.
        """
        with self._write() as connection:
            kept = connection.execute(select(plan.c.signed).where(plan.c.digest == plan_digest)).scalar()
            if kept is None:
                raise RoundError(ErrorCode.PLAN_UNKNOWN, "no plan with this digest is published", value=plan_digest)
            if bytes(kept) == signed:
                return
            connection.execute(update(plan).where(plan.c.digest == plan_digest).values(signed=signed))
            detail = {"signed": digest.of_bytes(signed)}
            add_event(connection, actor=by, action="plan.cosigned", subject=plan_digest, at=at, detail=detail)

    def plan(self, plan_digest: Digest) -> PlanRow:
        """One plan.

        Raises:
            RoundError: PF516, no such plan.
        """
        with self._read() as connection:
            row = connection.execute(select(plan).where(plan.c.digest == plan_digest)).mappings().first()
        if row is None:
            raise RoundError(ErrorCode.PLAN_UNKNOWN, "no plan with this digest is published", value=plan_digest)
        return PlanRow(**_plain(row))

    def plans(self) -> list[PlanRow]:
        """Every plan, the oldest first."""
        with self._read() as connection:
            rows = connection.execute(select(plan).order_by(plan.c.published_at, plan.c.digest)).mappings().all()
        return [PlanRow(**_plain(row)) for row in rows]

    def add_approval(self, given: ApprovalRow, *, at: float, by: str | None = None) -> None:
        """Keep a site's approval of a plan. The same figures again change nothing: the first approval stays, as evidence.

        Raises:
            RoundError: PF501, no such site; PF518, it is revoked; PF516, no such plan; PF519, it approved the plan with other figures
                or another name; PF530, it has revoked its approval of the plan, which is for good.
        """
        with self._write() as connection:
            _demand_member_and_plan(connection, given.site, given.plan)
            if _revoked(connection, given.site, given.plan):
                raise RoundError(
                    ErrorCode.APPROVAL_REVOKED, "the site has revoked its approval of this plan", where=given.site, value=short(given.plan)
                )
            row = connection.execute(_approval_of(given.site, given.plan)).mappings().first()
            if row is not None:
                _demand_same(ApprovalRow(**_plain(row)), given)
                return
            connection.execute(insert(approval).values(vars(given)))
            detail = {
                "plan": given.plan,
                "site": given.site,
                "declared_patients": given.declared_patients,
                "reply_slots": given.reply_slots,
            }
            add_event(connection, actor=by or f"site:{given.site}", action="plan.approved", subject=given.plan, at=at, detail=detail)
            append_leaves(connection, [PlanApproved(site=given.site, plan=given.plan, approval=digest.of_bytes(given.envelope))])

    def add_decision(self, given: DecisionRow, *, at: float, by: str | None = None) -> None:
        """Keep a site's word against a plan. The same word again changes nothing.

        A revocation is for good, and may come before the approval that it revokes was ever handed in.

        Raises:
            RoundError: PF501, no such site; PF518, it is revoked; PF516, no such plan; PF531, a rejection of a plan that stands approved
                or revoked, or a revocation of another approval than the one on record.
        """
        name = digest.of_bytes(given.envelope)
        with self._write() as connection:
            _demand_member_and_plan(connection, given.site, given.plan)
            if connection.execute(select(decision.c.seq).where(decision.c.digest == name)).scalar() is not None:
                return
            _demand_order(connection, given)
            values = {key: value for key, value in vars(given).items() if key != "approval"}
            connection.execute(insert(decision).values(**values, digest=name))
            detail = {"plan": given.plan, "site": given.site, "decision": name}
            action = {REJECTION: "plan.rejected", REVOCATION: "plan.revoked"}[given.kind]
            add_event(connection, actor=by or f"site:{given.site}", action=action, subject=given.plan, at=at, detail=detail)
            append_leaves(connection, [PlanDecided(site=given.site, plan=given.plan, decision=name)])

    def words_against(self, plan_digest: Digest) -> dict[SiteName, str]:
        """Sites that have spoken against a plan and not approved it since: ``rejection`` or ``revocation``, in site order."""
        with self._read() as connection:
            rows = connection.execute(select(decision).where(decision.c.plan == plan_digest).order_by(decision.c.seq)).mappings().all()
            approved = set(connection.execute(select(approval.c.site).where(approval.c.plan == plan_digest)).scalars())
        latest = {SiteName(row["site"]): str(row["kind"]) for row in rows}
        return {site: kind for site, kind in sorted(latest.items()) if kind == REVOCATION or site not in approved}

    def approvals(self, plan_digest: Digest) -> list[ApprovalRow]:
        """The approvals of a plan, in site order: evidence, also of those that were revoked since (`words_against`)."""
        with self._read() as connection:
            rows = connection.execute(select(approval).where(approval.c.plan == plan_digest)).mappings().all()
        return sorted((ApprovalRow(**_plain(row)) for row in rows), key=lambda row: row.site)


def _demand_member_and_plan(connection: Connection, name: SiteName, plan_digest: Digest) -> None:
    """Lock the site's row, so that its words come one after another.

    Raises:
        RoundError: PF501, no such site; PF518, it is revoked; PF516, no such plan.
    """
    found = _site(connection.execute(select(site).where(site.c.name == name).with_for_update()).mappings().first(), name)
    if found.state is not SiteState.ENROLLED:
        raise RoundError(ErrorCode.SITE_REVOKED, "a revoked site decides on no plan", value=name)
    if connection.execute(select(plan.c.digest).where(plan.c.digest == plan_digest)).scalar() is None:
        raise RoundError(ErrorCode.PLAN_UNKNOWN, "no plan with this digest is published", value=plan_digest)


def _demand_order(connection: Connection, given: DecisionRow) -> None:
    stands = connection.execute(_approval_of(given.site, given.plan)).mappings().first()
    if given.kind == REJECTION:
        wrong = stands is not None or _revoked(connection, given.site, given.plan)
    else:
        wrong = stands is not None and digest.of_bytes(bytes(stands["envelope"])) != given.approval
    if wrong:
        raise RoundError(
            ErrorCode.WORD_OUT_OF_ORDER,
            f"this {given.kind} does not follow what the site has said of the plan",
            where=given.site,
            value=short(given.plan),
        )


def _approval_of(name: SiteName, plan_digest: Digest) -> Select[Any]:
    return select(approval).where(approval.c.site == name, approval.c.plan == plan_digest)


def _revoked(connection: Connection, name: SiteName, plan_digest: Digest) -> bool:
    of_site = (decision.c.site == name) & (decision.c.plan == plan_digest) & (decision.c.kind == REVOCATION)
    return connection.execute(select(decision.c.seq).where(of_site)).first() is not None


def _site(row: RowMapping | None, name: str) -> SiteRow:
    if row is None:
        raise RoundError(ErrorCode.SITE_UNKNOWN, "no site of this name is enrolled", value=name, remedy="`pathfed-server sites` lists them")
    return SiteRow(**{**row, "state": SiteState(row["state"])})


def _updates_of(connection: Connection, name: SiteName) -> dict[str, int]:
    """By run, the committed rounds that a site's update counted in."""
    counted = select(update_statement.c.run, func.count()).where(update_statement.c.site == name).group_by(update_statement.c.run)
    return {row.run: row[1] for row in connection.execute(counted.order_by(update_statement.c.run))}


def _demand_same(stands: ApprovalRow, given: ApprovalRow) -> None:
    if stands.envelope == given.envelope:
        return
    names = _named_as(stands), _named_as(given)
    if (stands.declared_patients, stands.reply_slots, names[0]) != (given.declared_patients, given.reply_slots, names[1]):
        raise RoundError(
            ErrorCode.APPROVAL_DIFFERS,
            "the site has approved this plan with other figures or another name",
            where=f"{given.site}, plan {short(given.plan)}",
            value=f"{given.declared_patients}, slots {given.reply_slots}, {names[1]!r}; "
            f"stands: {stands.declared_patients}, {stands.reply_slots}, {names[0]!r}",
            remedy="publish a plan of another name for the new figures",
        )


def _named_as(row: ApprovalRow) -> str:
    """The public name in an approval whose signature was checked before."""
    return decode_value(Approval, dsse.parse(row.envelope).payload, f"approval of {row.site}").named_as


def _plain(row: RowMapping) -> dict[str, Any]:
    return dict(row)
