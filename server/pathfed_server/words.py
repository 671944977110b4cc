"""A site's signed word on a plan, however it came: over the control service, or as a file that somebody handed over."""

import time

from pathfed_common.errors import ErrorCode, RoundError
from pathfed_common.ids import SiteName
from pathfed_common.provenance import dsse
from pathfed_common.provenance.documents import Approval
from pathfed_common.provenance.keys import VerifyKey
from pathfed_server.db.rows import ApprovalRow
from pathfed_server.db.sql_store import SqlStore


def record_word(store: SqlStore, envelope: bytes, *, by: str, site: SiteName | None = None, where: str = "word") -> Approval:
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
            PF519, it approved the plan with other figures.
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
    approval = Approval.from_bytes(envelope, VerifyKey.from_text(signer.evidence_key), where=where)
    if approval.site != signer.name:
        raise RoundError(
            ErrorCode.SITE_UNKNOWN, "the approval names another site than the one that signed it", where=where, value=approval.site
        )
    row = ApprovalRow(
        site=approval.site,
        plan=approval.plan,
        declared_patients=approval.declared_patients,
        reply_slots=approval.reply_slots,
        envelope=envelope,
        approved_at=approval.approved_at,
    )
    store.add_approval(row, at=time.time(), by=by)
    return approval
