"""Letting sites in and out: invitations, admissions, revocations, and the certificate authority, as an operator commands them."""

import datetime
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pathfed_common import files
from pathfed_common.errors import ErrorCode, TransportError
from pathfed_common.ids import SiteName
from pathfed_common.protocol.enrolment import request_fingerprint, same_fingerprint
from pathfed_common.protocol.invitation import SECRET_BYTES, Invitation, secret_hash
from pathfed_common.provenance.documents import SiteCard
from pathfed_server.db.rows import CertificateRow, EnrolmentRow, SiteReportRow
from pathfed_server.db.sql_store import SqlStore
from pathfed_server.db.watch_rows import SiteFacts
from pathfed_server.desks import certificate_row
from pathfed_server.home import ServerHome
from pathfed_server.operators import Role, opened_by
from pathfed_server.rounds.state import SiteState
from pathfed_server.transport.authority import Authority


@dataclass(frozen=True, kw_only=True)
class Invited:
    """An invitation as it is handed over. Its text does not show in `repr`."""

    site: SiteName
    text: str = field(repr=False)
    expires_at: float


def invite(root: Path, site: SiteName, *, hours: float) -> Invited:
    """Invite a site; an earlier invitation of it that nobody used is worth nothing from here on.

    Raises:
        RoundError: PF518, the site is revoked; PF522, PF523, see `operators.acting`.
        TransportError: PF420, the authority's files do not fit together.
    """
    home, secret, now = ServerHome(root), os.urandom(SECRET_BYTES), time.time()
    made = Invitation(
        site=site,
        enrolment_address=home.settings.enrolment_address,
        secret=secret,
        ca_pin=home.authority().server_pin,
        server_key=home.evidence_key.public,
    )
    expires = now + hours * 3600
    with opened_by(root, Role.OPERATOR) as (store, by):
        store.add_invitation(secret_hash(secret), site, expires_at=expires, at=now, by=by)
    return Invited(site=site, text=made.to_text(), expires_at=expires)


def pending(root: Path) -> list[tuple[EnrolmentRow, str]]:
    """The requests that wait, each with the fingerprint to compare with the hospital's.

    Raises:
        RoundError: PF522, see `operators.acting`.
    """
    with opened_by(root, Role.AUDITOR) as (store, _):
        return [(row, request_fingerprint(row.site_card, row.tls_csr)) for row in store.enrolments("pending")]


def admit(root: Path, site: SiteName, fingerprint: str) -> CertificateRow:
    """Admit a site whose request has the fingerprint that the hospital told.

    Raises:
        RoundError: PF521, no request waits; PF502, PF518, the name or keys are taken or revoked; PF522, PF523, see `operators.acting`.
        TransportError: PF421, the fingerprint is another one; PF414, the TLS key has a certificate already.
    """
    home = ServerHome(root)
    with opened_by(root, Role.OPERATOR) as (store, by):
        asked = store.pending(site)
        if not same_fingerprint(fingerprint, request_fingerprint(asked.site_card, asked.tls_csr)):
            raise TransportError(
                ErrorCode.FINGERPRINT_DIFFERS, "the request that came has another fingerprint", where=site, value=fingerprint[:80]
            )
        now = datetime.datetime.now(datetime.UTC)
        issued = certificate_row(site, home.authority().issue(asked.tls_csr, site, now=now, days=home.settings.certificate_days))
        place = home.site_card_file(SiteCard.from_bytes(asked.site_card).site)
        written = place.with_suffix(".new")
        files.write_atomic(written, asked.site_card)
        try:
            store.admit(asked, issued, at=now.timestamp(), by=by)
            written.replace(place)
        finally:
            written.unlink(missing_ok=True)
    return issued


def refuse(root: Path, site: SiteName) -> None:
    """Refuse a site's request.

    Raises:
        RoundError: PF521, none waits; PF522, PF523, see `operators.acting`.
    """
    with opened_by(root, Role.OPERATOR) as (store, by):
        store.refuse(site, at=time.time(), by=by)


def revoke(root: Path, site: SiteName) -> None:
    """Take a site out, on every plane: its certificates, invitations, offers and Flower node.

    Raises:
        RoundError: PF501, no such site; PF522, PF523, see `operators.acting`.
    """
    with opened_by(root, Role.OPERATOR) as (store, by):
        store.revoke_site(site, at=time.time(), by=by)


