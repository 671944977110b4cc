"""The consortium's certificate authority and the server's TLS certificate.

P-256 keys; the CA signs the server's certificate for the names sites connect to. Sites pin the CA (it travels in the server card).
"""

import datetime
import ipaddress
from dataclasses import dataclass, field

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from pathfed_common.errors import ErrorCode, TransportError

_CA_DAYS = 3650
_TLS_DAYS = 397
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
    ca_key = ec.generate_private_key(ec.SECP256R1())
    ca_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{consortium} pathfed CA")])
    ca = (
        _builder(ca_name, ca_name, ca_key.public_key(), now, _CA_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(ca_key.public_key()), critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, hosts[0])])
    certificate = (
        _builder(name, ca_name, key.public_key(), now, _TLS_DAYS)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName([_host(host) for host in hosts]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    return TlsFiles(ca.public_bytes(pem), _key_pem(ca_key), certificate.public_bytes(pem), _key_pem(key))


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


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
