"""What a site checks before it cosigns a checkpoint. Pure.

A site's cosignature says: this log only ever grew since I last cosigned it, and what I sent is in it. For that to be worth anything the
caller keeps the head it last cosigned on disk *before* the cosignature leaves, and never goes back to an older one: a site restored from a
backup asks people first.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import StrEnum

from pathfed_common.errors import ProvenanceError
from pathfed_common.provenance.log_checkpoint import Checkpoint, open_checkpoint
from pathfed_common.provenance.merkle import Proof, leaf_hash, verify_consistency, verify_inclusion
from pathfed_common.provenance.note import Note, NoteKey


class Refusal(StrEnum):
    """Why a site does not cosign. Those marked *fork* are evidence against the operator; the note is worth keeping."""

    #: Not a checkpoint signed by the log's key.
    NOT_THE_LOGS = "not-the-logs"
    #: It has lines that nothing can check.
    EXTENSIONS = "extensions"
    #: It has no leaves.
    EMPTY = "empty"
    #: It is smaller than the one last cosigned; an old one that came late, or the log was cut.
    SMALLER = "smaller"
    #: *fork*: as large as the one last cosigned, with another root.
    FORKED = "forked"
    #: *fork*, unless the proof was damaged: no proof that it continues the one last cosigned.
    NOT_CONSISTENT = "not-consistent"
    #: A leaf the site was promised is not shown to be in.
    LEAF_MISSING = "leaf-missing"


@dataclass(frozen=True)
class Head:
    """What a site last cosigned.

    Attributes:
        size: leaves.
        root: the root over them.
    """

    size: int
    root: bytes


@dataclass(frozen=True)
class PlacedProof:
    """Where a leaf is, and the proof for the checkpoint at hand.

    Attributes:
        index: the leaf's place, from 0.
        hashes: the inclusion proof.
    """

    index: int
    hashes: Proof


@dataclass(frozen=True)
class Judgement:
    """What to do with a checkpoint.

    Attributes:
        refusal: why it is not cosigned, or None.
        checkpoint: the checkpoint to cosign, or None where it is refused.
        missing: the leaves of the site's that are not shown to be in.
    """

    refusal: Refusal | None
    checkpoint: Checkpoint | None = None
    missing: tuple[bytes, ...] = ()

    @property
    def head(self) -> Head:
        """What to keep before the cosignature leaves.

        Raises:
            ValueError: the checkpoint is refused.
        """
        if self.checkpoint is None:
            raise ValueError(f"nothing is cosigned: {self.refusal}")
        return Head(self.checkpoint.size, self.checkpoint.root)


def judge(
    signed: Note, key: NoteKey, *, last: Head | None, consistency: Proof, own: Collection[bytes], proofs: Mapping[bytes, PlacedProof]
) -> Judgement:
    """Decide whether to cosign a checkpoint.

    Args:
        signed: the checkpoint's note.
        key: the log's key; its name is the origin.
        last: what the site last cosigned of this log, or None for its first time, when it takes what it is shown.
        consistency: the proof from `last` to the checkpoint; empty where there is no `last` or nothing was added.
        own: the site's leaves (bytes) that the checkpoint must contain: those sent and acknowledged since `last`. Older ones are in by
            consistency.
        proofs: inclusion proofs by leaf; those of other leaves are passed over.
    """
    try:
        checkpoint = open_checkpoint(signed, key)
    except ProvenanceError:
        return Judgement(Refusal.NOT_THE_LOGS)
    refusal = _growth(checkpoint, last, consistency)
    if refusal is not None:
        return Judgement(refusal)
    missing = tuple(sorted(leaf for leaf in own if not _shown(leaf, proofs.get(leaf), checkpoint)))
    return Judgement(Refusal.LEAF_MISSING, missing=missing) if missing else Judgement(None, checkpoint)


def _growth(checkpoint: Checkpoint, last: Head | None, consistency: Proof) -> Refusal | None:
    if checkpoint.extensions:
        return Refusal.EXTENSIONS
    if checkpoint.size == 0:
        return Refusal.EMPTY
    if last is None:
        return Refusal.NOT_CONSISTENT if consistency else None
    if checkpoint.size < last.size:
        return Refusal.SMALLER
    if checkpoint.size == last.size and checkpoint.root != last.root:
        return Refusal.FORKED
    grown = verify_consistency(
        first=last.size, first_root=last.root, second=checkpoint.size, second_root=checkpoint.root, proof=consistency
    )
    return None if grown else Refusal.NOT_CONSISTENT


def _shown(leaf: bytes, proof: PlacedProof | None, checkpoint: Checkpoint) -> bool:
    return proof is not None and verify_inclusion(
        leaf=leaf_hash(leaf), index=proof.index, size=checkpoint.size, proof=proof.hashes, root=checkpoint.root
    )