def site_rows(root: Path) -> list[dict[str, Any]]:
    """Every site, with what it last reported, until when its certificate holds, and what it has done in rounds.

    Raises:
        RoundError: PF522, see `operators.acting`.
    """
    now = time.time()
    with opened_by(root, Role.AUDITOR) as (store, _):
        reports, until = store.reports(), {row.site: row.expires_at for row in store.certificates() if row.stands(now)}
        sites = store.sites()  # before what they have done: of each site found here, that is known
        done = store.site_facts()
        return [
            {
                "site": row.name,
                "state": row.state.value,
                "suspended_at": row.suspended_at,
                **_seen(done[row.name], reports.get(row.name)),
                "evidence_key": row.evidence_key,
                "enrolled_at": row.enrolled_at,
                "certificate_until_at": until.get(row.name),
                "reports": reports[row.name].state if row.name in reports else None,
                "software": reports[row.name].software if row.name in reports else None,
                "reported_at": reports[row.name].reported_at if row.name in reports else None,
            }
            for row in sites
        ]


def _seen(done: SiteFacts, report: SiteReportRow | None) -> dict[str, Any]:
    """When a site was last heard of, the rounds that it counts in, and the last update of it that was refused."""
    times = [at for at in (done.last_update_at, None if report is None else report.reported_at) if at is not None]
    _, at, detail = done.last_refusal or (0, None, {})
    refusal = None if at is None else {"code": detail.get("code"), "run": detail.get("run"), "round": detail.get("round"), "at": at}
    return {"last_seen_at": max(times, default=None), "rounds": done.rounds, "last_refusal": refusal}


def authority_state(root: Path) -> dict[str, Any]:
    """Where the certificate authority stands.

    Raises:
        RoundError: PF522, see `operators.acting`.
        TransportError: PF420, the authority's files do not fit together.
    """
    home = ServerHome(root)
    with opened_by(root, Role.AUDITOR) as (store, _):
        authority = home.authority()
        return {
            "rotating": authority.rotating,
            "issues": authority.pin,
            "issues_until_at": authority.issuing.not_valid_after_utc.timestamp(),
            "server_certificate_from": authority.server_pin,
            "server_certificate_until_at": authority.server_until.timestamp(),
            "sites_without_the_new_authority": _behind(store, authority),
        }


def renew_server(root: Path) -> dict[str, Any]:
    """Give the server a new TLS key and certificate, from the authority that is there.

    Raises:
        RoundError: PF522, PF523, see `operators.acting`.
        TransportError: PF420, a rotation is going on.
    """
    return _change(root, "ca.server_renewed", lambda home, store, now, by: home.authority().renew_server(home.settings.hosts, now=now))


def rotate_authority(root: Path) -> dict[str, Any]:
    """Begin a rotation of the authority.

    Raises:
        RoundError: PF522, PF523, see `operators.acting`.
        TransportError: PF420, a rotation is going on.
    """
    return _change(root, "ca.rotation_begun", lambda home, store, now, by: home.authority().rotate(home.settings.hosts, now=now))


def finish_rotation(root: Path, *, leave_behind: bool) -> dict[str, Any]:
    """Finish a rotation: the old authority is trusted no more. Invitations that nobody used pinned it, and are withdrawn.

    Args:
        root: the server's home.
        leave_behind: finish although some sites have no certificate from the new authority; they must be invited again.

    Raises:
        RoundError: PF522, PF523, see `operators.acting`.
        TransportError: PF420, no rotation is going on, or sites would be left behind.
    """

    def finish(home: ServerHome, store: SqlStore, now: datetime.datetime, by: str) -> None:
        authority = home.authority()
        behind = _behind(store, authority)
        if authority.rotating and behind and not leave_behind:
            raise TransportError(
                ErrorCode.AUTHORITY_STATE,
                "some sites have no certificate from the new authority yet",
                value=", ".join(behind),
                remedy="wait until they have renewed, or give --leave-behind and invite them again",
            )
        authority.finish(home.settings.hosts, now=now)
        store.withdraw_all_invitations(at=now.timestamp(), by=by)

    return _change(root, "ca.rotation_finished", finish)


def _change(root: Path, action: str, change: Callable[[ServerHome, SqlStore, datetime.datetime, str], None]) -> dict[str, Any]:
    home, now = ServerHome(root), datetime.datetime.now(datetime.UTC)
    with opened_by(root, Role.ADMIN) as (store, by):
        change(home, store, now, by)
        home.write_card()
        pins = {"issues": home.authority().pin, "server_certificate_from": home.authority().server_pin}
        store.audit(actor=by, action=action, subject="server", at=now.timestamp(), detail=pins)
    return authority_state(root)


def _behind(store: SqlStore, authority: Authority) -> list[SiteName]:
    """Enrolled sites whose certificate is from an older authority, and that have not called with one from the newest."""
    now = time.time()
    enrolled = {row.name for row in store.sites() if row.state is SiteState.ENROLLED}
    standing = [row for row in store.certificates() if row.site in enrolled and row.stands(now)]
    fresh = {row.site for row in standing if row.issuer == authority.pin and row.first_used_at is not None}
    return sorted({row.site for row in standing if row.issuer != authority.pin} - fresh)
