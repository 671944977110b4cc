"""Enrolment at the site: from an invitation to a home that the server knows.

    1. check      the invitation is for this site, and for the server that this home belongs to, if it belongs to one already
    2. pin        the CA that the server shows must have the invitation's pin
    3. ask        site card and certificate request, both made here; then wait until the operator has compared fingerprints and decided
    4. check      certificate and server card must be what they say: this site's key, this CA, the invitation's server key
    5. keep       server card, CA, certificate, in this order: with the certificate the home is enrolled

Any step may be cut short: the same command again takes up where it was, with the same keys and the same request. Only after step 4 is
anything of the server's written.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from pathfed_client.egress.outlet import Outlet
from pathfed_client.home import SiteHome
from pathfed_client.io.log_head import LogHeadFile
from pathfed_client.io.site_keys import KeyKind, certificate_request, tls_public
from pathfed_common import __version__, files
from pathfed_common.errors import ErrorCode, HostError, PathfedError, ProvenanceError, TransportError
from pathfed_common.protocol import spiffe
from pathfed_common.protocol.enrolment import request_fingerprint
from pathfed_common.protocol.invitation import Invitation, ca_pin
from pathfed_common.provenance.documents import ServerCard

if TYPE_CHECKING:
    from pathfed_client.transport.enrolment_client import Enrolled

ASK_EVERY_S = 3.0


@dataclass(frozen=True, kw_only=True)
class Enrolment:
    """Where an enrolment stands.

    Attributes:
        admitted: whether the home is enrolled now.
        fingerprint: of the request, for the operator to compare by telephone.
        certificate_until: end of the site's certificate, UTC seconds; None as long as there is none.
    """

    admitted: bool
    fingerprint: str
    certificate_until: float | None = None


def enroll(
    home: SiteHome,
    text: str,
    outlet: Outlet,
    *,
    wait: bool,
    tell: Callable[[str], None],
    ask_every_s: float = ASK_EVERY_S,
    sleep: Callable[[float], None] = time.sleep,
) -> Enrolment:
    """Enrol this home.

    Args:
        home: the site.
        text: the invitation.
        outlet: writes down what leaves.
        wait: until the operator has decided; else ask once.
        tell: hears the fingerprint, and that the server is away.
        ask_every_s: seconds between questions.
        sleep: waits.

    Raises:
        TransportError: PF411, PF412 and others, the invitation is not accepted; PF431, another server; PF432, the operator refused; PF401,
            PF403, PF433: see `transport.channel`.
        HostError: PF915, this home belongs to another server, or the invitation is another site's; PF901, PF904, PF906: files.
    """
    from pathfed_client.transport.enrolment_client import EnrolmentState, pinned_ca, request_enrolment

    invitation = Invitation.from_text(text)
    _check_home(home, invitation)
    card, request = home.card_file.read_bytes(), _request(home)
    fingerprint = request_fingerprint(card, request)
    ca = pinned_ca(invitation)
    told = False
    while True:
        answer = request_enrolment(invitation, ca=ca, site_card=card, csr=request, software=__version__, outlet=outlet)
        if answer.state is EnrolmentState.REFUSED:
            raise TransportError(ErrorCode.ENROLMENT_REFUSED, "the operator has refused this enrolment", where=invitation.enrolment_address)
        if answer.state is EnrolmentState.ADMITTED:
            until = _keep(home, invitation, answer, ca)
            return Enrolment(admitted=True, fingerprint=fingerprint, certificate_until=until)
        if not wait:
            return Enrolment(admitted=False, fingerprint=fingerprint)
        if not told:
            tell(f"asked. Tell the operator this fingerprint by telephone: {fingerprint}")
            tell("waiting for the operator's admission; Ctrl-C stops the waiting and loses nothing")
            told = True
        sleep(ask_every_s)


def enrolment_fingerprint(home: SiteHome) -> str:
    """What the operator sees of this home's enrolment, whether it was asked for already or not.

    Raises:
        HostError: PF901, PF904, PF906: files.
    """
    return request_fingerprint(home.card_file.read_bytes(), _request(home))


def _check_home(home: SiteHome, invitation: Invitation) -> None:
    if invitation.site != home.name:
        raise HostError(
            ErrorCode.ENROLMENT_ELSEWHERE,
            "the invitation is for another site",
            where=home.root,
            value=f"invited: {invitation.site}, this home: {home.name}",
            remedy="ask for an invitation of this site, or make a home with the invited name (`pathfed-site init --name`)",
        )
    if home.has_server and (home.server_card.evidence_key != invitation.server_key):
        raise HostError(
            ErrorCode.ENROLMENT_ELSEWHERE,
            "this home belongs to another server already",
            where=home.root,
            value=f"its server's key: {home.server_card.evidence_key.to_text()}",
            remedy="make another home for another consortium; ledger and keys of one are never shared with the next",
        )


def _request(home: SiteHome) -> bytes:
    """The certificate request: made once, so that the same enrolment is asked for however often."""
    home.keys.make(KeyKind.TLS)
    path, key = home.root / "tls-request.der", home.keys.tls_key()
    if path.exists():
        made = path.read_bytes()
        if _public_of_request(made) == tls_public(key):
            return made
    made = certificate_request(key, home.name)
    files.write_atomic(path, made)
    return made


def _keep(home: SiteHome, invitation: Invitation, answer: "Enrolled", ca: bytes) -> float:
    """Check what the server sent, and keep it."""
    where = invitation.enrolment_address
    try:
        card = ServerCard.from_bytes(answer.server_card)
    except ProvenanceError as error:
        raise _unusable(f"its card cannot be used: {error.what}", where) from error
    if card.evidence_key != invitation.server_key:
        raise TransportError(
            ErrorCode.PIN_DIFFERS,
            "the server's evidence key is not the one in the invitation",
            where=where,
            value=card.evidence_key.to_text(),
            remedy="do not go on; ask the operator by telephone for the server's key",
        )
    trusted = checked_ca(answer.ca, ca, where)
    until = check_certificate(answer.certificate, home.keys.tls_key(), trusted, spiffe.site_uri(card.name, home.name), where)
    if not home.enrolled and not home.log_head.exists():
        LogHeadFile.create(home.run_secrets)
    files.write_atomic(home.server_card_file, answer.server_card)
    files.write_atomic(home.ca_file, trusted)
    files.write_atomic(home.certificate_file, answer.certificate)
    return until


def checked_ca(sent: bytes, known: bytes, where: str) -> bytes:
    """The CAs that a server sends, which must hold the one that is trusted already.

    Raises:
        TransportError: PF433, they are none, or do not hold it.
    """
    try:
        pins = {ca_pin(certificate.public_bytes(Encoding.PEM)) for certificate in x509.load_pem_x509_certificates(sent)}
    except ValueError as error:
        raise _unusable(f"its CAs cannot be read: {error}", where) from None
    if not pins & {ca_pin(certificate.public_bytes(Encoding.PEM)) for certificate in x509.load_pem_x509_certificates(known)}:
        raise _unusable("the CAs that it sends do not hold the one that is trusted", where)
    return sent


def check_certificate(certificate: bytes, key: bytes, ca: bytes, identity: str, where: str) -> float:
    """See that a certificate is for this key and this identity, by one of these CAs; its end in UTC seconds.

    Raises:
        TransportError: PF433, it is not.
    """
    try:
        found = x509.load_pem_x509_certificate(certificate)
        public = found.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        identities = names.get_values_for_type(x509.UniformResourceIdentifier)
    except (ValueError, x509.ExtensionNotFound) as error:
        raise _unusable(f"its certificate for this site cannot be read: {error}", where) from None
    if public != tls_public(key):
        raise _unusable("its certificate is not for this site's key", where)
    if identities != [identity]:
        raise _unusable(f"its certificate is not for {identity}", where)
    if not any(_issued_by(found, authority) for authority in x509.load_pem_x509_certificates(ca)):
        raise _unusable("its certificate for this site is not of the pinned CA", where)
    return found.not_valid_after_utc.timestamp()


def certificate_times(certificate: bytes) -> tuple[float, float]:
    """From when to when a certificate is valid, UTC seconds."""
    found = x509.load_pem_x509_certificate(certificate)
    times = (found.not_valid_before_utc, found.not_valid_after_utc)
    return times[0].timestamp(), times[1].timestamp()


def _issued_by(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(authority)
    except Exception:
        return False
    return True


def _public_of_request(request: bytes) -> bytes:
    return x509.load_der_x509_csr(request).public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def _unusable(what: str, where: str) -> PathfedError:
    return TransportError(ErrorCode.ANSWER_UNUSABLE, f"the server's answer cannot be used: {what}", where=where)
