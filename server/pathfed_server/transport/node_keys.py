"""Sites' Flower node keys, read without Flower."""

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from pathfed_common.errors import ErrorCode, TransportError

#: Those that Flower signs in with.
_CURVES = (ec.SECP256R1, ec.SECP384R1, ec.SECP521R1)


def read_node_key(openssh_text: str) -> ec.EllipticCurvePublicKey:
    """A site's Flower node key.

    Raises:
        TransportError: PF402, not a public key on a NIST curve in OpenSSH form.
    """
    try:
        key = serialization.load_ssh_public_key(openssh_text.encode())
    except (ValueError, UnsupportedAlgorithm) as error:
        raise TransportError(
            ErrorCode.NODE_KEY_UNKNOWN, f"the site's Flower node key cannot be read: {error}", value=openssh_text[:40]
        ) from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, _CURVES):
        raise TransportError(ErrorCode.NODE_KEY_UNKNOWN, "the site's Flower node key is not on a NIST curve", value=openssh_text[:40])
    return key
