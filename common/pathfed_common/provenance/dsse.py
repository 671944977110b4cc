"""DSSE v1 envelopes (Dead Simple Signing Envelope): one payload, one type, one Ed25519 signature.

The signature covers the pre-authentication encoding of payload type and payload, so a payload signed as one type is never taken for
another. Source: https://github.com/secure-systems-lab/dsse/blob/v1.0.0/protocol.md.

The envelope itself is canonical JSON, and one that is not byte-identical to its own re-encoding is refused: there is one envelope for
one signed payload, so its digest names it and a change of any byte is found. (The signature alone would not do: DSSE leaves `keyid`
unsigned and JSON leaves spaces free. Here `keyid` must be the signing key's id.)
"""

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pathfed_common import digest
from pathfed_common.digest import Digest
from pathfed_common.errors import ErrorCode, ProvenanceError
from pathfed_common.provenance.keys import SIGNATURE_BYTES, SigningKey, VerifyKey, decode_base64

_KEYS = {"payload", "payloadType", "signatures"}


@dataclass(frozen=True)
class Envelope:
    """The parts of a well-formed envelope. Nothing here is verified yet.

    Attributes:
        payload: the signed bytes.
        payload_type: their type.
        key_id: the key the envelope claims to be signed with.
        signature: 64 bytes.
    """

    payload: bytes
    payload_type: str
    key_id: Digest
    signature: bytes


def pae(payload_type: str, payload: bytes) -> bytes:
    """DSSE's pre-authentication encoding: ``DSSEv1 <len> <type> <len> <payload>``, lengths in bytes, decimal."""
    kind = payload_type.encode("utf-8")
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)


def seal(payload: bytes, payload_type: str, key: SigningKey) -> bytes:
    """Sign a payload and return the envelope's canonical bytes. The same payload and key give the same bytes."""
    signature = key.sign(pae(payload_type, payload))
    return _encode(Envelope(payload, payload_type, key.key_id, signature))


def open_envelope(data: bytes, *, payload_type: str, keys: Mapping[Digest, VerifyKey] | VerifyKey, where: str = "envelope") -> bytes:
    """Verify an envelope and return its payload.

    Args:
        data: the envelope's bytes.
        payload_type: the type the payload must have.
        keys: the one key that may have signed, or the trusted keys by key id.
        where: what to call the envelope in errors.

    Raises:
        ProvenanceError: PF602, malformed or not canonical, another type, an unknown key, or a signature that does not verify.
    """
    envelope = parse(data, where=where)
    if envelope.payload_type != payload_type:
        raise _refused(f"the payload's type is not {payload_type}", where, envelope.payload_type)
    key = keys if isinstance(keys, VerifyKey) else keys.get(envelope.key_id)
    if key is None or key.key_id != envelope.key_id:
        raise _refused("signed with a key that is not trusted here", where, envelope.key_id)
    if not key.verify(envelope.signature, pae(envelope.payload_type, envelope.payload)):
        raise _refused("the signature does not verify", where, envelope.key_id)
    return envelope.payload


def parse(data: bytes, *, where: str = "envelope") -> Envelope:
    """Read an envelope without verifying its signature. Its contents are claims until `open_envelope` has passed.

    Raises:
        ProvenanceError: PF602, not the canonical bytes of an envelope with one signature.
    """
    try:
        envelope = _decode(json.loads(data.decode("ascii")))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise _refused(f"not a signed envelope: {error}", where) from None
    if _encode(envelope) != data:
        raise _refused("the envelope's bytes are not in canonical form", where)
    return envelope


def _decode(raw: Any) -> Envelope:
    if not isinstance(raw, dict) or set(raw) != _KEYS:
        raise ValueError(f"an object with exactly {sorted(_KEYS)} is expected")
    signatures = raw["signatures"]
    if not isinstance(signatures, list) or len(signatures) != 1:
        raise ValueError("exactly one signature is expected")
    entry = signatures[0]
    if not isinstance(entry, dict) or set(entry) != {"keyid", "sig"}:
        raise ValueError("a signature has exactly 'keyid' and 'sig'")
    texts = (raw["payload"], raw["payloadType"], entry["keyid"], entry["sig"])
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("payload, payloadType, keyid and sig are texts")
    signature = decode_base64(entry["sig"])
    if len(signature) != SIGNATURE_BYTES:
        raise ValueError(f"a signature has {SIGNATURE_BYTES} bytes, got {len(signature)}")
    return Envelope(decode_base64(raw["payload"]), raw["payloadType"], digest.parse(entry["keyid"]), signature)


def _encode(envelope: Envelope) -> bytes:
    payload, signature = (base64.b64encode(part).decode("ascii") for part in (envelope.payload, envelope.signature))
    return digest.canonical(
        {"payload": payload, "payloadType": envelope.payload_type, "signatures": [{"keyid": envelope.key_id, "sig": signature}]}
    )


def _refused(what: str, where: str, value: str | None = None) -> ProvenanceError:
    shown = None if value is None else value[:100]
    return ProvenanceError(ErrorCode.RECORD_SIGNATURE, what, where=where, value=shown)
