"""DSSE envelopes that several keys may sign: plans, which hospitals may want signed by more than one operator.

The form is that of `dsse` with one to `MOST_SIGNATURES` signatures in order of their key ids, one a key; with one signature the bytes are
those of `dsse.seal`. What names a cosigned document is the digest of its payload, never of its envelope: signatures are added later.
"""

import base64
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from pathfed_common import digest
from pathfed_common.digest import Digest
from pathfed_common.errors import ErrorCode, ProvenanceError
from pathfed_common.provenance.dsse import pae
from pathfed_common.provenance.keys import SIGNATURE_BYTES, SigningKey, VerifyKey, decode_base64

MOST_SIGNATURES = 32
_KEYS = {"payload", "payloadType", "signatures"}


@dataclass(frozen=True)
class Cosigned:
    """A well-formed envelope. Nothing in it is verified but by `signed_by`.

    Attributes:
        payload: the signed bytes.
        payload_type: their type.
        signatures: key id -> 64 bytes, in order of the key ids.
    """

    payload: bytes
    payload_type: str
    signatures: dict[Digest, bytes]

    def signed_by(self, keys: Iterable[VerifyKey]) -> frozenset[Digest]:
        """Ids of those of the given keys that signed. Signatures of other keys say nothing here, and count for nothing."""
        message = pae(self.payload_type, self.payload)
        return frozenset(key.key_id for key in keys if key.key_id in self.signatures and key.verify(self.signatures[key.key_id], message))

    def to_bytes(self) -> bytes:
        """Canonical JSON."""
        signatures = [{"keyid": key, "sig": _base64(self.signatures[key])} for key in sorted(self.signatures)]
        return digest.canonical({"payload": _base64(self.payload), "payloadType": self.payload_type, "signatures": signatures})


def parse(data: bytes, *, where: str = "envelope") -> Cosigned:
    """Read an envelope without verifying its signatures.

    Raises:
        ProvenanceError: PF602, not the canonical bytes of an envelope with 1 to `MOST_SIGNATURES` signatures of as many keys.
    """
    try:
        found = _decode(json.loads(data.decode("ascii")))
        if found.to_bytes() != data:
            raise ValueError("its bytes are not in canonical form")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ProvenanceError(ErrorCode.RECORD_SIGNATURE, f"not a signed envelope: {error}", where=where) from None
    return found


def open_cosigned(data: bytes, *, payload_type: str, key: VerifyKey, where: str = "envelope") -> Cosigned:
    """Read an envelope that `key` has signed, alone or among others.

    Raises:
        ProvenanceError: PF602, malformed, of another type, or `key` did not sign it.
    """
    found = parse(data, where=where)
    if found.payload_type != payload_type:
        raise ProvenanceError(
            ErrorCode.RECORD_SIGNATURE, f"the payload's type is not {payload_type}", where=where, value=found.payload_type[:100]
        )
    if not found.signed_by([key]):
        raise ProvenanceError(ErrorCode.RECORD_SIGNATURE, "not signed with the key that is trusted here", where=where, value=key.key_id)
    return found


def cosign(data: bytes, key: SigningKey, *, where: str = "envelope") -> bytes:
    """The envelope with one more signature; signing again changes nothing.

    Raises:
        ProvenanceError: PF602, malformed, or it has `MOST_SIGNATURES` already.
    """
    found = parse(data, where=where)
    signature = key.sign(pae(found.payload_type, found.payload))
    return _bounded(found, {**found.signatures, key.key_id: signature}, where)


def merge(first: bytes, second: bytes, *, where: str = "envelope") -> bytes:
    """One envelope with the signatures of two around the same payload; where both hold one of a key, the first's stays.

    Raises:
        ProvenanceError: PF602, malformed, other payloads, or too many signatures.
    """
    one, other = parse(first, where=where), parse(second, where=where)
    if (one.payload, one.payload_type) != (other.payload, other.payload_type):
        raise ProvenanceError(ErrorCode.RECORD_SIGNATURE, "the two envelopes hold other payloads", where=where)
    return _bounded(one, {**other.signatures, **one.signatures}, where)


def _bounded(found: Cosigned, signatures: dict[Digest, bytes], where: str) -> bytes:
    if len(signatures) > MOST_SIGNATURES:
        raise ProvenanceError(
            ErrorCode.RECORD_SIGNATURE, f"an envelope takes {MOST_SIGNATURES} signatures", where=where, value=len(signatures)
        )
    return Cosigned(found.payload, found.payload_type, signatures).to_bytes()


def _decode(raw: Any) -> Cosigned:
    if not isinstance(raw, dict) or set(raw) != _KEYS:
        raise ValueError(f"an object with exactly {sorted(_KEYS)} is expected")
    entries = raw["signatures"]
    if not isinstance(entries, list) or not 1 <= len(entries) <= MOST_SIGNATURES:
        raise ValueError(f"1 to {MOST_SIGNATURES} signatures are expected")
    if not all(isinstance(text, str) for text in (raw["payload"], raw["payloadType"])):
        raise ValueError("payload and payloadType are texts")
    signatures = dict(_signature(entry) for entry in entries)
    if len(signatures) != len(entries):
        raise ValueError("a key signs once")
    return Cosigned(decode_base64(raw["payload"]), raw["payloadType"], signatures)


def _signature(entry: Any) -> tuple[Digest, bytes]:
    if not isinstance(entry, dict) or set(entry) != {"keyid", "sig"} or not all(isinstance(text, str) for text in entry.values()):
        raise ValueError("a signature has exactly the texts 'keyid' and 'sig'")
    signature = decode_base64(entry["sig"])
    if len(signature) != SIGNATURE_BYTES:
        raise ValueError(f"a signature has {SIGNATURE_BYTES} bytes, got {len(signature)}")
    return digest.parse(entry["keyid"]), signature


def _base64(raw: bytes) -> str:
    return base64.b64encode(raw).decode("ascii")
