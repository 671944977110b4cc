"""An invitation: the text with which an operator lets one hospital in, once.

It holds what the site needs to find the server and to be sure of it before it has any of its files: the address, a pin of the consortium's
CA, and the server's evidence key. And it holds a secret, which the server stores as a hash alone. The text is itself that secret: hand it
over as you would a password.
"""

import base64
import binascii
import json
from dataclasses import dataclass, field
from typing import Final, Self

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from pathfed_common import digest
from pathfed_common.digest import Digest
from pathfed_common.errors import ErrorCode, TransportError
from pathfed_common.ids import SiteName, site_name
from pathfed_common.provenance.keys import VerifyKey

SECRET_BYTES: Final = 32
_PREFIX: Final = "pathfed1."
_LONGEST = 2000  # characters; an invitation has about 400
_KEYS = {"site", "enrolment_address", "secret", "ca_pin", "server_key"}
_LAST_PORT = 65535


@dataclass(frozen=True, kw_only=True)
class Invitation:
    """One invitation. Its secret does not show in `repr`.

    Attributes:
        site: the site that is invited.
        enrolment_address: HOST:PORT of the server's enrolment port.
        secret: 32 random bytes.
        ca_pin: what the server's certificate must lead to, see `ca_pin`.
        server_key: the public key that the server's card, plans and offers are signed with.
    """

    site: SiteName
    enrolment_address: str
    secret: bytes = field(repr=False)
    ca_pin: Digest
    server_key: VerifyKey

    def __post_init__(self) -> None:
        site_name(self.site)
        check_address(self.enrolment_address)
        digest.parse(self.ca_pin)
        if len(self.secret) != SECRET_BYTES:
            raise ValueError(f"an invitation's secret has {SECRET_BYTES} bytes, got {len(self.secret)}")

    def to_text(self) -> str:
        """The invitation as one word without spaces: ``pathfed1.<base64url>``."""
        plain = {
            "site": self.site,
            "enrolment_address": self.enrolment_address,
            "secret": self.secret.hex(),
            "ca_pin": self.ca_pin,
            "server_key": self.server_key.to_text(),
        }
        return _PREFIX + base64.urlsafe_b64encode(digest.canonical(plain)).decode("ascii").rstrip("=")

    @classmethod
    def from_text(cls, text: str) -> Self:
        """Read an invitation; spaces and line breaks around it or within it, as mail programs add them, do not matter.

        Raises:
            TransportError: PF411, it is not one, or not whole. Nothing of the text stands in the message.
        """
        try:
            return cls._read("".join(text[:_LONGEST].split()))
        except (ValueError, TypeError, binascii.Error, RecursionError):
            raise TransportError(
                ErrorCode.INVITATION_UNREADABLE,
                "this is not an invitation, or not a whole one",
                remedy=f"give the text exactly as `pathfed-server invite` printed it; it begins with {_PREFIX}",
            ) from None

    @classmethod
    def _read(cls, word: str) -> Self:
        encoded = word.removeprefix(_PREFIX)
        raw = json.loads(base64.b64decode(encoded + "=" * (-len(encoded) % 4), altchars=b"-_", validate=True).decode("ascii"))
        if not isinstance(raw, dict) or set(raw) != _KEYS or not all(isinstance(value, str) for value in raw.values()):
            raise ValueError("other keys")
        made = cls(
            site=site_name(raw["site"]),
            enrolment_address=raw["enrolment_address"],
            secret=bytes.fromhex(raw["secret"]),
            ca_pin=digest.parse(raw["ca_pin"]),
            server_key=VerifyKey.from_text(raw["server_key"]),
        )
        if made.to_text() != word:
            raise ValueError("another spelling")
        return made


def secret_hash(secret: bytes) -> Digest:
    """What the server stores of an invitation's secret. A plain hash will do: the secret has 256 random bits."""
    return digest.of_bytes(secret)


def ca_pin(certificate_pem: bytes) -> Digest:
    """The pin of a certificate authority: the digest of its public key (SubjectPublicKeyInfo, DER). A renewed certificate keeps it.

    Raises:
        ValueError: not a PEM certificate.
    """
    key = x509.load_pem_x509_certificate(certificate_pem).public_key()
    return digest.of_bytes(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo))


def check_address(text: str) -> str:
    """Check that a text is HOST:PORT.

    Raises:
        ValueError: it is not.
    """
    host, _, port = text.rpartition(":")
    fits = host and port.isascii() and port.isdigit() and 1 <= int(port[:6]) <= _LAST_PORT and str(int(port)) == port
    if not fits or not host.isascii() or any(letter.isspace() or letter in "/@#?\\" for letter in host):
        raise ValueError(f"an address is HOST:PORT, got {text[:100]!r}")
    return text
