"""Evidence keys: Ed25519 keys that sign what sites and the server state.

They sign statements and records only; TLS and Flower's node authentication have keys of their own. A public key travels as the text
``ed25519:<base64 of its 32 bytes>`` and is named by its key id, the digest of those 32 bytes.
"""

import base64
import binascii
from typing import Self

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from pathfed_common import digest
from pathfed_common.digest import Digest
from pathfed_common.errors import ErrorCode, HostError

SIGNATURE_BYTES = 64
_RAW_KEY_BYTES = 32
_PREFIX = "ed25519:"


class VerifyKey:
    """A public evidence key. Equal keys compare equal and may be used as dictionary keys."""

    __slots__ = ("_key", "_raw")

    def __init__(self, raw: bytes) -> None:
        """Take the 32 raw bytes of an Ed25519 public key.

        Raises:
            ValueError: not 32 bytes.
        """
        if len(raw) != _RAW_KEY_BYTES:
            raise ValueError(f"an Ed25519 public key has {_RAW_KEY_BYTES} bytes, got {len(raw)}")
        self._raw = bytes(raw)
        self._key = Ed25519PublicKey.from_public_bytes(self._raw)

    @classmethod
    def from_text(cls, text: str) -> Self:
        """Read a key back from `to_text`'s form; every other spelling is refused.

        Raises:
            ValueError: not ``ed25519:<base64>`` of 32 bytes, or base64 not in its one canonical form.
        """
        if not isinstance(text, str) or not text.startswith(_PREFIX):
            raise ValueError(f"a public evidence key starts with {_PREFIX!r}, got {str(text)[:80]!r}")
        return cls(decode_base64(text.removeprefix(_PREFIX)))

    def to_text(self) -> str:
        """The key as text: ``ed25519:<base64>``."""
        return _PREFIX + base64.b64encode(self._raw).decode("ascii")

    @property
    def key_id(self) -> Digest:
        """Digest of the 32 raw bytes."""
        return digest.of_bytes(self._raw)

    def verify(self, signature: bytes, data: bytes) -> bool:
        """Whether this key's owner signed exactly these bytes."""
        try:
            self._key.verify(signature, data)
        except InvalidSignature:
            return False
        return True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, VerifyKey) and self._raw == other._raw

    def __hash__(self) -> int:
        return hash(self._raw)

    def __repr__(self) -> str:
        return f"VerifyKey({self.to_text()})"


class SigningKey:
    """A private evidence key. Nothing of it shows in `repr`, in pickles or in equality."""

    __slots__ = ("_key",)

    def __init__(self, key: Ed25519PrivateKey) -> None:
        """Wrap a private key; use `generate` or `from_pem`."""
        self._key = key

    @classmethod
    def generate(cls) -> Self:
        """A new key from the operating system's random source."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def from_pem(cls, pem: bytes, passphrase: bytes | None = None) -> Self:
        """Read a key from PKCS #8 PEM, unencrypted or under a passphrase.

        Raises:
            HostError: PF906, not an Ed25519 private key, or the passphrase does not open it. The message shows nothing of the bytes.
        """
        try:
            key = load_pem_private_key(pem, password=passphrase)
        except (ValueError, TypeError):
            key = None
        if not isinstance(key, Ed25519PrivateKey):
            kind = "an unencrypted Ed25519 private key" if passphrase is None else "an Ed25519 private key under this passphrase"
            raise HostError(ErrorCode.KEY_FILE, f"{kind} in PEM form is expected, and this is none")
        return cls(key)

    def to_pem(self, passphrase: bytes | None = None) -> bytes:
        """PKCS #8 PEM, encrypted with a passphrase if one is given. Write it with `files.write_atomic(..., secret=True)` and nowhere else.

        Raises:
            ValueError: the passphrase is empty.
        """
        how = NoEncryption() if passphrase is None else BestAvailableEncryption(passphrase)
        return self._key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, how)

    @property
    def public(self) -> VerifyKey:
        """The public half."""
        return VerifyKey(self._key.public_key().public_bytes_raw())

    @property
    def key_id(self) -> Digest:
        """Key id of the public half."""
        return self.public.key_id

    def sign(self, data: bytes) -> bytes:
        """Ed25519 signature (64 bytes) of these bytes; the same bytes give the same signature."""
        return self._key.sign(data)

    def __repr__(self) -> str:
        return "SigningKey(hidden)"

    def __reduce__(self) -> str:
        raise TypeError("a SigningKey is not pickled or copied")


def decode_base64(text: str) -> bytes:
    """Standard base64 with padding, in its one canonical form.

    Raises:
        ValueError: another alphabet, white space, missing padding, or unused bits that are not zero.
    """
    try:
        raw = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("not base64") from None
    if base64.b64encode(raw).decode("ascii") != text:
        raise ValueError("base64 not in canonical form")
    return raw
