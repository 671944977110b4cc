"""Invitations and enrolments in the server database: who may come in, who asked, and what was decided."""

from sqlalchemy import Connection, and_, insert, select, update

from pathfed_common.digest import Digest
from pathfed_common.errors import ErrorCode, RoundError, TransportError
from pathfed_common.ids import SiteName
from pathfed_common.provenance.documents import SiteCard
from pathfed_common.provenance.log_leaves import SiteAdmitted
from pathfed_server.db.audit_store import add_event
from pathfed_server.db.certificate_store import add_certificate
from pathfed_server.db.log_store import append_leaves
from pathfed_server.db.membership import enrol_site, lock_table, withdraw_invitations
from pathfed_server.db.rows import CertificateRow, EnrolmentRow, InvitationRow
from pathfed_server.db.schema import enrolment, invitation, site
from pathfed_server.db.sites_store import SitesStore
from pathfed_server.rounds.state import SiteState


class EnrolmentStore(SitesStore):
    """How sites come in."""

    def add_invitation(self, secret_hash: Digest, name: SiteName, *, expires_at: float, at: float, by: str) -> None:
        """Invite a site; its earlier invitations that nobody used are withdrawn.

        Raises:
            RoundError: PF518, the site is revoked.
        """
        with self._write() as connection:
            state = connection.execute(select(site.c.state).where(site.c.name == name)).scalar()
            if state == SiteState.REVOKED:
                raise RoundError(
                    ErrorCode.SITE_REVOKED,
                    "a revoked site is not invited again",
                    value=name,
                    remedy="invite the hospital under another name",
                )
            withdraw_invitations(connection, name, at=at)
            connection.execute(insert(invitation).values(secret_hash=secret_hash, site=name, created_at=at, expires_at=expires_at))
            add_event(connection, actor=by, action="site.invited", subject=name, at=at, detail={"expires_at": expires_at})

    def invitations(self) -> list[InvitationRow]:
        """Every invitation, the oldest first."""
        with self._read() as connection:
            rows = connection.execute(select(invitation).order_by(invitation.c.created_at, invitation.c.secret_hash)).mappings().all()
        return [InvitationRow(**row) for row in rows]

    def ask(self, asked: EnrolmentRow, *, at: float) -> EnrolmentRow:
        """Take a request to enrol, or, where the very same was taken before, say what became of it.

        Raises:
            TransportError: PF412, the invitation is unknown, withdrawn, expired, or used by another request; PF413, it is for another site.
        """
        with self._read() as connection:
            found = _enrolment(connection, asked.invitation)
        if found is not None:
            return _same(found, asked)
        with self._write() as connection:
            lock_table(connection, "enrolment")
            found = _enrolment(connection, asked.invitation)
            if found is not None:
                return _same(found, asked)
            given = connection.execute(select(invitation).where(invitation.c.secret_hash == asked.invitation)).mappings().first()
            if given is None or given["withdrawn_at"] is not None or at >= given["expires_at"]:
                raise _invitation_refused()
            if given["site"] != asked.site:
                raise TransportError(ErrorCode.ENROLMENT_UNFIT, "the card is of another site than the one invited", value=asked.site)
            connection.execute(insert(enrolment).values(vars(asked)))
            add_event(connection, actor=f"invited:{asked.site}", action="site.asked", subject=asked.site, at=at)
        return asked

    def enrolments(self, state: str | None = None) -> list[EnrolmentRow]:
        """Every request, or those of one state, the oldest first."""
        query = select(enrolment).order_by(enrolment.c.asked_at, enrolment.c.invitation)
        with self._read() as connection:
            rows = connection.execute(query if state is None else query.where(enrolment.c.state == state)).mappings().all()
        return [EnrolmentRow(**row) for row in rows]

    def pending(self, name: SiteName) -> EnrolmentRow:
        """The site's request that waits; the newest, where it was invited again meanwhile.

        Raises:
            RoundError: PF521, none waits.
        """
        with self._read() as connection:
            return _pending(connection, name)

    def admit(self, asked: EnrolmentRow, issued: CertificateRow, *, at: float, by: str) -> None:
        """Admit a site: its row and keys where it is new, and its certificate. A site that is enrolled with these keys keeps them.

        Raises:
            RoundError: PF521, the request does not wait any more; PF502, name or keys are another's; PF518, the site is revoked.
            TransportError: PF414, the TLS key has a certificate already.
        """
        card = SiteCard.from_bytes(asked.site_card)
        keys = {"evidence_key": card.evidence_key.to_text(), "flower_key": card.flower_key}
        with self._write() as connection:
            # The site before its request, as where it is revoked.
            here = connection.execute(select(site).where(site.c.name == asked.site).with_for_update()).mappings().first()
            if _pending(connection, asked.site) != asked:
                raise _none_waits(asked.site)
            leaves: list[SiteAdmitted] = []
            if here is None:
                leaves = [enrol_site(connection, asked.site, **keys, at=at, by=by)]
            elif here["state"] != SiteState.ENROLLED:
                raise RoundError(ErrorCode.SITE_REVOKED, "a revoked site is not admitted", value=asked.site)
            elif {name: here[name] for name in keys} != keys:
                raise RoundError(
                    ErrorCode.SITE_EXISTS,
                    "the site is enrolled with other keys",
                    value=asked.site,
                    remedy="let the hospital enrol with its own home, or revoke the site and invite it under another name",
                )
            add_certificate(connection, issued, at=at)
            _decide(connection, asked, state="admitted", at=at, serial=issued.serial)
            add_event(connection, actor=by, action="site.admitted", subject=asked.site, at=at, detail={"serial": issued.serial})
            append_leaves(connection, leaves)

    def refuse(self, name: SiteName, *, at: float, by: str) -> None:
        """Refuse the site's request that waits.

        Raises:
            RoundError: PF521, none waits.
        """
        with self._write() as connection:
            _decide(connection, _pending(connection, name), state="refused", at=at, serial=None)
            add_event(connection, actor=by, action="site.refused", subject=name, at=at)

    def withdraw_all_invitations(self, *, at: float, by: str) -> int:
        """Withdraw every invitation that nobody has used; how many."""
        with self._write() as connection:
            count = withdraw_invitations(connection, None, at=at)
            add_event(connection, actor=by, action="invitations.withdrawn", subject="server", at=at, detail={"count": count})
        return count


