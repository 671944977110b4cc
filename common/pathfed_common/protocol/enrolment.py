"""What hospital and operator compare by telephone before a site is admitted."""

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from pathfed_common import digest

_GROUPS = 8
_GROUP = 4  # hex digits; 8 groups of 4 have 128 bits


def request_fingerprint(site_card: bytes, tls_csr_der: bytes) -> str:
    """One fingerprint of all that an enrolment asks for: 8 groups of 4 hex digits, such as ``3fa9 01bc ...``.

    It covers the site card's bytes, and with them the site's name, evidence key and Flower node key, and the TLS key. Both sides compute
    it by themselves: the site before it sends its request, the server from what it received. A server, or somebody between, that
    exchanged any of the keys shows another one.

    Raises:
        ValueError: the second is not a PKCS #10 request in DER.
    """
    key = x509.load_der_x509_csr(tls_csr_der).public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    whole = digest.of_value({"site_card": digest.of_bytes(site_card), "tls_key": digest.of_bytes(key)}).removeprefix("sha256:")
    return " ".join(whole[at : at + _GROUP] for at in range(0, _GROUPS * _GROUP, _GROUP))


def same_fingerprint(left: str, right: str) -> bool:
    """Whether two fingerprints are equal as people write them: spaces, hyphens and capitals do not matter."""
    plain = [text.lower().replace(" ", "").replace("-", "") for text in (left, right)]
    return plain[0] == plain[1]
