"""Checkpoints of the transparency log, and proofs that carry one: C2SP tlog-checkpoint and tlog-proof. Pure.

A checkpoint is a note whose text says how large the log is and what its root is. The log signs it under its origin; each site cosigns it
under the name that `site_key` gives, with its evidence key. An evidence key also signs DSSE envelopes: those bytes begin with "DSSEv1 "
and a cosigned message with "cosignature/v1", so neither is ever taken for the other.

Sources: https://c2sp.org/tlog-checkpoint, tlog-cosignature and tlog-proof, at C2SP commit 5ba5ee830903e91240fc6f9f3a7a9293d49e69c9.
"""

import base64
import re
from dataclasses import dataclass
from typing import Self

from pathfed_common.errors import ErrorCode, ProvenanceError
from pathfed_common.ids import SiteName
from pathfed_common.provenance import note
from pathfed_common.provenance.keys import SigningKey, VerifyKey, decode_base64
from pathfed_common.provenance.merkle import HASH_BYTES, Proof, verify_inclusion
from pathfed_common.provenance.note import KeyKind, Note, NoteKey, NoteSignature

_NUMBER = re.compile(r"0|[1-9][0-9]{0,18}")
_LARGEST = 2**63 - 1
_PROOF_HEADER = "c2sp.org/tlog-proof@v1"
#: A path to the root of a tree of 2^63 leaves.
_LONGEST_PROOF = 63


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What a log was at one size.

    Attributes:
        origin: the log's name, unique in the world; see `check_origin` for what ours look like.
        size: leaves.
        root: the root over them, 32 bytes.
        extensions: further lines, which nothing checks; our logs have none.
    """

    origin: str
    size: int
    root: bytes
    extensions: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.size <= _LARGEST or len(self.root) != HASH_BYTES:
            raise ValueError(f"a checkpoint has a size of 0 to 2^63 - 1 and a root of {HASH_BYTES} bytes")
        if not all((self.origin, *self.extensions)) or any("\n" in line for line in (self.origin, *self.extensions)):
            raise ValueError("origin and extensions are lines that are not empty")
        note.check_text(self.to_text())

    def to_text(self) -> str:
        """The text of the checkpoint's note."""
        return "".join(f"{line}\n" for line in (self.origin, str(self.size), _base64(self.root), *self.extensions))

    @classmethod
    def from_text(cls, text: str, *, where: str = "checkpoint") -> Self:
        """Read a note's text as a checkpoint. It is a claim until its note is verified.

        Raises:
            ProvenanceError: PF601, not a checkpoint.
        """
        try:
            lines = note.check_text(text)[:-1].split("\n")
            if len(lines) < 3:
                raise ValueError("origin, size and root are expected")
            found = cls(origin=lines[0], size=_number(lines[1]), root=decode_base64(lines[2]), extensions=tuple(lines[3:]))
        except ValueError as error:
            raise _malformed("a checkpoint", error, where) from None
        return found


@dataclass(frozen=True, kw_only=True)
class LogProof:
    """Proof that a leaf is in a log, to be checked with nothing but keys (a ``.tlog-proof`` file).

    Attributes:
        index: the leaf's place, from 0.
        hashes: the inclusion proof for the checkpoint's size.
        checkpoint: the checkpoint's note, with its cosignatures.
        extra: bytes that nothing authenticates, or None.
    """

    index: int
    hashes: Proof
    checkpoint: Note
    extra: bytes | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.index <= _LARGEST or len(self.hashes) > _LONGEST_PROOF or any(len(value) != HASH_BYTES for value in self.hashes):
            raise ValueError(f"a proof has an index of 0 to 2^63 - 1 and at most {_LONGEST_PROOF} hashes of {HASH_BYTES} bytes")

    def to_bytes(self) -> bytes:
        """The proof's bytes. There is one encoding."""
        lines = [_PROOF_HEADER, *([] if self.extra is None else [f"extra {_base64(self.extra)}"]), f"index {self.index}"]
        lines += [_base64(value) for value in self.hashes]
        return ("\n".join(lines) + "\n\n").encode() + self.checkpoint.to_bytes()

    @classmethod
    def from_bytes(cls, data: bytes, *, where: str = "log proof") -> Self:
        """Read a proof. It proves nothing until `open_proof` has passed.

        Raises:
            ProvenanceError: PF601, not a log proof; PF602, its checkpoint is not a signed note.
        """
        head, gap, tail = data.partition(b"\n\n")
        try:
            lines = head.decode("ascii").split("\n")
            if not gap or lines[0] != _PROOF_HEADER or len(lines) < 2:
                raise ValueError("header, index, hashes, an empty line and a checkpoint are expected")
            extra = decode_base64(lines.pop(1).removeprefix("extra ")) if lines[1].startswith("extra ") else None
            if len(lines) < 2 or not lines[1].startswith("index "):
                raise ValueError("an index is expected")
            index, hashes = _number(lines[1].removeprefix("index ")), tuple(decode_base64(line) for line in lines[2:])
            return cls(index=index, hashes=hashes, checkpoint=Note.from_bytes(tail, where=where), extra=extra)
        except ValueError as error:
            raise _malformed("a log proof", error, where) from None


