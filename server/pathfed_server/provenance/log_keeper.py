"""Keeps the transparency log: signs its checkpoints, proves what is in it, and takes the sites' cosignatures.

Leaves are appended by the transactions that record what they say (`db.log_store`), never here. The keeper reads them, signs what it finds,
and refuses to sign a log that is not the one it signed before: a server that forks its own log by accident would be taken for a liar.

Any number of keepers may run at once, in one process or several: a checkpoint of one size has one form.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from pathfed_common.errors import ErrorCode, ProvenanceError, RoundError
from pathfed_common.ids import SiteName
from pathfed_common.provenance import note
from pathfed_common.provenance.keys import SigningKey
from pathfed_common.provenance.log_checkpoint import Checkpoint, log_key, open_checkpoint, sign_checkpoint, site_key
from pathfed_common.provenance.log_history import History, read_history
from pathfed_common.provenance.log_quorum import Shortfall, cosigned_by, quorum_of, shortfalls
from pathfed_common.provenance.note import Note, NoteKey, NoteSignature
from pathfed_server.provenance.log_ports import Cosignature, LogRecords, ServedCheckpoint, ServedInclusion
from pathfed_server.provenance.log_tree import LogTree

#: Leaves in one answer: 0.2 to 0.5 kB each.
MOST_LEAVES = 4096
#: Seconds between two checkpoints of a log that grows all the time.
LEAST_INTERVAL_S = 1.0
_PAGE = 10_000


@dataclass(frozen=True)
class LogFile:
    """A log as a third party takes it away; `log_history.read_history` reads it.

    Attributes:
        leaves: all leaves, the first first.
        notes: the checkpoint of all leaves, and each earlier one that a site's latest cosignature is under, with all their cosignatures.
    """

    leaves: tuple[bytes, ...]
    notes: tuple[Note, ...]


@dataclass(frozen=True)
class Standing:
    """Whether the history up to a checkpoint has a quorum.

    Attributes:
        size: the checkpoint's leaves.
        enrolled: the sites enrolled at its end, in order of their names.
        cosigned: of every enrolled site that has cosigned, the largest size up to this one.
        shortfalls: where cosignatures are lacking; empty: it has a quorum. See `log_quorum`.
    """

    size: int
    enrolled: tuple[SiteName, ...]
    cosigned: Mapping[SiteName, int]
    shortfalls: tuple[Shortfall, ...]


class LogKeeper:
    """Implements `log_ports.LogService`; safe for several threads."""

    def __init__(
        self,
        records: LogRecords,
        key: SigningKey,
        origin: str,
        *,
        least_interval_s: float = LEAST_INTERVAL_S,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """Take a log. Nothing is read yet.

        Args:
            records: where it is kept.
            key: the log's key: the server's evidence key.
            origin: its origin; see `log_checkpoint.origin_of`.
            least_interval_s: seconds between two checkpoints, at the least; 0: a checkpoint is always of all leaves.
            monotonic: a clock of seconds.
        """
        self._records, self._signer, self._origin = records, key, origin
        self._interval_s, self._monotonic = least_interval_s, monotonic
        self._lock = threading.Lock()
        self._tree = LogTree()
        self._sound = 0
        self._signed_at: float | None = None

    @property
    def key(self) -> NoteKey:
        """The key that verifies the log's checkpoints."""
        return log_key(self._origin, self._signer.public)

    def checkpoint(self, known_size: int) -> ServedCheckpoint:
        """See `LogService.checkpoint`."""
        with self._lock:
            signed, found = self._latest(known_size)
            if found is None:
                self._demand(known_size, 0)
                return ServedCheckpoint(0, b"", ())
            self._demand(known_size, found.size)
            proof = self._tree.consistency(known_size, found.size) if known_size else ()
        return ServedCheckpoint(found.size, signed, proof)

    def inclusion(self, leaf_hash: bytes, size: int) -> ServedInclusion:
        """See `LogService.inclusion`."""
        index = self._records.log_index(leaf_hash)
        with self._lock:
            self._grow()
            self._demand(size, self._tree.size)
            if index is None or not 0 <= index < size:
                raise ProvenanceError(ErrorCode.LEAF_UNKNOWN, f"no such leaf among the first {size}", where="log", value=leaf_hash.hex())
            return ServedInclusion(index, self._tree.inclusion(index, size))

    def leaves(self, start: int, stop: int) -> list[bytes]:
        """See `LogService.leaves`."""
        if not 0 <= start <= stop:
            raise ProvenanceError(ErrorCode.LEAF_UNKNOWN, "leaves go from 0 upwards", where="log", value=f"{start} to {stop}")
        # A number from outside may be larger than a database takes.
        end = min(stop, start + MOST_LEAVES, self._records.log_size())
        return self._records.log_leaves(start, end) if start < end else []

    def cosign(self, site: SiteName, size: int, line: bytes) -> None:
        """See `LogService.cosign`."""
        kept = self._kept(size)
        with self._lock:
            self._grow()
            now, then = self._tree.roll(self._tree.size), self._tree.roll(size)
        if site not in now.enrolled:
            gone = any(member.site == site for member in now.former)
            code = ErrorCode.SITE_REVOKED if gone else ErrorCode.SITE_UNKNOWN
            raise RoundError(code, "only enrolled sites cosign", where=f"log, checkpoint of {size}", value=site)
        if then.enrolled.get(site) != now.enrolled[site]:
            # A cosignature counts by the key that the site had at the checkpoint's size.
            raise _refused("the site was not enrolled with its present key in this checkpoint", site, size)
        signature = _line(line, site, size)
        key = site_key(self._origin, site, now.enrolled[site])
        if (signature.name, signature.key_id) != (key.name, key.key_id):
            raise _refused("the line is of another name or key than the site's", site, size)
        try:
            note.verify(Note(Note.from_bytes(kept).text, (signature,)), [key])
        except ProvenanceError:
            raise _refused("the line does not verify", site, size) from None
        self._records.add_cosignature(Cosignature(size, site, line))

    def history(self, size: int | None = None) -> History:
        """The log's history up to a checkpoint, read as a third party reads it; see `file` for the arguments and errors."""
        taken = self.file(size)
        return read_history(taken.leaves, taken.notes, self.key)

    def file(self, size: int | None = None) -> LogFile:
        """The log up to a checkpoint.

        Args:
            size: the checkpoint's size; the latest if not given.

        Raises:
            ProvenanceError: PF609, no checkpoint of this size was signed, or the log is empty; PF607, the log is not the one signed.
        """
        with self._lock:
            _, found = self._latest(0)
        of = size if size is not None else found.size if found else 0
        self._kept(of)
        leaves = tuple(leaf for start in range(0, of, _PAGE) for leaf in self._records.log_leaves(start, min(start + _PAGE, of)))
        return LogFile(leaves, self._notes(of))

    def standing(self, size: int | None = None) -> Standing:
        """Whether the history up to a checkpoint has a quorum, from the tree at hand: what `history` says, without reading every leaf.

        Args:
            size: the checkpoint's size; the latest if not given. 0 where the log is empty.

        Raises:
            ProvenanceError: PF609, no checkpoint of this size was signed; PF607, the log is not the one that was signed.
        """
        with self._lock:
            _, found = self._latest(0)
            of = size if size is not None else found.size if found else 0
            rolls = {each: self._tree.roll(each) for each in {*(row.size for row in self._records.cosignatures(of)), of}}
        notes = self._notes(of) if of else ()
        signed = {Checkpoint.from_text(each.text).size: each for each in notes}
        cosigned = {each: cosigned_by(one, self._origin, rolls[each]) for each, one in signed.items() if len(one.signatures) > 1}
        end = rolls[of]
        largest = {member.site: each for each in sorted(cosigned) for member in cosigned[each] if member in end.members}
        return Standing(of, tuple(sorted(end.enrolled)), dict(sorted(largest.items())), shortfalls(end, cosigned))

    def quorate(self) -> int | None:
        """Size of the largest checkpoint whose history has a quorum; None: there is none."""
        with self._lock:
            self._grow()
            lines = Counter(each.size for each in self._records.cosignatures(self._tree.size))
            enough = [size for size, count in lines.items() if count >= quorum_of(len(self._tree.roll(size).members))]
        return next((size for size in sorted(enough, reverse=True) if not self.standing(size).shortfalls), None)

    def signed(self, size: int) -> Note:
        """A checkpoint with every cosignature it has.

        Raises:
            ProvenanceError: PF609, no checkpoint of this size was signed.
        """
        self._kept(size)
        return self._with_lines(size, [given for given in self._records.cosignatures(size) if given.size == size])

    def _kept(self, size: int) -> bytes:
        """The note of a checkpoint, as it was signed."""
        kept = self._records.log_checkpoint(size) if 0 < size <= self._records.log_size() else None
        if kept is None:
            raise ProvenanceError(ErrorCode.CHECKPOINT_UNSIGNED, "the log has signed no checkpoint of this size", where="log", value=size)
        return kept

    def _notes(self, size: int) -> tuple[Note, ...]:
        """What the quorum rule looks at: of each of a site's keys, the largest checkpoint it cosigned."""
        given = self._records.cosignatures(size)
        largest = {(each.site, _line(each.line, each.site, each.size).key_id): each.size for each in given}
        sizes = sorted({*largest.values(), size})
        return tuple(self._with_lines(each, [one for one in given if one.size == each]) for each in sizes)

    def _with_lines(self, size: int, given: list[Cosignature]) -> Note:
        signed = Note.from_bytes(self._records.log_checkpoint(size) or b"", where=f"log, checkpoint of {size}")
        for each in given:
            signed = signed.with_signature(_line(each.line, each.site, size))
        return signed

    def _latest(self, at_least: int) -> tuple[bytes, Checkpoint | None]:
        """The latest checkpoint, signed now where leaves were added and the last one is old enough. Under the lock."""
        kept = self._records.newest_checkpoint()
        self._grow()
        newest = None if kept is None else self._checked(kept)
        grown = self._tree.size > (newest.size if newest else 0)
        due = self._signed_at is None or self._monotonic() >= self._signed_at + self._interval_s or newest is None or newest.size < at_least
        if not grown or not due:
            return kept or b"", newest
        fresh = Checkpoint(origin=self._origin, size=self._tree.size, root=self._tree.root(self._tree.size))
        signed = sign_checkpoint(fresh, self._signer).to_bytes()
        self._records.add_checkpoint(fresh.size, signed)
        self._sound, self._signed_at = fresh.size, self._monotonic()
        return signed, fresh

    def _checked(self, kept: bytes) -> Checkpoint:
        """A checkpoint read back: ours, and of these leaves."""
        found = open_checkpoint(Note.from_bytes(kept, where="log"), self.key, where="log")
        if found.size > self._tree.size or (found.size > self._sound and found.root != self._tree.root(found.size)):
            raise ProvenanceError(
                ErrorCode.LOG_DAMAGED,
                "the leaves in the database are not those of a checkpoint that was signed",
                where="log",
                value=f"checkpoint of {found.size}, {self._tree.size} leaves",
            )
        self._sound = max(self._sound, found.size)
        return found

    def _grow(self) -> None:
        """Read the leaves that were added."""
        size = self._records.log_size()
        if size < self._tree.size:
            raise ProvenanceError(
                ErrorCode.LOG_DAMAGED, "the log became shorter while it was in use", where="log", value=f"{self._tree.size}, now {size}"
            )
        while self._tree.size < size:
            self._tree.append(self._records.log_leaves(self._tree.size, min(self._tree.size + _PAGE, size)))

    @staticmethod
    def _demand(known: int, size: int) -> None:
        if known > size:
            raise ProvenanceError(
                ErrorCode.LOG_BEHIND, "the log is smaller than what is known of it", where="log", value=f"{known}, has {size}"
            )


def _line(line: bytes, site: SiteName, size: int) -> NoteSignature:
    try:
        return NoteSignature.from_line(line.decode("utf-8"))
    except ValueError:
        raise _refused("not a signature line", site, size) from None


def _refused(what: str, site: SiteName, size: int) -> ProvenanceError:
    return ProvenanceError(ErrorCode.COSIGNATURE_REFUSED, what, where=f"log, checkpoint of {size}", value=site)
