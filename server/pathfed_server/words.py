"""A site's signed word on a plan, however it came: over the control service, or as a file that somebody handed over."""

import time
from collections.abc import Collection

from pathfed_common.digest import Digest
from pathfed_common.errors import ErrorCode, RoundError
from pathfed_common.ids import SiteName
from pathfed_common.provenance import dsse
from pathfed_common.provenance.documents import DECISION_TYPE, Approval, Decision
from pathfed_common.provenance.keys import VerifyKey
from pathfed_server.db.rows import ApprovalRow, DecisionRow
from pathfed_server.db.sql_store import SqlStore

#: An approval, a rejection or a revocation.
Word = Approval | Decision


def record_word(store: SqlStore, envelope: bytes, *, by: str, site: SiteName | None = None, where: str = "word") -> Word:
    """Check a word's signature by the site's present evidence key, and keep it.

    Args:
        store: the open store.
        envelope: the signed word.
        by: who brought it, for the audit trail: ``site:<name>``, or an operator.
        site: the site that brought it itself; None where an operator did: any enrolled site's word is taken then.
        where: what to call it in errors.

    Raises:
        ProvenanceError: PF602, malformed, or signed with another key; PF601, not a word on a plan.
        RoundError: PF501, signed with the key of no such site, or it names another; PF518, the site is revoked; PF516, no such plan;
            PF519, it approved the plan with other figures; PF530, it has revoked its approval; PF531, the word does not follow its last.
    """
    key_id = dsse.parse(envelope, where=where).key_id
    keys = {VerifyKey.from_text(row.evidence_key).key_id: row for row in store.sites() if site is None or row.name == site}
    if key_id not in keys:
        raise RoundError(
            ErrorCode.SITE_UNKNOWN,
            "signed with the key of no enrolled site",
            where=where,
            value=key_id,
            remedy="add the site's card first",
        )
    signer = keys[key_id]
    key = VerifyKey.from_text(signer.evidence_key)
    word = _read(envelope, key, where)
    if word.site != signer.name:
        raise RoundError(ErrorCode.SITE_UNKNOWN, "the word names another site than the one that signed it", where=where, value=word.site)
    if isinstance(word, Approval):
        store.add_approval(_approval_row(word, envelope), at=time.time(), by=by)
    else:
        store.add_decision(_decision_row(word, envelope), at=time.time(), by=by)
    return word


def _read(envelope: bytes, key: VerifyKey, where: str) -> Word:
    if dsse.parse(envelope, where=where).payload_type == DECISION_TYPE:
        return Decision.from_bytes(envelope, key, where=where)
    return Approval.from_bytes(envelope, key, where=where)


def _approval_row(word: Approval, envelope: bytes) -> ApprovalRow:
    return ApprovalRow(
        site=word.site,
        plan=word.plan,
        declared_patients=word.declared_patients,
        reply_slots=word.reply_slots,
        envelope=envelope,
        approved_at=word.approved_at,
    )


def _decision_row(word: Decision, envelope: bytes) -> DecisionRow:
    return DecisionRow(
        site=word.site, plan=word.plan, kind=word.kind, approval=word.approval, envelope=envelope, decided_at=word.decided_at
    )


def outdated(store: SqlStore, plan: Digest) -> frozenset[SiteName]:
    """The sites whose approval of a plan is signed with an evidence key that they have replaced since."""
    present = {row.name: VerifyKey.from_text(row.evidence_key).key_id for row in store.sites()}
    return frozenset(row.site for row in store.approvals(plan) if dsse.parse(row.envelope).key_id != present[row.site])


def demand_present_keys(old: Collection[SiteName]) -> None:
    """Refuse where any site is given; see `outdated`.

    Raises:
        RoundError: PF532.
    """
    if old:
        raise RoundError(
            ErrorCode.APPROVAL_OUTDATED, "the approval is signed with a key that the site has replaced", value=", ".join(sorted(old))
        )
