"""C2SP signed notes: a text with Ed25519 signature lines, and the timestamped cosignatures (cosignature/v1) that witnesses add. Pure.

    <text, each line ended by a newline>
    <empty line>
    — <key name> <base64 of 4 bytes of key id and the signature>

A key is known by its name and key id together. Lines of unknown keys are kept and never counted; a line of a known key that does not
verify condemns the whole note. Reading is strict: bytes that are not the note's own encoding are refused.

Sources: https://c2sp.org/signed-note and https://c2sp.org/tlog-cosignature, at C2SP commit 5ba5ee830903e91240fc6f9f3a7a9293d49e69c9.
"""

import base64
import hashlib
from collections.abc import Collection
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Self

from pathfed_common.errors import ErrorCode, ProvenanceError
from pathfed_common.provenance.keys import SIGNATURE_BYTES, SigningKey, VerifyKey, decode_base64

KEY_ID_BYTES = 4
#: A checkpoint has one line for the log and one for each site.
MOST_SIGNATURES = 1024
_MOST_BYTES = 1 << 20
_TIME_BYTES = 8
_LATEST = 2**63 - 1
_DASH = "\u2014 "


class KeyKind(IntEnum):
    """What a key signs, as the byte that goes into its key id."""

    NOTE = 0x01
    COSIGNATURE = 0x04


@dataclass(frozen=True)
class NoteKey:
    """A public key with the name and the kind of signature it is known for.

    Attributes:
        name: the key's name: not empty, no white space, no plus.
        kind: what it signs. The same key under two kinds has two key ids.
        key: the Ed25519 key.
    """

    name: str
    kind: KeyKind
    key: VerifyKey

    def __post_init__(self) -> None:
        check_key_name(self.name)

    @property
    def key_id(self) -> bytes:
        """The first 4 bytes of SHA-256(name, newline, kind, key)."""
        return hashlib.sha256(self.name.encode() + b"\n" + self._material).digest()[:KEY_ID_BYTES]

    def to_vkey(self) -> str:
        """The key as a C2SP verifier key: ``<name>+<hex key id>+<base64 of kind and key>``."""
        return f"{self.name}+{self.key_id.hex()}+{base64.b64encode(self._material).decode('ascii')}"

    @classmethod
    def from_vkey(cls, text: str) -> Self:
        """Read a verifier key; every other spelling is refused.

        Raises:
            ValueError: not an Ed25519 verifier key, or its key id is not that of its parts.
        """
        parts = text.split("+", 2)
        if len(parts) != 3:
            raise ValueError("a verifier key is <name>+<key id>+<base64>")
        material = decode_base64(parts[2])
        key = cls(parts[0], KeyKind(material[0] if material else 0), VerifyKey(material[1:]))
        if key.to_vkey() != text:
            raise ValueError("the verifier key's id is not that of its name and key")
        return key

    @property
    def _material(self) -> bytes:
        return bytes([self.kind]) + decode_base64(self.key.to_text().partition(":")[2])


@dataclass(frozen=True)
class NoteSignature:
    """One signature line. Nothing here is verified.

    Attributes:
        name: the name of the key that is said to have signed.
        key_id: 4 bytes.
        signature: what the key's kind says; opaque where the kind is unknown.
    """

    name: str
    key_id: bytes
    signature: bytes

    def __post_init__(self) -> None:
        check_key_name(self.name)
        if len(self.key_id) != KEY_ID_BYTES or not self.signature:
            raise ValueError(f"a signature line has {KEY_ID_BYTES} bytes of key id and a signature")

    def to_line(self) -> str:
        """The line without its newline."""
        return f"{_DASH}{self.name} {base64.b64encode(self.key_id + self.signature).decode('ascii')}"

    @classmethod
    def from_line(cls, line: str) -> Self:
        """Read a line, given without its newline.

        Raises:
            ValueError: not a signature line.
        """
        parts = line.removeprefix(_DASH).split(" ")
        if not line.startswith(_DASH) or len(parts) != 2:
            raise ValueError("a signature line is a dash, a key name and base64, a space between them")
        raw = decode_base64(parts[1])
        return cls(parts[0], raw[:KEY_ID_BYTES], raw[KEY_ID_BYTES:])


