"""The consortium's certificate authority: what it issues to sites, and how it is replaced without anybody being locked out.

Files of the server's home (`AuthorityFiles`): the bundle of trusted authorities, the issuing authority's key, and the server's certificate
with its key. The issuing authority is the one in the bundle whose key is there.

| state | bundle | issues to sites | signed the server's certificate |
| --- | --- | --- | --- |
| at rest | A | A | A |
| rotating | B, A | B | A, so that sites which trust A alone still reach the server |
| finished | B | B | B |

A's key is gone from the first moment of a rotation: nothing needs it any more. A rotation is finished when every site has a certificate
from B, and with it the bundle that holds B.
"""

import datetime
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from pathfed_common import digest, files
from pathfed_common.digest import Digest
from pathfed_common.errors import ErrorCode, TransportError
from pathfed_common.ids import SiteName
from pathfed_common.protocol.invitation import ca_pin
from pathfed_common.protocol.spiffe import site_uri
from pathfed_server.transport.certificates import make_ca, make_server_certificate, make_site_certificate, read_key

#: A request for a certificate on P-384 has about 400 bytes.
REQUEST_LIMIT = 4096
_CURVES = (ec.SECP256R1, ec.SECP384R1)


@dataclass(frozen=True, kw_only=True)
class AuthorityFiles:
    """Where the authority's parts are.

    Attributes:
        bundle: certificates of the trusted authorities, the newest first, PEM.
        key: the issuing authority's key.
        server_certificate: the server's TLS certificate, followed by that of the authority that signed it.
        server_key: its key.
    """

    bundle: Path
    key: Path
    server_certificate: Path
    server_key: Path


@dataclass(frozen=True, kw_only=True)
class IssuedCertificate:
    """A certificate for a site, and what the database keeps of it. Times are UTC seconds."""

    serial: str
    tls_key: Digest
    fingerprint: Digest
    issuer: Digest
    pem: bytes
    issued_at: float
    expires_at: float


class Authority:
    """The authority as its files say now."""

    def __init__(self, consortium: str, where: AuthorityFiles) -> None:
        """Read it.

        Raises:
            HostError: PF904, PF906, a file is missing or a key may be read by others.
            TransportError: PF420, the bundle holds no certificates, or none for the key that is there.
        """
        self._consortium, self._where = consortium, where
        self._key = read_key(files.read_secret(where.key))
        self.trusted = _certificates(where.bundle)
        public = self._key.public_key()
        mine = [each for each in self.trusted if each.public_key() == public]
        if not mine:
            raise TransportError(
                ErrorCode.AUTHORITY_STATE,
                "no authority in the bundle has the key that is there",
                where=where.bundle,
                remedy="restore both files from one backup",
            )
        self.issuing = mine[0]

    @property
    def bundle(self) -> bytes:
        """The authorities that sites and server trust, PEM."""
        return b"".join(_pem(each) for each in self.trusted)

    @property
    def pin(self) -> Digest:
        """Pin of the authority that issues."""
        return ca_pin(_pem(self.issuing))

    @property
    def server_pin(self) -> Digest:
        """Pin of the authority that the server's certificate leads to: what an invitation holds."""
        return ca_pin(_pem(self._server_issuer()))

    @property
    def server_until(self) -> datetime.datetime:
        """When the server's certificate ends (UTC)."""
        return self._server_certificate().not_valid_after_utc

    @property
    def rotating(self) -> bool:
        """Whether a rotation has begun and is not finished."""
        return len(self.trusted) > 1

    def issue(self, csr_der: bytes, site: SiteName, *, now: datetime.datetime, days: int) -> IssuedCertificate:
        """Issue a certificate for the key of a request; of the rest of the request nothing is taken over.

        Args:
            csr_der: PKCS #10, DER.
            site: whose certificate it is.
            now: UTC.
            days: how long it holds.

        Raises:
            TransportError: PF414, not a request, not signed by its own key, or not a key on P-256 or P-384.
        """
        key = request_key(csr_der)
        made = make_site_certificate(site_uri(self._consortium, site), key, self.issuing, self._key, now=now, days=days)
        return IssuedCertificate(
            serial=serial_text(made),
            tls_key=key_digest(key),
            fingerprint=fingerprint(made),
            issuer=self.pin,
            pem=_pem(made),
            issued_at=now.timestamp(),
            expires_at=made.not_valid_after_utc.timestamp(),
        )

    def renew_server(self, hosts: list[str], *, now: datetime.datetime) -> None:
        """Give the server a new key and certificate.

        A process that is killed between the two files leaves a pair that does not fit; running it again mends that.

        Raises:
            TransportError: PF420, a rotation is going on: the certificate is from the authority before, whose key is gone.
        """
        if self.rotating:
            raise TransportError(
                ErrorCode.AUTHORITY_STATE, "the authority is being rotated", where=self._where.bundle, remedy="finish the rotation first"
            )
        self._certify_server(hosts, now)

    def rotate(self, hosts: list[str], *, now: datetime.datetime) -> None:
        """Begin a rotation: a new authority issues from here on, the old one is trusted still and its key is erased.

        The server gets a fresh certificate from the old authority first. Killed at any instant, it can be run again.

        Raises:
            TransportError: PF420, a rotation is going on.
        """
        if self.rotating and self.issuing == self.trusted[0]:
            raise TransportError(ErrorCode.AUTHORITY_STATE, "a rotation is going on", remedy="finish it with `pathfed-server ca finish`")
        self._certify_server(hosts, now)
        certificate, key = make_ca(self._consortium, now=now)
        files.write_atomic(self._where.bundle, certificate + _pem(self.issuing))
        files.write_atomic(self._where.key, key, secret=True)

    def finish(self, hosts: list[str], *, now: datetime.datetime) -> None:
        """End a rotation: the server's certificate is from the new authority, and the old one is trusted no more.

        Raises:
            TransportError: PF420, no rotation is going on.
        """
        if not self.rotating or self.issuing != self.trusted[0]:
            raise TransportError(ErrorCode.AUTHORITY_STATE, "no rotation is going on")
        self._certify_server(hosts, now)
        files.write_atomic(self._where.bundle, _pem(self.issuing))

    def _certify_server(self, hosts: list[str], now: datetime.datetime) -> None:
        certificate, key = make_server_certificate(hosts, self.issuing, self._key, now=now)
        files.write_atomic(self._where.server_key, key, secret=True)
        files.write_atomic(self._where.server_certificate, certificate + _pem(self.issuing))

    def _server_certificate(self) -> x509.Certificate:
        return _certificates(self._where.server_certificate)[0]

    def _server_issuer(self) -> x509.Certificate:
        leaf = self._server_certificate()
        for each in self.trusted:
            try:
                leaf.verify_directly_issued_by(each)
            except (ValueError, TypeError, InvalidSignature):
                continue
            return each
        raise TransportError(
            ErrorCode.AUTHORITY_STATE,
            "the server's certificate is from no authority in the bundle",
            where=self._where.server_certificate,
            remedy="`pathfed-server ca renew` makes another",
        )


