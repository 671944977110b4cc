"""A site's three private keys, each made at the site, and for one purpose.

| key | kind | for |
| --- | --- | --- |
| evidence | Ed25519 | signs what the site states: card, approvals, statements, cosignatures |
| tls | EC P-256 | the site's side of the control plane's mutual TLS |
| flower | EC P-384 | the Flower node's authentication |

`KeyStore` is where keys live. `FileKeys` keeps them in files of mode 0600. Another store, such as a PKCS #11 token, may keep the evidence
key to itself; gRPC and Flower take their keys as bytes and as a file, so the other two leave any store.

A new key is made beside the one in use (`stage`), which stays in use until the server has taken the new one (`promote`). Both can be
repeated: a staged key is made once, and a promotion that was cut short is finished by the next.
"""

from enum import StrEnum
from pathlib import Path
from typing import ClassVar, Protocol

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_ssh_private_key,
)
from cryptography.x509.oid import NameOID

from pathfed_common import digest, files
from pathfed_common.digest import Digest
from pathfed_common.errors import ErrorCode, HostError
from pathfed_common.ids import SiteName
from pathfed_common.provenance.keys import SigningKey


class KeyKind(StrEnum):
    """Which of the three."""

    TLS = "tls"
    FLOWER = "flower"
    EVIDENCE = "evidence"


class KeyStore(Protocol):
    """Where a site's private keys live. With `staged`, a method speaks of the key that is to come, which MUST have been staged."""

    def evidence_key(self, *, staged: bool = False) -> SigningKey:
        """The key that signs what the site states."""
        ...

    def tls_key(self, *, staged: bool = False) -> bytes:
        """The TLS key, PKCS #8 PEM, as gRPC takes it."""
        ...

    def flower_key_file(self, *, staged: bool = False) -> Path:
        """A file with the Flower node key in OpenSSH form, as Flower takes it."""
        ...

    def stage(self, kind: KeyKind) -> None:
        """Make the next key of a kind, durably; where one is staged already, nothing happens."""
        ...

    def is_staged(self, kind: KeyKind) -> bool:
        """Whether a next key is there."""
        ...

    def drop_staged(self, kind: KeyKind) -> None:
        """Forget the staged key of a kind, which nobody has taken."""
        ...

    def promote(self, kind: KeyKind) -> None:
        """Put the staged key in place of the one in use; where none is staged, nothing happens."""
        ...


class FileKeys:
    """Keys in files of one folder, readable by their owner alone."""

    _NAMES: ClassVar = {KeyKind.TLS: "tls.pem", KeyKind.FLOWER: "flower", KeyKind.EVIDENCE: "evidence.pem"}

    def __init__(self, folder: Path) -> None:
        """Use the keys in `folder`; nothing is read yet."""
        self._folder = folder

    @classmethod
    def create(cls, folder: Path) -> "FileKeys":
        """Make all three.

        Raises:
            HostError: PF901, PF904, they cannot be written.
        """
        made = cls(folder)
        for kind in KeyKind:
            made._write(kind, staged=False)
        return made

    def evidence_key(self, *, staged: bool = False) -> SigningKey:
        """See `KeyStore`.

        Raises:
            HostError: PF906, the file is missing, is open to others, or holds no such key.
        """
        return SigningKey.from_pem(files.read_secret(self.path(KeyKind.EVIDENCE, staged=staged)))

    def tls_key(self, *, staged: bool = False) -> bytes:
        """See `KeyStore`. Raises as `evidence_key`."""
        return files.read_secret(self.path(KeyKind.TLS, staged=staged))

    def flower_key_file(self, *, staged: bool = False) -> Path:
        """See `KeyStore`."""
        return self.path(KeyKind.FLOWER, staged=staged)

    def stage(self, kind: KeyKind) -> None:
        """See `KeyStore`.

        Raises:
            HostError: PF901, PF904, it cannot be written.
        """
        if not self.is_staged(kind):
            self._write(kind, staged=True)

    def is_staged(self, kind: KeyKind) -> bool:
        """See `KeyStore`."""
        return self.path(kind, staged=True).exists()

    def promote(self, kind: KeyKind) -> None:
        """See `KeyStore`.

        Raises:
            HostError: PF901, PF904, the folder cannot be written.
        """
        if not self.is_staged(kind):
            return
        try:
            self.path(kind, staged=True).replace(self.path(kind))
            files.sync_folder(self._folder)
        except OSError as error:
            raise files.disk_error(error, self.path(kind)) from error

    def drop_staged(self, kind: KeyKind) -> None:
        """See `KeyStore`.

        Raises:
            HostError: PF904, the folder cannot be written.
        """
        try:
            self.path(kind, staged=True).unlink(missing_ok=True)
            files.sync_folder(self._folder)
        except OSError as error:
            raise files.disk_error(error, self.path(kind, staged=True)) from error

    def has(self, kind: KeyKind) -> bool:
        """Whether the key in use is there."""
        return self.path(kind).exists()

    def make(self, kind: KeyKind) -> None:
        """Make a key of a kind that this home has none of: homes of earlier versions lack the TLS key."""
        if not self.has(kind):
            self._write(kind, staged=False)

    def path(self, kind: KeyKind, *, staged: bool = False) -> Path:
        """The key's file."""
        name = self._NAMES[kind]
        return self._folder / (f"{name}.next" if staged else name)

    def _write(self, kind: KeyKind, *, staged: bool) -> None:
        files.write_atomic(self.path(kind, staged=staged), _generate(kind), secret=True)


