"""The site's certificate: what is demanded of one that a server sends, and how a new one takes the old one's place."""

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from pathfed_client.home import SiteHome
from pathfed_client.io.site_keys import KeyKind, public_half, tls_public
from pathfed_common import files
from pathfed_common.errors import ErrorCode, TransportError
from pathfed_common.protocol.invitation import ca_pin


def checked_ca(sent: bytes, known: bytes, where: str) -> bytes:
    """The CAs that a server sends, which must hold the one that is trusted already.

    Raises:
        TransportError: PF433, they are none, or do not hold it.
    """
    try:
        pins = {ca_pin(certificate.public_bytes(Encoding.PEM)) for certificate in x509.load_pem_x509_certificates(sent)}
    except (ValueError, x509.InvalidVersion) as error:
        raise unusable(f"its CAs cannot be read: {error}", where) from None
    if not pins & {ca_pin(certificate.public_bytes(Encoding.PEM)) for certificate in x509.load_pem_x509_certificates(known)}:
        raise unusable("the CAs that it sends do not hold the one that is trusted", where)
    return sent


def check_certificate(certificate: bytes, key: bytes, ca: bytes, identity: str, where: str) -> float:
    """See that a certificate is for this key and this identity, by one of these CAs; its end in UTC seconds.

    Raises:
        TransportError: PF433, it is not.
    """
    try:
        found = x509.load_pem_x509_certificate(certificate)
        public = public_half(found)
        names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        identities = names.get_values_for_type(x509.UniformResourceIdentifier)
    except (ValueError, x509.InvalidVersion, x509.ExtensionNotFound) as error:
        raise unusable(f"its certificate for this site cannot be read: {error}", where) from None
    if public != tls_public(key):
        raise unusable("its certificate is not for this site's key", where)
    if identities != [identity]:
        raise unusable(f"its certificate is not for {identity}", where)
    if not any(_issued_by(found, authority) for authority in x509.load_pem_x509_certificates(ca)):
        raise unusable("its certificate for this site is not of the pinned CA", where)
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


def finish(home: SiteHome) -> None:
    """Take over a new key and certificate that were received, as far as that is not done yet.

    Raises:
        HostError: PF901, PF904, PF906: files.
    """
    waiting = home.next_certificate_file
    if not waiting.exists():
        return
    certificate = waiting.read_bytes()
    wanted = public_half(x509.load_pem_x509_certificate(certificate))
    if home.keys.is_staged(KeyKind.TLS) and tls_public(home.keys.tls_key(staged=True)) == wanted:
        home.keys.promote(KeyKind.TLS)
    if tls_public(home.keys.tls_key()) == wanted:
        files.write_atomic(home.certificate_file, certificate)
    waiting.unlink()


def unusable(what: str, where: str) -> TransportError:
    """PF433: what a server sent is not what it has to be."""
    return TransportError(ErrorCode.ANSWER_UNUSABLE, f"the server's answer cannot be used: {what}", where=where)
