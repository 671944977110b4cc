"""What the log keeper needs from a database, and what the control service needs from the keeper. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from pathfed_common.ids import SiteName
from pathfed_common.provenance.merkle import Proof


@dataclass(frozen=True)
class Cosignature:
    """A site's line under a checkpoint, as it is kept.

    Attributes:
        size: the checkpoint's size.
        site: the site.
        line: the note's signature line, without newline.
    """

    size: int
    site: SiteName
    line: bytes


class LogRecords(Protocol):
    """Where the log's leaves, checkpoints and cosignatures are kept. Rows are added and never changed."""

    def log_size(self) -> int:
        """Leaves in the log. Those before it are all there, and stay."""
        ...

    def log_leaves(self, start: int, stop: int) -> list[bytes]:
        """Leaves `start` to `stop - 1`, as many of them as there are."""
        ...

    def log_index(self, leaf_hash: bytes) -> int | None:
        """Index of the leaf with this leaf hash."""
        ...

    def newest_checkpoint(self) -> bytes | None:
        """The largest checkpoint's note, as the log signed it; None: nothing was signed yet."""
        ...

    def log_checkpoint(self, size: int) -> bytes | None:
        """The note of a checkpoint of this size."""
        ...

    def add_checkpoint(self, size: int, note: bytes) -> None:
        """Keep a signed checkpoint. One of this size that is there already stays."""
        ...

    def cosignatures(self, size: int) -> list[Cosignature]:
        """The cosignatures of checkpoints of up to `size` leaves, by size and site."""
        ...

    def add_cosignature(self, given: Cosignature) -> None:
        """Keep a cosignature. The first of a site under a checkpoint stays."""
        ...


@dataclass(frozen=True)
class ServedCheckpoint:
    """The log's latest checkpoint for someone who knows an earlier size.

    Attributes:
        size: its leaves; 0 where the log is empty.
        note: the signed note's bytes; empty where the log is empty. The same bytes for the same size.
        consistency: proof from the known size to this one; empty where nothing was known, or nothing was added.
    """

    size: int
    note: bytes
    consistency: Proof


@dataclass(frozen=True)
class ServedInclusion:
    """That a leaf is in the log.

    Attributes:
        index: the leaf's place, from 0.
        proof: the inclusion proof for the size asked for.
    """

    index: int
    proof: Proof


class LogService(Protocol):
    """What the control service offers sites of the log. Every method may be called from several threads at once.

    Whose call it is, the caller has established; a site's name here is never one that a message claims.
    """

    def checkpoint(self, known_size: int) -> ServedCheckpoint:
        """The latest checkpoint, with a consistency proof from `known_size` (0: nothing is known).

        Raises:
            ProvenanceError: PF608, the log is smaller than `known_size`; PF607, it is not the one that was signed.
        """
        ...

    def inclusion(self, leaf_hash: bytes, size: int) -> ServedInclusion:
        """Proof that the leaf with this leaf hash is among the first `size` leaves.

        Raises:
            ProvenanceError: PF608, the log is smaller than `size`; PF610, there is no such leaf among them.
        """
        ...

    def leaves(self, start: int, stop: int) -> Sequence[bytes]:
        """Leaves `start` to `stop - 1`; fewer where there are fewer, or where that is too many for one answer.

        Raises:
            ProvenanceError: PF610, not 0 <= start <= stop.
        """
        ...

    def cosign(self, site: SiteName, size: int, line: bytes) -> None:
        """Keep a site's cosignature of a checkpoint. The same again changes nothing.

        Raises:
            ProvenanceError: PF609, no checkpoint of this size was signed; PF611, the line is not a cosignature of it by the site's present
                evidence key.
            RoundError: PF501, the site is not enrolled; PF518, it is revoked.
        """
        ...