def origin_of(consortium: str) -> str:
    """The origin of a consortium's log, from the name in its server card: both sides derive it, and nothing has to be handed over.

    Two consortia of one name have logs of one origin; their keys tell them apart.
    """
    return check_origin(f"pathfed/{consortium}")


def check_origin(origin: str) -> str:
    """Check the origin of a log of ours: it also names the log's key, so it has no white space and no plus.

    Raises:
        ValueError: it is not of that form.
    """
    return note.check_key_name(origin)


def log_key(origin: str, key: VerifyKey) -> NoteKey:
    """The key a log signs its checkpoints with."""
    return NoteKey(check_origin(origin), KeyKind.NOTE, key)


def site_key(origin: str, site: SiteName, key: VerifyKey) -> NoteKey:
    """The key a site cosigns this log's checkpoints with: its evidence key, under ``<origin>/<site>``."""
    return NoteKey(f"{check_origin(origin)}/{site}", KeyKind.COSIGNATURE, key)


def sign_checkpoint(checkpoint: Checkpoint, key: SigningKey) -> Note:
    """The checkpoint signed by its log.

    Raises:
        ValueError: the origin is not one of ours.
    """
    text = checkpoint.to_text()
    return Note(text, (note.sign(text, check_origin(checkpoint.origin), key),))


def cosign_checkpoint(checkpoint: Checkpoint, site: SiteName, key: SigningKey, *, at: int) -> NoteSignature:
    """A site's cosignature. Only `log_witness.judge` may say that a checkpoint deserves one.

    Args:
        checkpoint: the checkpoint.
        site: the site.
        key: its evidence key.
        at: UTC seconds.
    """
    return note.cosign(checkpoint.to_text(), site_key(checkpoint.origin, site, key.public).name, key, at=at)


def open_checkpoint(signed: Note, key: NoteKey, *, where: str = "checkpoint") -> Checkpoint:
    """Verify the log's signature and read the checkpoint.

    Raises:
        ProvenanceError: PF602, not signed by `key`; PF601, not a checkpoint, or of another log.
    """
    note.verify(signed, [key], where=where)
    found = Checkpoint.from_text(signed.text, where=where)
    if found.origin != key.name:
        raise ProvenanceError(ErrorCode.RECORD_CHANGED, "a checkpoint of another log", where=where, value=found.origin[:100])
    return found


def open_proof(proof: LogProof, leaf: bytes, key: NoteKey, *, where: str = "log proof") -> Checkpoint:
    """Verify that a leaf is in the log; who cosigned the checkpoint is for `log_quorum` to say.

    Args:
        proof: the proof.
        leaf: the leaf hash.
        key: the log's key.
        where: what to call the proof in errors.

    Raises:
        ProvenanceError: PF602, the checkpoint is not signed by `key`; PF601, not of that log, or the leaf is not shown to be in.
    """
    found = open_checkpoint(proof.checkpoint, key, where=where)
    if not verify_inclusion(leaf=leaf, index=proof.index, size=found.size, proof=proof.hashes, root=found.root):
        raise ProvenanceError(
            ErrorCode.RECORD_CHANGED, "the proof does not show that the leaf is in the log", where=where, value=proof.index
        )
    return found


def _base64(raw: bytes) -> str:
    return base64.b64encode(raw).decode("ascii")


def _number(text: str) -> int:
    if _NUMBER.fullmatch(text) is None:
        raise ValueError(f"a decimal number without leading zeroes is expected, got {text[:40]!r}")
    return int(text)


def _malformed(what: str, error: ValueError, where: str) -> ProvenanceError:
    return ProvenanceError(ErrorCode.RECORD_CHANGED, f"not {what}: {error}", where=where)
