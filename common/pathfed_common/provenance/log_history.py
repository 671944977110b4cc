"""A whole history of the transparency log: its leaves, its checkpoints, and whether enough sites have cosigned. Pure.

This is what a verifier does with a bundle: nothing but bytes and the log's key, no trust in whoever keeps the log.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pathfed_common.errors import ErrorCode, ProvenanceError
from pathfed_common.provenance.log_checkpoint import Checkpoint, open_checkpoint
from pathfed_common.provenance.log_leaves import AnyLeaf, read_leaf
from pathfed_common.provenance.log_quorum import Member, Roll, Shortfall, cosigned_by, shortfalls
from pathfed_common.provenance.merkle import Frontier, leaf_hash
from pathfed_common.provenance.note import Note, NoteKey


@dataclass(frozen=True, kw_only=True)
class History:
    """A history that holds together, and what its cosignatures show.

    Attributes:
        leaves: its leaves.
        roll: who is and was enrolled at its end.
        checkpoints: its checkpoints, the smallest first; the last is of all leaves.
        cosigned: by size of checkpoint, the members who cosigned.
    """

    leaves: tuple[AnyLeaf, ...]
    roll: Roll
    checkpoints: tuple[Checkpoint, ...]
    cosigned: Mapping[int, frozenset[Member]]

    @property
    def shortfalls(self) -> tuple[Shortfall, ...]:
        """Where it lacks a quorum; empty if it has one."""
        return shortfalls(self.roll, self.cosigned)


def read_history(leaves: Sequence[bytes], notes: Sequence[Note], key: NoteKey, *, where: str = "log") -> History:
    """Read a history in one pass: every leaf is one and may follow, every checkpoint is of these leaves, the largest of all of them.

    Args:
        leaves: all leaves, the first first.
        notes: the log's checkpoints, in any order. Of two of one size, the cosignatures of both count.
        key: the log's key.
        where: what to call the log in errors.

    Raises:
        ProvenanceError: PF601, something is not a leaf or cannot follow, a checkpoint is not of these leaves, or none is of all of them;
            PF602, a signature does not verify.
    """
    opened = sorted(((open_checkpoint(signed, key, where=where), signed) for signed in notes), key=lambda pair: pair[0].size)
    if not opened or opened[-1][0].size != len(leaves):
        raise _fault(f"the largest checkpoint is not of all {len(leaves)} leaves", where)
    roll, frontier, parsed = Roll(), Frontier(), list[AnyLeaf]()
    cosigned: dict[int, frozenset[Member]] = {}
    for checkpoint, signed in opened:
        for data in leaves[roll.size : checkpoint.size]:
            parsed.append(read_leaf(data, where=f"{where}, leaf {roll.size}"))
            roll = roll.after(parsed[-1], where=where)
            frontier.append(leaf_hash(data))
        if checkpoint.root != frontier.root():
            raise _fault(f"the checkpoint of {checkpoint.size} leaves is not of these leaves", where)
        found = cosigned_by(signed, key.name, roll, where=where)
        cosigned[roll.size] = cosigned.get(roll.size, frozenset()) | found
    return History(leaves=tuple(parsed), roll=roll, checkpoints=tuple(checkpoint for checkpoint, _ in opened), cosigned=cosigned)


def _fault(what: str, where: str) -> ProvenanceError:
    return ProvenanceError(ErrorCode.RECORD_CHANGED, what, where=where)
