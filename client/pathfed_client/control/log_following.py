"""Following the transparency log: what the site checks, cosigns, keeps, and cries out about.

    1. checkpoint     with the proof that it continues the one this site cosigned last          log_witness.judge
    2. leaves         all that are new; together they must give the checkpoint's root           nothing is in the log unread
    3. own leaves     nothing in this site's name that this home did not make
    4. inclusion      of what the server has acknowledged: a proof for each, or, after some patience, an alarm
    5. head           on the disk, before the cosignature leaves
    6. cosignature    to the server; a receipt for each own leaf into the database

A checkpoint that fails 1, 2 or 4 is not cosigned. Alarms are for people: they stand in the database, in the log and in `status`, and where
the server's own signature shows what it did, its note is kept as evidence.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from pathfed_client.io.log_head import LogHeadFile
from pathfed_client.io.server_records import Alarm, OwnLeaf
from pathfed_client.io.site_store import SiteStore
from pathfed_client.transport.control_client import ControlClient
from pathfed_common import digest
from pathfed_common.digest import Digest
from pathfed_common.errors import ErrorCode, PathfedError, ProvenanceError
from pathfed_common.ids import SiteName
from pathfed_common.provenance.keys import SigningKey, VerifyKey
from pathfed_common.provenance.log_checkpoint import Checkpoint, LogProof, cosign_checkpoint
from pathfed_common.provenance.log_leaves import (
    AnyLeaf,
    KeyRotated,
    PlanApproved,
    PlanDecided,
    SiteAdmitted,
    SiteRevoked,
    StatementLogged,
    read_leaf,
)
from pathfed_common.provenance.log_witness import Head, PlacedProof, Refusal, judge
from pathfed_common.provenance.merkle import Frontier, Proof, leaf_hash
from pathfed_common.provenance.note import Note, NoteKey

#: Seconds after the server's acknowledgement within which a leaf may be missing.
PATIENCE_S = 120.0
_PAGE = 1000
_READ = "log_read"
_COSIGNED = "log_cosigned"
_log = logging.getLogger(__name__)

#: What a refused checkpoint says about the server.
_MEANING = {
    Refusal.NOT_THE_LOGS: (ErrorCode.LOG_UNREADABLE, "the server shows a checkpoint that the log's key did not sign"),
    Refusal.EXTENSIONS: (ErrorCode.LOG_UNREADABLE, "the server shows a checkpoint with lines that nothing can check"),
    Refusal.EMPTY: (ErrorCode.LOG_UNREADABLE, "the server shows a checkpoint of no leaves"),
    Refusal.SMALLER: (ErrorCode.LOG_FORKED, "the server shows a log that is smaller than the one this site has cosigned"),
    Refusal.FORKED: (ErrorCode.LOG_FORKED, "the server shows another log of the size that this site has cosigned"),
    Refusal.NOT_CONSISTENT: (ErrorCode.LOG_FORKED, "the server cannot show that its log continues the one this site has cosigned"),
}


@dataclass(frozen=True, kw_only=True)
class OwnNames:
    """What the log may hold in this site's name.

    Attributes:
        site: the site.
        key: its evidence key.
        former: evidence keys it had before.
    """

    site: SiteName
    key: SigningKey = field(repr=False)
    former: Sequence[VerifyKey] = ()


class LogFollower:
    """Follows one log for one site."""

    def __init__(self, store: SiteStore, head: LogHeadFile, log: NoteKey, own: OwnNames) -> None:
        """Take what is kept, the log's key, and who the site is."""
        self._store, self._head, self._key, self._own = store, head, log, own

    def follow(self, client: ControlClient, now: float | None = None) -> None:
        """One look at the log.

        Raises:
            TransportError: PF436, the site's own head is lost; other PF4xx, the server cannot be reached or refuses the call.
            HostError: PF901, PF904: files.
        """
        now = time.time() if now is None else now
        last = self._head.read()
        shown = self._checkpoint(client, last, now)
        if shown is None:
            return
        signed, consistency = shown
        judged = judge(signed, self._key, last=last, consistency=consistency, own=(), proofs={})
        if judged.refusal is not None:
            code, what = _MEANING[judged.refusal]
            self._cry(code, str(last.size if last else 0), what, now, evidence=signed.to_bytes())
            return
        assert judged.checkpoint is not None, "not refused"  # noqa: S101
        if not self._read_leaves(client, judged.checkpoint, signed, now):
            return
        waiting = self._store.own_leaves(without_receipt=True)
        proofs = {leaf.leaf: proof for leaf in waiting if (proof := _inclusion(client, leaf, judged.checkpoint.size)) is not None}
        due = [leaf.leaf for leaf in waiting if leaf.promised_at is not None and now - leaf.promised_at > PATIENCE_S]
        shown_in = _those_in(signed, self._key, last, consistency, proofs)
        missing = sorted(set(due) - shown_in)
        for leaf in missing:
            what = "the server has acknowledged something of this site's that its log does not hold"
            self._cry(ErrorCode.LOG_LEAF_MISSING, leaf_hash(leaf).hex(), what, now, evidence=signed.to_bytes())
        if not missing:
            self._cosign(client, signed, judged.checkpoint, {leaf: proofs[leaf] for leaf in shown_in}, now)

    def _checkpoint(self, client: ControlClient, last: Head | None, now: float) -> tuple[Note, Proof] | None:
        """The latest checkpoint and its consistency proof; None where there is none, or none that can be read."""
        known = last.size if last else 0
        try:
            data, consistency = client.checkpoint(known)
            if data:
                return Note.from_bytes(data), consistency
        except ProvenanceError as error:
            # PF607, PF608: the server itself says that its log is not, or not as large as, what it had this site cosign.
            code = ErrorCode.LOG_UNREADABLE if error.code is ErrorCode.RECORD_SIGNATURE else ErrorCode.LOG_FORKED
            self._cry(code, str(known), f"the server cannot show its log: {error.code.value} {error.what}", now)
            return None
        if last is not None:
            self._cry(ErrorCode.LOG_FORKED, str(known), "the server shows an empty log after one that this site has cosigned", now)
        return None

    def _read_leaves(self, client: ControlClient, checkpoint: Checkpoint, signed: Note, now: float) -> bool:
        """Read what is new in the log; whether the leaves are those of the checkpoint."""
        frontier = _frontier(self._store.facts().get(_READ))
        if frontier.size > checkpoint.size:
            frontier = Frontier()
        fresh: list[bytes] = []
        while frontier.size < checkpoint.size:
            page = client.leaves(frontier.size, min(checkpoint.size, frontier.size + _PAGE))
            if not page or frontier.size + len(page) > checkpoint.size:
                break
            for leaf in page:
                frontier.append(leaf_hash(leaf))
            fresh += page
        if frontier.size != checkpoint.size or frontier.root() != checkpoint.root:
            what = "the leaves that the server shows are not those of its checkpoint"
            self._cry(ErrorCode.LOG_FORKED, f"leaves of {checkpoint.size}", what, now, evidence=signed.to_bytes())
            self._store.set_facts({_READ: ""})  # read all of it again: what was read before may be what is wrong
            return False
        for data in fresh:
            self._look_at(data, now)
        self._store.set_facts({_READ: _frontier_text(frontier)})
        return True

    def _look_at(self, data: bytes, now: float) -> None:
        """Take up a leaf that is this site's, and cry out about one that only bears its name."""
        try:
            leaf = read_leaf(data)
        except ProvenanceError:
            self._cry(ErrorCode.LOG_UNREADABLE, leaf_hash(data).hex(), "the log holds a leaf of no known kind", now, evidence=data)
            return
        if getattr(leaf, "site", None) != self._own.site:
            return
        if isinstance(leaf, SiteRevoked):
            _log.warning("the log says that this site was revoked")
        elif self._is_ours(leaf, data):
            self._store.add_own_leaf(data, now)
        else:
            subject = "statement" if isinstance(leaf, StatementLogged) else leaf.kind
            what = f"the log holds a {leaf.kind} in this site's name that this home did not make, or has forgotten"
            self._cry(ErrorCode.LOG_FOREIGN_LEAF, f"{subject} {leaf_hash(data).hex()}", what, now, evidence=data)

    def _is_ours(self, leaf: AnyLeaf, data: bytes) -> bool:
        match leaf:
            case StatementLogged():
                sealed = self._store.get_sealed(leaf.run, leaf.round_index)
                return sealed is not None and digest.of_bytes(sealed.statement) == leaf.statement
            case PlanApproved():
                return leaf.approval in self._words()
            case PlanDecided():
                return leaf.decision in self._words()
            case SiteAdmitted():
                return leaf.evidence_key in (self._own.key.public, *self._own.former)
            case KeyRotated():
                return any(known.leaf == data for known in self._store.own_leaves())
            case _:
                return True

    def _words(self) -> set[Digest]:
        given = {digest.of_bytes(word.envelope) for word in self._store.words()}
        return given | {digest.of_bytes(approval.signed_approval) for approval in self._store.approvals()}

    def _cosign(self, client: ControlClient, signed: Note, checkpoint: Checkpoint, proofs: dict[bytes, PlacedProof], now: float) -> None:
        """Keep the head, send the cosignature, keep receipts; what was cosigned before is not cosigned again."""
        head = Head(checkpoint.size, checkpoint.root)
        if self._head.read() != head:
            self._head.keep(head)
        line = cosign_checkpoint(checkpoint, self._own.site, self._own.key, at=int(now))
        done = f"{checkpoint.size} {self._own.key.key_id}"
        if self._store.facts().get(_COSIGNED) != done:
            try:
                client.cosign(checkpoint.size, line.to_line().encode())
                self._store.set_facts({_COSIGNED: done})
            except ProvenanceError as error:
                _log.warning("%s: the server does not take this site's cosignature of %d leaves", error.code.value, checkpoint.size)
        receipt = signed.with_signature(line)
        for leaf, proof in proofs.items():
            self._store.put_receipt(leaf, LogProof(index=proof.index, hashes=proof.hashes, checkpoint=receipt).to_bytes(), now)
            self._store.end_alarm(ErrorCode.LOG_LEAF_MISSING, leaf_hash(leaf).hex(), now)

    def _cry(self, code: ErrorCode, subject: str, what: str, now: float, evidence: bytes | None = None) -> None:
        if self._store.raise_alarm(Alarm(at=now, code=code, subject=subject, detail=what, evidence=evidence)):
            _log.error("ALARM %s: %s (%s)", code.value, what, subject)


def _inclusion(client: ControlClient, leaf: OwnLeaf, size: int) -> PlacedProof | None:
    """The server's proof that a leaf is in; None where it says that it is not."""
    try:
        return client.inclusion(leaf_hash(leaf.leaf), size)
    except PathfedError as error:
        if error.code is ErrorCode.LEAF_UNKNOWN:
            return None
        raise


def _those_in(signed: Note, key: NoteKey, last: Head | None, consistency: Proof, proofs: dict[bytes, PlacedProof]) -> set[bytes]:
    """The leaves whose proofs hold for this checkpoint."""
    judged = judge(signed, key, last=last, consistency=consistency, own=tuple(proofs), proofs=proofs)
    return set(proofs) - set(judged.missing)


def _frontier(text: str | None) -> Frontier:
    """What was read of the log, from `_frontier_text`; nothing where that cannot be read."""
    try:
        size, *hashes = (text or "0").split()
        return Frontier(int(size), [bytes.fromhex(value) for value in hashes])
    except ValueError:
        return Frontier()


def _frontier_text(frontier: Frontier) -> str:
    return " ".join([str(frontier.size), *(value.hex() for value in frontier.edge)])
