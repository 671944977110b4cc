"""Enrolment at the site: from an invitation to a home that the server knows.

    1. check      the invitation is for this site, and for the server that this home belongs to, if it belongs to one already
    2. pin        the CA that the server shows must have the invitation's pin
    3. ask        site card and certificate request, both made here; then wait until the operator has compared fingerprints and decided
    4. check      certificate and server card must be what they say: this site's key, this CA, the invitation's server key
    5. keep       server card, CA, certificate, in this order: with the certificate the home is enrolled

Any step may be cut short: the same command again takes up where it was, with the same keys and the same request. Only after step 4 is
anything of the server's written.
"""

import base64
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cryptography import x509

from pathfed_client.control.certificates import check_certificate, checked_ca, finish, unusable
from pathfed_client.egress.outlet import Outlet
from pathfed_client.home import SiteHome
from pathfed_client.io.log_head import LogHeadFile
from pathfed_client.io.site_keys import KeyKind, certificate_request, public_half, tls_public
from pathfed_common import __version__, digest, files
from pathfed_common.digest import Digest
from pathfed_common.errors import ErrorCode, HostError, PathfedError, ProvenanceError, TransportError
from pathfed_common.protocol import spiffe
from pathfed_common.protocol.enrolment import request_fingerprint
from pathfed_common.protocol.invitation import Invitation, secret_hash
from pathfed_common.provenance.documents import ServerCard

if TYPE_CHECKING:
    from pathfed_client.transport.enrolment_client import Enrolled

ASK_EVERY_S = 3.0
#: What passes by itself while the operator is waited for.
_PASSING = (ErrorCode.SERVER_UNREACHABLE, ErrorCode.RATE_LIMITED, ErrorCode.CONTROL_INTERNAL)


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
    finish(home)
    card, request = home.card_file.read_bytes(), _request(home, secret_hash(invitation.secret))
    fingerprint = request_fingerprint(card, request)
    ca = pinned_ca(invitation)

    def ask() -> "Enrolled":
        return request_enrolment(invitation, ca=ca, site_card=card, csr=request, software=__version__, outlet=outlet)

    answer = ask()
    if answer.state is EnrolmentState.PENDING and wait:
        tell(f"asked. Tell the operator this fingerprint by telephone: {fingerprint}")
        tell("waiting for the operator's admission; Ctrl-C stops the waiting and loses nothing")
        answer = _decided(ask, tell, lambda: sleep(ask_every_s))
    if answer.state is EnrolmentState.REFUSED:
        raise TransportError(ErrorCode.ENROLMENT_REFUSED, "the operator has refused this enrolment", where=invitation.enrolment_address)
    if answer.state is EnrolmentState.PENDING:
        return Enrolment(admitted=False, fingerprint=fingerprint)
    until = _keep(home, invitation, answer, ca, _key_of(home, request) or home.keys.tls_key())
    return Enrolment(admitted=True, fingerprint=fingerprint, certificate_until=until)


def _decided(ask: Callable[[], "Enrolled"], tell: Callable[[str], None], rest: Callable[[], None]) -> "Enrolled":
    """Ask until the operator has decided, also over times in which the server is away."""
    from pathfed_client.transport.enrolment_client import EnrolmentState

    away = False
    while True:
        rest()
        try:
            answer = ask()
        except PathfedError as error:
            if error.code not in _PASSING:
                raise
            if not away:
                tell(f"{error.code.value} {error.what}; trying again until it answers")
            away = True
            continue
        away = False
        if answer.state is not EnrolmentState.PENDING:
            return answer


def enrolment_fingerprint(home: SiteHome) -> str:
    """What the operator sees of this home's enrolment, whether it was asked for already or not.

    Raises:
        HostError: PF901, PF904, PF906: files.
    """
    return request_fingerprint(home.card_file.read_bytes(), _request(home, None))


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


def _request(home: SiteHome, invitation: Digest | None) -> bytes:
    """The certificate request of an invitation (None: of whichever was used last), made once: the same is asked for however often.

    A key gets one certificate, so a further invitation of this home, after its certificate has ended say, is used with a new key.
    """
    home.keys.make(KeyKind.TLS)
    path = home.root / "enrolment.json"
    used, made = _kept_request(path)
    if made is not None and _key_of(home, made) is not None and (None in (used, invitation) or used == invitation):
        if used is None and invitation is not None:
            _keep_request(path, invitation, made)
        return made
    further = used is not None and invitation is not None
    if further:
        home.keys.drop_staged(KeyKind.TLS)
        home.keys.stage(KeyKind.TLS)
    made = certificate_request(home.keys.tls_key(staged=further), home.name)
    _keep_request(path, invitation, made)
    return made


def _kept_request(path: Path) -> tuple[Digest | None, bytes | None]:
    """The invitation (by the hash of its secret) and the request that it was used with, as far as they are there."""
    try:
        raw = json.loads(path.read_bytes())
        return raw["invitation"], base64.b64decode(raw["request"])
    except (OSError, ValueError, TypeError, KeyError):
        return None, None


def _keep_request(path: Path, invitation: Digest | None, request: bytes) -> None:
    files.write_atomic(path, digest.canonical({"invitation": invitation, "request": base64.b64encode(request).decode("ascii")}))


def _key_of(home: SiteHome, request: bytes) -> bytes | None:
    """The TLS key, in use or staged, that a request is for."""
    public = public_half(x509.load_der_x509_csr(request))
    keys = [home.keys.tls_key(), *([home.keys.tls_key(staged=True)] if home.keys.is_staged(KeyKind.TLS) else [])]
    return next((key for key in keys if tls_public(key) == public), None)


def _keep(home: SiteHome, invitation: Invitation, answer: "Enrolled", ca: bytes, key: bytes) -> float:
    """Check what the server sent, and keep it."""
    where = invitation.enrolment_address
    try:
        card = ServerCard.from_bytes(answer.server_card)
    except ProvenanceError as error:
        raise unusable(f"its card cannot be used: {error.what}", where) from error
    if card.evidence_key != invitation.server_key:
        raise TransportError(
            ErrorCode.PIN_DIFFERS,
            "the server's evidence key is not the one in the invitation",
            where=where,
            value=card.evidence_key.to_text(),
            remedy="do not go on; ask the operator by telephone for the server's key",
        )
    trusted = checked_ca(answer.ca, ca, where)
    until = check_certificate(answer.certificate, key, trusted, spiffe.site_uri(card.name, home.name), where)
    if not home.enrolled and not home.log_head.exists():
        LogHeadFile.create(home.run_secrets)
    files.write_atomic(home.server_card_file, answer.server_card)
    files.write_atomic(home.ca_file, trusted)
    files.write_atomic(home.next_certificate_file, answer.certificate)
    finish(home)
    return until
