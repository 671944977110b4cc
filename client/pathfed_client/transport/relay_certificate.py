"""The certificate between SuperNode and the relay: for the loopback address, made at every start, trusted by nobody else.

SuperNode refuses to sign in over plain HTTP, so the relay's port on the loopback speaks TLS. It also means that a process which took the
port before the relay did learns nothing: SuperNode trusts this one certificate's authority, whose key is thrown away when it has signed.
"""

import datetime
import ipaddress
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from pathfed_common import files

_DAYS = 3650  # longer than a site runs without a new start
_SKEW = datetime.timedelta(days=1)


@dataclass(frozen=True)
class RelayCertificate:
    """Where the files of the relay's inner TLS lie.

    Attributes:
        folder: a folder of this site's own.
    """

    folder: Path

    @property
    def ca(self) -> Path:
        """What SuperNode trusts."""
        return self.folder / "ca.pem"

    @property
    def certificate(self) -> Path:
        """What the relay shows."""
        return self.folder / "certificate.pem"

    @property
    def key(self) -> Path:
        """Its key, for the owner's eyes alone."""
        return self.folder / "key.pem"


def make_certificate(folder: Path, address: str, *, now: datetime.datetime) -> RelayCertificate:
    """Make a certificate for an IP address, valid from `now` (UTC), in place of the one that was there.

    Raises:
        HostError: PF901, PF904, it cannot be written.
    """
    ca_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    ca_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "pathfed relay of this site")])
    ca = (
        _builder(ca_name, ca_name, ca_key.public_key(), now)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .sign(ca_key, hashes.SHA256())
    )
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, address)])
    certificate = (
        _builder(name, ca_name, key.public_key(), now)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(address))]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    made = RelayCertificate(folder)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    plain = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    files.write_atomic(made.ca, ca.public_bytes(serialization.Encoding.PEM))
    files.write_atomic(made.certificate, certificate.public_bytes(serialization.Encoding.PEM))
    files.write_atomic(made.key, plain, secret=True)
    return made


def _builder(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, now: datetime.datetime) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SKEW)
        .not_valid_after(now + datetime.timedelta(days=_DAYS))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