def request_key(csr_der: bytes) -> ec.EllipticCurvePublicKey:
    """The key that a certificate request is for.

    Raises:
        TransportError: PF414, not a request, not signed by its own key, or not a key on P-256 or P-384.
    """
    if len(csr_der) > REQUEST_LIMIT:
        raise _request_refused(f"a certificate request has at most {REQUEST_LIMIT} bytes")
    try:
        request = x509.load_der_x509_csr(csr_der)
        key = request.public_key()
        sound = request.is_signature_valid
    except (ValueError, TypeError, UnsupportedAlgorithm, x509.InvalidVersion):
        raise _request_refused("not a certificate request (PKCS #10, DER)") from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, _CURVES):
        raise _request_refused("the TLS key is not on P-256 or P-384")
    if not sound:
        raise _request_refused("the request is not signed by its own key")
    return key


def key_digest(key: ec.EllipticCurvePublicKey) -> Digest:
    """Digest of a public key (SubjectPublicKeyInfo, DER)."""
    return digest.of_bytes(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo))


def serial_text(certificate: x509.Certificate) -> str:
    """A certificate's serial number as the database keeps it: hex."""
    return f"{certificate.serial_number:x}"


def fingerprint(certificate: x509.Certificate) -> Digest:
    """Digest of a certificate (DER)."""
    return digest.of_bytes(certificate.public_bytes(Encoding.DER))


def _certificates(path: Path) -> tuple[x509.Certificate, ...]:
    """The certificates in a file, at least one.

    Raises:
        HostError: PF904, the file cannot be read.
        TransportError: PF420, it holds no certificates.
    """
    try:
        return tuple(x509.load_pem_x509_certificates(files.read_given(path)))
    except ValueError:
        raise TransportError(
            ErrorCode.AUTHORITY_STATE, "the file holds no certificates", where=path, remedy="restore it from a backup"
        ) from None


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(Encoding.PEM)


def _request_refused(what: str) -> TransportError:
    return TransportError(ErrorCode.CERTIFICATE_REQUEST, what)
