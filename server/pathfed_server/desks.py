"""What the control plane's services do, from database, authority and files: the other side of `transport`'s protocols."""

import datetime
import time
from collections.abc import Sequence

from pathfed_common import files
from pathfed_common.errors import ErrorCode, PathfedError, ProvenanceError, TransportError
from pathfed_common.ids import SiteName
from pathfed_common.protocol.invitation import secret_hash
from pathfed_common.provenance.documents import SiteCard, open_card_change
from pathfed_common.provenance.keys import VerifyKey
from pathfed_common.provenance.log_leaves import KeyRotated, read_leaf
from pathfed_common.units import CLOCK_SKEW_S
from pathfed_server.db.rows import CertificateRow, EnrolmentRow, SiteReportRow, SiteRow
from pathfed_server.db.sql_store import SqlStore
from pathfed_server.home import ServerHome
from pathfed_server.rounds.state import SiteState
from pathfed_server.transport.authority import IssuedCertificate, request_key
from pathfed_server.transport.control_service import Caller, Certified, Outcome, Presented, Told
from pathfed_server.transport.enrolment_service import Answered, Asked
from pathfed_server.transport.node_keys import read_node_key
from pathfed_server.words import record_word

#: Rounds whose outcome a site is told with each report.
_OUTCOMES = 10


class Enrolments:
    """Implements `EnrolmentDesk`."""

    def __init__(self, home: ServerHome, store: SqlStore) -> None:
        """Take a home and its open store."""
        self._home, self._store = home, store

    def enroll(self, asked: Asked) -> Answered:
        """See `EnrolmentDesk`."""
        site = self._site(asked)
        now = time.time()
        row = EnrolmentRow(
            invitation=secret_hash(asked.secret),
            site=site,
            site_card=asked.site_card,
            tls_csr=asked.tls_csr,
            software=asked.software,
            state="pending",
            asked_at=now,
        )
        found = self._store.ask(row, at=now)
        if found.serial is None:
            return Answered(state=found.state)
        if self._store.site(site).state is not SiteState.ENROLLED:
            return Answered(state="refused")
        issued = self._store.certificate(found.serial)
        return Answered(
            state=found.state,
            certificate=issued.pem,
            authorities=self._home.authority().bundle,
            server_card=files.read_given(self._home.card_file),
        )

    @staticmethod
    def _site(asked: Asked) -> SiteName:
        """The site that the card names, once card, node key and request are what they must be."""
        request_key(asked.tls_csr)
        try:
            card = SiteCard.from_bytes(asked.site_card)
            read_node_key(card.flower_key)
        except PathfedError as error:
            raise TransportError(ErrorCode.ENROLMENT_UNFIT, f"the site card cannot be used: {error.what}") from None
        return card.site