@dataclass(frozen=True)
class Note:
    """A text with its signature lines, in their order. Nothing here is verified until `verify` has passed.

    Attributes:
        text: lines, each ended by a newline; no other control characters.
        signatures: the lines, 1 to 1024 of them.
    """

    text: str
    signatures: tuple[NoteSignature, ...]

    def __post_init__(self) -> None:
        check_text(self.text)
        if not 1 <= len(self.signatures) <= MOST_SIGNATURES:
            raise ValueError(f"a note has 1 to {MOST_SIGNATURES} signatures, got {len(self.signatures)}")

    def to_bytes(self) -> bytes:
        """The note's bytes. There is one encoding."""
        return (self.text + "\n" + "".join(signature.to_line() + "\n" for signature in self.signatures)).encode()

    @classmethod
    def from_bytes(cls, data: bytes, *, where: str = "note") -> Self:
        """Read a note. Its text is a claim until `verify` has passed.

        Raises:
            ProvenanceError: PF602, not a signed note.
        """
        try:
            if len(data) > _MOST_BYTES:
                raise ValueError(f"a note has at most {_MOST_BYTES} bytes")
            text, gap, lines = data.decode("utf-8").rpartition("\n\n")
            if not gap or not lines.endswith("\n"):
                raise ValueError("text, an empty line and signature lines are expected")
            return cls(text + "\n", tuple(NoteSignature.from_line(line) for line in lines[:-1].split("\n")))
        except ValueError as error:
            raise _refused(f"not a signed note: {error}", where) from None

    def with_signature(self, signature: NoteSignature) -> Self:
        """The note with one more line, in place of one of the same key where there is one."""
        kept = tuple(old for old in self.signatures if (old.name, old.key_id) != (signature.name, signature.key_id))
        return replace(self, signatures=(*kept, signature))


@dataclass(frozen=True)
class Verified:
    """A signature that verified.

    Attributes:
        key: the key that made it.
        timestamp: of a cosignature, the UTC seconds it states; else None.
    """

    key: NoteKey
    timestamp: int | None


def sign(text: str, name: str, key: SigningKey) -> NoteSignature:
    """Sign a note's text.

    Raises:
        ValueError: `text` is not a note's text, or `name` not a key's name.
    """
    check_text(text)
    return _signature(NoteKey(name, KeyKind.NOTE, key.public), key.sign(text.encode()))


def cosign(text: str, name: str, key: SigningKey, *, at: int) -> NoteSignature:
    """Cosign a note's text (cosignature/v1).

    Args:
        text: the text.
        name: the key's name. The signature does not cover it: one key never serves under two names.
        key: the cosigner's key.
        at: UTC seconds that the cosignature states.

    Raises:
        ValueError: not a text, name or time that can be cosigned.
    """
    check_text(text)
    if not 0 <= at <= _LATEST:
        raise ValueError(f"a cosignature's time is 0 to 2^63 - 1 seconds, got {at}")
    signature = key.sign(_cosigned(text, at))
    return _signature(NoteKey(name, KeyKind.COSIGNATURE, key.public), at.to_bytes(_TIME_BYTES, "big") + signature)


def verify(note: Note, keys: Collection[NoteKey], *, where: str = "note") -> tuple[Verified, ...]:
    """Verify a note by known keys; lines of other keys are passed over.

    Where two known keys share name and key id (a 4-byte id can be made to collide), a line verifies if it is one of theirs.

    Returns:
        The signatures of known keys, in the note's order; at least one.

    Raises:
        ProvenanceError: PF602, a known key's line does not verify, or no line is of a known key.
    """
    known: dict[tuple[str, bytes], list[NoteKey]] = {}
    for key in keys:
        known.setdefault((key.name, key.key_id), []).append(key)
    verified = []
    for line in note.signatures:
        candidates = known.get((line.name, line.key_id), [])
        found = [seen for seen in (_verified(note.text, line.signature, key) for key in candidates) if seen is not None]
        if candidates and not found:
            raise _refused("a known key's signature does not verify", where, line.name)
        verified += found[:1]
    if not verified:
        raise _refused("no known key has signed", where)
    return tuple(verified)


def check_text(text: str) -> str:
    """Check that a text can be a note's.

    Raises:
        ValueError: it does not end with a newline, has another control character, or is not Unicode text.
    """
    text.encode()
    if not text.endswith("\n") or any(letter < " " and letter != "\n" for letter in text):
        raise ValueError("a note's text ends with a newline and has no other control characters")
    return text


def check_key_name(name: str) -> str:
    """Check a key's name.

    Raises:
        ValueError: it is empty, has white space, control characters or a plus, or is not Unicode text.
    """
    name.encode()
    if not name or any(letter.isspace() or letter < " " or letter == "+" for letter in name):
        raise ValueError(f"a key's name is not empty and has no white space and no plus, got {name[:80]!r}")
    return name


def _signature(key: NoteKey, signature: bytes) -> NoteSignature:
    return NoteSignature(key.name, key.key_id, signature)


def _cosigned(text: str, at: int) -> bytes:
    return f"cosignature/v1\ntime {at}\n{text}".encode()


def _verified(text: str, signature: bytes, key: NoteKey) -> Verified | None:
    if key.kind is KeyKind.NOTE:
        return Verified(key, None) if key.key.verify(signature, text.encode()) else None
    at = int.from_bytes(signature[:_TIME_BYTES], "big")
    if len(signature) != _TIME_BYTES + SIGNATURE_BYTES or at > _LATEST:
        return None
    return Verified(key, at) if key.key.verify(signature[_TIME_BYTES:], _cosigned(text, at)) else None


def _refused(what: str, where: str, value: str | None = None) -> ProvenanceError:
    return ProvenanceError(ErrorCode.RECORD_SIGNATURE, what, where=where, value=None if value is None else value[:100])
