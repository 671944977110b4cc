"""Making certificates: the consortium's certificate authority, the server's and the sites' TLS certificates, and checking one's dates.

P-256 keys. The CA signs the server's certificate for the names sites connect to, and each site's for its SPIFFE id. Sites pin the CA (its
pin travels in the invitation, the certificate in the server card). What an authority may do and when is in `authority.py`.
"""

import datetime
import ipaddress
from dataclasses import dataclass, field

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from pathfed_common.errors import ErrorCode, HostError, TransportError

_CA_DAYS = 3650
_TLS_DAYS = 397
_LONGEST_NAME = 64  # of a common name; clients look at the alternative names alone
_SKEW = datetime.timedelta(minutes=5)


@dataclass(frozen=True)
class TlsFiles:
    """PEM bytes of the CA certificate and key, and of the server's certificate and key."""

    ca_certificate: bytes
    ca_key: bytes = field(repr=False)
    certificate: bytes
    key: bytes = field(repr=False)


def make_tls(consortium: str, hosts: list[str], *, now: datetime.datetime) -> TlsFiles:
    """Make a CA and a server certificate for `hosts` (DNS names or IP addresses), valid from `now` (UTC)."""
    ca_certificate, ca_key = make_ca(consortium, now=now)
    issuer, signer = x509.load_pem_x509_certificate(ca_certificate), read_key(ca_key)
    certificate, key = make_server_certificate(hosts, issuer, signer, now=now)
    return TlsFiles(ca_certificate, ca_key, certificate, key)


def make_ca(consortium: str, *, now: datetime.datetime) -> tuple[bytes, bytes]:
    """Make a certificate authority: its certificate and key, PEM. The name tells one authority of a consortium from the next."""
    key = ec.generate_private_key(ec.SECP256R1())
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    names = {NameOID.ORGANIZATION_NAME: consortium, NameOID.COMMON_NAME: f"pathfed CA {identifier.digest.hex()[:8]}"}
    name = x509.Name([x509.NameAttribute(kind, text) for kind, text in names.items()])
    made = (
        _builder(name, name, key.public_key(), now, _CA_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(identifier, critical=False)
        .sign(key, hashes.SHA256())
    )
    return made.public_bytes(serialization.Encoding.PEM), key_pem(key)


def make_server_certificate(
    hosts: list[str], issuer: x509.Certificate, signer: ec.EllipticCurvePrivateKey, *, now: datetime.datetime
) -> tuple[bytes, bytes]:
    """Make the server's TLS certificate for its names, and a new key for it; PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    names = x509.SubjectAlternativeName([_host(host) for host in hosts])
    made = _leaf(hosts[0][:_LONGEST_NAME], names, ExtendedKeyUsageOID.SERVER_AUTH, key.public_key(), issuer, signer, now, _TLS_DAYS)
    return made.public_bytes(serialization.Encoding.PEM), key_pem(key)


def make_site_certificate(
    uri: str,
    key: ec.EllipticCurvePublicKey,
    issuer: x509.Certificate,
    signer: ec.EllipticCurvePrivateKey,
    *,
    now: datetime.datetime,
    days: int,
) -> x509.Certificate:
    """Make a site's TLS certificate: for clients only, with its SPIFFE id as the one alternative name."""
    names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri)])
    return _leaf(uri.rpartition("/")[2], names, ExtendedKeyUsageOID.CLIENT_AUTH, key, issuer, signer, now, days)


def read_key(pem: bytes) -> ec.EllipticCurvePrivateKey:
    """Read an authority's or a certificate's key.

    Raises:
        HostError: PF906, not an unencrypted EC private key. The message shows nothing of the bytes.
    """
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except (ValueError, TypeError):
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise HostError(ErrorCode.KEY_FILE, "a TLS key is an unencrypted EC private key in PEM form, and this is not")
    return key


def check_validity(certificate: bytes, *, now: datetime.datetime, where: object) -> None:
    """Refuse to serve with a certificate that clients would refuse.

    Raises:
        TransportError: PF401, not a certificate, not valid yet, or expired at `now` (UTC).
    """
    try:
        found = x509.load_pem_x509_certificate(certificate)
    except ValueError as error:
        raise TransportError(ErrorCode.CERTIFICATE_REFUSED, f"not a certificate: {error}", where=where) from None
    if not found.not_valid_before_utc <= now <= found.not_valid_after_utc:
        raise TransportError(
            ErrorCode.CERTIFICATE_REFUSED,
            "the server's certificate is not valid now",
            where=where,
            value=f"{found.not_valid_before_utc:%Y-%m-%d} to {found.not_valid_after_utc:%Y-%m-%d}",
            remedy="put a new certificate for the same names, signed by the consortium's CA, in its place",
        )


def _leaf(
    common_name: str,
    names: x509.SubjectAlternativeName,
    purpose: x509.ObjectIdentifier,
    key: ec.EllipticCurvePublicKey,
    issuer: x509.Certificate,
    signer: ec.EllipticCurvePrivateKey,
    now: datetime.datetime,
    days: int,
) -> x509.Certificate:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
    return (
        _builder(subject, issuer.subject, key, now, days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        .add_extension(names, critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
        .sign(signer, hashes.SHA256())
    )


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, now: datetime.datetime, days: int
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SKEW)
        .not_valid_after(now + datetime.timedelta(days=days))
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Unencrypted PKCS #8 PEM. Write it with `files.write_atomic(..., secret=True)` and nowhere else."""
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
