"""Reading the ledger's chain: from stored bytes to entries that are known to be whole, signed and in order.

What one signature says. An entry names the digest of the bytes of the entry before it, so the signature of the *last* entry vouches for
every byte of all entries: nobody without the site's key can change any of them and keep the last signature. `ChainReader.read` rests
on that: it checks one signature and a digest an entry, which makes a ledger of ten thousand rounds quick to open in a fresh process, and
needs no cache on the disk that would have to be trusted. `every_signature` checks each for itself as well. That finds nothing more that
an outsider could do; it finds a fault of our own, an entry appended to one that did not verify.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from pathfed_client.budget.entry import LEDGER_TYPE, LedgerEntry
from pathfed_common import digest
from pathfed_common.digest import Digest
from pathfed_common.errors import ErrorCode, PrivacyError, ProvenanceError
from pathfed_common.provenance import dsse
from pathfed_common.provenance.keys import VerifyKey
from pathfed_common.units import CLOCK_SKEW_S, UtcSeconds


@dataclass(frozen=True)
class Chain:
    """A verified ledger.

    Attributes:
        entries: in order.
        heads: digest of each entry's stored bytes.
    """

    entries: tuple[LedgerEntry, ...]
    heads: tuple[Digest, ...]

    @property
    def latest(self) -> UtcSeconds | None:
        """The latest time that any entry gives, UTC seconds; None where there is none."""
        return max((entry.at for entry in self.entries), default=None)


class ChainReader:
    """Reads one site's ledger, remembering in memory, by the digest of the exact bytes, what it has read and verified."""

    def __init__(self, *keys: VerifyKey) -> None:
        """Take the site's public evidence keys, the one in use last: once a later key has signed, an earlier one signs no more."""
        self._keys = {key.key_id: key for key in keys}
        self._order = list(self._keys)
        self._parsed: dict[Digest, tuple[LedgerEntry, int]] = {}
        self._verified: set[Digest] = set()

    def read(self, stored: Sequence[bytes], *, every_signature: bool = False) -> Chain:
        """Check bytes, chain, order and times of all entries.

        Args:
            stored: the entries in order of their sequence numbers.
            every_signature: check each entry's own signature, not the last one's alone.

        Raises:
            PrivacyError: PF304, an entry is half-written, changed, missing, foreign, repeated or has another delta than the first; PF308,
                times go backwards by more than `CLOCK_SKEW_S`.
        """
        heads = [digest.of_bytes(data) for data in stored]
        entries: list[LedgerEntry] = []
        releases: set[Digest] = set()
        latest, signed_by = 0.0, 0
        for sequence, (data, head) in enumerate(zip(stored, heads, strict=True), start=1):
            last = sequence == len(stored)
            entry, by = self._entry(data, head, sequence, verify=every_signature or last, last=last)
            if by < signed_by:
                raise damaged("an entry is signed with a key that had been replaced", sequence)
            signed_by = by
            _check_place(entry, sequence, heads[sequence - 2] if sequence > 1 else None)
            if entry.delta != (entries[0] if entries else entry).delta:
                raise damaged("an entry has another delta than the first", sequence)
            if entry.release_id in releases:
                raise damaged("a release is charged twice", sequence)
            check_clock(entry.at, latest, f"ledger entry {sequence}")
            latest = max(latest, entry.at)
            releases.add(entry.release_id)
            entries.append(entry)
        return Chain(tuple(entries), tuple(heads))

    def _entry(self, data: bytes, head: Digest, sequence: int, *, verify: bool, last: bool) -> tuple[LedgerEntry, int]:
        """One entry, and the place of its key in the order of keys."""
        where = f"ledger entry {sequence}"
        try:
            if verify and head not in self._verified:
                dsse.open_envelope(data, payload_type=LEDGER_TYPE, keys=self._keys, where=where)
                self._verified.add(head)
            if head not in self._parsed:
                envelope = dsse.parse(data, where=where)
                if envelope.payload_type != LEDGER_TYPE or envelope.key_id not in self._keys:
                    raise ValueError("another type or key")
                self._parsed[head] = LedgerEntry.from_payload(envelope.payload), self._order.index(envelope.key_id)
        except (ProvenanceError, ValueError) as error:
            torn = "the last entry is half-written, or it" if last else "an entry"
            raise damaged(f"{torn} was changed or is not this site's: {error}", sequence) from error
        return self._parsed[head]


def check_clock(at: float, latest: float, where: str) -> None:
    """Refuse a time that lies before a time already written, by more than `CLOCK_SKEW_S`.

    Order in the ledger is by sequence number, so a wrong time changes no epsilon. But a clock that went backwards is what a machine put
    back to an earlier state looks like, and times are evidence.

    Raises:
        PrivacyError: PF308.
    """
    # Written so that a NaN, which compares false with everything, refuses.
    if not at >= latest - CLOCK_SKEW_S:
        raise PrivacyError(
            ErrorCode.CLOCK_SET_BACK,
            "the clock says an earlier time than an earlier charge does",
            where=where,
            value=f"{latest - at:.0f} s earlier",
            remedy="put the machine's clock right and ask again; if the clock is right, ask who set it or restored this machine",
        )


def _check_place(entry: LedgerEntry, sequence: int, previous: Digest | None) -> None:
    if entry.sequence != sequence:
        raise damaged(f"entry {sequence} carries the number {entry.sequence}: an entry is missing, swapped or repeated", sequence)
    if entry.previous != previous:
        raise damaged("an entry does not follow from the one before it", sequence)


def damaged(what: str, sequence: int) -> PrivacyError:
    """The error of a ledger that does not verify."""
    remedy = (
        "do not train at this site and restore no older copy; keep the database as evidence, and compare it with the statements that the "
        "operator's records hold: `pathfed-site ledger verify --heads RECORD`"
    )
    return PrivacyError(ErrorCode.LEDGER_DAMAGED, what, where=f"ledger entry {sequence}", remedy=remedy)