def _enrolment(connection: Connection, secret_hash: Digest) -> EnrolmentRow | None:
    row = connection.execute(select(enrolment).where(enrolment.c.invitation == secret_hash)).mappings().first()
    return None if row is None else EnrolmentRow(**row)


def _same(found: EnrolmentRow, asked: EnrolmentRow) -> EnrolmentRow:
    if (found.site, found.site_card, found.tls_csr) != (asked.site, asked.site_card, asked.tls_csr):
        raise _invitation_refused()
    return found


def _pending(connection: Connection, name: SiteName) -> EnrolmentRow:
    waits = and_(enrolment.c.site == name, enrolment.c.state == "pending")
    query = select(enrolment).where(waits).order_by(enrolment.c.asked_at.desc(), enrolment.c.invitation).with_for_update()
    row = connection.execute(query).mappings().first()
    if row is None:
        raise _none_waits(name)
    return EnrolmentRow(**row)


def _decide(connection: Connection, asked: EnrolmentRow, *, state: str, at: float, serial: str | None) -> None:
    here = enrolment.c.invitation == asked.invitation
    connection.execute(update(enrolment).where(here).values(state=state, decided_at=at, serial=serial))


def _none_waits(name: SiteName) -> RoundError:
    return RoundError(
        ErrorCode.ENROLMENT_UNKNOWN, "no request of this site is waiting", value=name, remedy="see `pathfed-server sites pending`"
    )


def _invitation_refused() -> TransportError:
    return TransportError(ErrorCode.INVITATION_REFUSED, "the invitation is not valid, or not any more", remedy="ask for a new invitation")