class Sites:
    """Implements `ControlDesk`."""

    def __init__(self, home: ServerHome, store: SqlStore) -> None:
        """Take a home and its open store."""
        self._home, self._store = home, store
        self.consortium = home.settings.consortium

    def caller(self, presented: Presented) -> Caller:
        """See `ControlDesk`."""
        found = self._store.caller(presented.serial)
        now = self.now()
        if found is None:
            raise _refused("no certificate of this serial was issued", presented)
        site, held = found
        if (site.name, held.fingerprint) != (presented.site, presented.fingerprint):
            raise _refused("the certificate is not the one that was issued", presented)
        if site.state is not SiteState.ENROLLED or not held.stands(now):
            raise _refused("the certificate does not stand any more", presented)
        if held.first_used_at is None:
            self._store.note_first_use(held, at=now)
        return Caller(site=site.name, serial=held.serial, certificate_until=held.expires_at)

    def now(self) -> float:
        """See `ControlDesk`."""
        return time.time()

    def server_card(self) -> bytes:
        """See `ControlDesk`."""
        return files.read_given(self._home.card_file)

    def renew(self, caller: Caller, tls_csr: bytes) -> Certified:
        """See `ControlDesk`."""
        authority, now = self._home.authority(), datetime.datetime.now(datetime.UTC)
        issued = authority.issue(tls_csr, caller.site, now=now, days=self._home.settings.certificate_days)
        kept = self._store.renew(certificate_row(caller.site, issued), holds=caller.serial, at=now.timestamp())
        return Certified(certificate=kept.pem, authorities=authority.bundle)

    def rotate_key(self, caller: Caller, *, site_card: bytes, rotation: bytes, continuity: bytes) -> None:
        """See `ControlDesk`. The same change again changes nothing."""
        before = self._store.site(caller.site)
        card = _new_card(site_card, caller.site)
        place = self._home.site_card_file(caller.site)
        if (card.evidence_key.to_text(), card.flower_key) == (before.evidence_key, before.flower_key):
            files.write_atomic(place, site_card)
            return
        leaf = _handed_over(card, site_card, before, rotation, continuity, now=self.now())
        written = place.with_suffix(".new")
        files.write_atomic(written, site_card)
        try:
            self._store.rotate_keys(card, before=before, continuity=rotation or continuity, leaf=leaf, at=self.now())
            written.replace(place)
        finally:
            written.unlink(missing_ok=True)

    def plans(self) -> Sequence[bytes]:
        """See `ControlDesk`."""
        return [plan.signed for plan in self._store.plans()]

    def decide(self, caller: Caller, envelope: bytes) -> None:
        """See `ControlDesk`."""
        record_word(self._store, envelope, by=f"site:{caller.site}", site=caller.site)

    def report(self, caller: Caller, *, software: str, state: str) -> Told:
        """See `ControlDesk`."""
        self._store.note_report(SiteReportRow(site=caller.site, software=software, state=state, reported_at=self.now()))
        authority = self._home.authority()
        return Told(
            renew=authority.rotating and self._store.certificate(caller.serial).issuer != authority.pin,
            suspended=self._store.site(caller.site).suspended_at is not None,
            outcomes=[Outcome(**vars(row)) for row in self._store.outcomes(caller.site, most=_OUTCOMES)],
        )


def certificate_row(site: SiteName, issued: IssuedCertificate) -> CertificateRow:
    """What the database keeps of a certificate that the authority issued."""
    return CertificateRow(site=site, **vars(issued))


def _new_card(data: bytes, site: SiteName) -> SiteCard:
    try:
        card = SiteCard.from_bytes(data)
        read_node_key(card.flower_key)
    except PathfedError as error:
        raise TransportError(ErrorCode.ROTATION_REFUSED, f"the new card cannot be used: {error.what}") from None
    if card.site != site:
        raise TransportError(ErrorCode.ROTATION_REFUSED, "the new card names another site", value=card.site)
    return card


def _handed_over(card: SiteCard, data: bytes, before: SiteRow, rotation: bytes, continuity: bytes, *, now: float) -> KeyRotated | None:
    """Check that the key before hands over; the log's leaf where the evidence key is another."""
    old = VerifyKey.from_text(before.evidence_key)
    try:
        if card.evidence_key == old:
            if open_card_change(continuity, old) != data:
                raise TransportError(ErrorCode.ROTATION_REFUSED, "the change is of another card")
            return None
        leaf = read_leaf(rotation)
    except ProvenanceError as error:
        raise TransportError(ErrorCode.ROTATION_REFUSED, f"the key before does not hand over: {error.what}") from None
    if not isinstance(leaf, KeyRotated) or not leaf.authentic:
        raise TransportError(ErrorCode.ROTATION_REFUSED, "not a rotation that both keys signed")
    if (leaf.site, leaf.old_key, leaf.new_key) != (before.name, old, card.evidence_key) or leaf.at > now + CLOCK_SKEW_S:
        raise TransportError(ErrorCode.ROTATION_REFUSED, "the rotation is of another site or key, or of a time to come")
    return leaf


def _refused(what: str, presented: Presented) -> TransportError:
    return TransportError(ErrorCode.IDENTITY_REFUSED, what, where=presented.site, value=presented.serial)