def certificate_request(key_pem: bytes, site: SiteName) -> bytes:
    """A PKCS #10 request for the TLS key, DER. The server takes the key from it; the name is for people.

    Raises:
        HostError: PF906, not an EC key.
    """
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, site)])
    request = x509.CertificateSigningRequestBuilder().subject_name(name).sign(_tls(key_pem), hashes.SHA256())
    return request.public_bytes(Encoding.DER)


def tls_public(key_pem: bytes) -> bytes:
    """The TLS key's public half, SubjectPublicKeyInfo in DER.

    Raises:
        HostError: PF906, not an EC key.
    """
    return public_half(_tls(key_pem))


def public_half(holder: ec.EllipticCurvePrivateKey | x509.Certificate | x509.CertificateSigningRequest) -> bytes:
    """The public key of a key, certificate or request, SubjectPublicKeyInfo in DER."""
    return holder.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def flower_public(path: Path) -> str:
    """The Flower node key's public half, OpenSSH text.

    Raises:
        HostError: PF906, the file is missing, open to others, or holds no such key.
    """
    try:
        key = load_ssh_private_key(files.read_secret(path), password=None)
    except ValueError:
        raise HostError(ErrorCode.KEY_FILE, "the Flower node key is not an OpenSSH private key", where=path) from None
    return key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode("ascii")


def fingerprints(keys: KeyStore, *, staged: bool = False) -> dict[KeyKind, Digest]:
    """A digest of each public key, to compare by telephone.

    Raises:
        HostError: PF906, a key cannot be read.
    """
    return {
        KeyKind.TLS: digest.of_bytes(tls_public(keys.tls_key(staged=staged))),
        KeyKind.FLOWER: digest.of_bytes(flower_public(keys.flower_key_file(staged=staged)).encode("ascii")),
        KeyKind.EVIDENCE: keys.evidence_key(staged=staged).key_id,
    }


def _generate(kind: KeyKind) -> bytes:
    match kind:
        case KeyKind.EVIDENCE:
            return SigningKey.generate().to_pem()
        case KeyKind.TLS:
            return ec.generate_private_key(ec.SECP256R1()).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        case KeyKind.FLOWER:
            return ec.generate_private_key(ec.SECP384R1()).private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())


def _tls(pem: bytes) -> ec.EllipticCurvePrivateKey:
    try:
        key = load_pem_private_key(pem, password=None)
    except (ValueError, TypeError):
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise HostError(ErrorCode.KEY_FILE, "the site's TLS key is an unencrypted EC private key in PEM form, and this is not")
    return key
