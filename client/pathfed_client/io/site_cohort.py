"""The site database as one plan sees it: what was scanned, less what its rules leave out, less what was withdrawn.

Both are looked at whenever a cohort is made, so that they count at once: changing the rules or the attributes reads no slide again, and a
withdrawal needs no scan.
"""

from collections import Counter
from collections.abc import Collection
from dataclasses import replace

from pathfed_client.cohort.cohort import Cohort, SlideId
from pathfed_client.cohort.rules import outside, tile_weight
from pathfed_client.cohort.withdrawal import Withdrawn, is_withdrawn
from pathfed_client.io.site_records import ScanSummary, SlideRecord, SlideStatus
from pathfed_client.io.site_store import SiteStore
from pathfed_client.slides.tiling import scan_key
from pathfed_common.errors import ErrorCode
from pathfed_common.plan import CohortPlan


def judged(record: SlideRecord, plan: CohortPlan, withdrawn: Collection[Withdrawn], key: bytes) -> SlideRecord:
    """A slide as a plan sees it: unchanged, or refused with PF234 (withdrawn) or PF233 (outside the plan's rules)."""
    if record.status is SlideStatus.MISSING:
        return record
    if is_withdrawn(withdrawn, key, patient=record.patient, path=record.path, fingerprint=record.fingerprint):
        return replace(record, status=SlideStatus.REFUSED, reason=ErrorCode.SLIDE_WITHDRAWN, detail="withdrawn")
    if record.status is not SlideStatus.USABLE:
        return record
    attribute = outside(plan, record.attributes)
    if attribute is None:
        return record
    detail = f"{attribute}: {record.attributes.get(attribute, 'not known')}"
    return replace(record, status=SlideStatus.REFUSED, reason=ErrorCode.SLIDE_OUTSIDE_RULES, detail=detail)


def records(store: SiteStore, plan: CohortPlan, key: bytes) -> dict[SlideId, SlideRecord]:
    """All slides scanned for a plan, as the plan sees them, in order of their paths."""
    withdrawn = store.withdrawn()
    return {number: judged(record, plan, withdrawn, key) for number, record in store.slides(scan_key(plan)).items()}


def cohort(store: SiteStore, plan: CohortPlan, key: bytes, withdrawn: Collection[Withdrawn]) -> Cohort:
    """The patients that a plan trains on, with the weights of their slides' tiles. Empty before a scan.

    Args:
        store: the site database.
        plan: the cohort rules.
        key: of the pseudonyms.
        withdrawn: what was withdrawn, as read *before* this call: what comes later is found when the round is sealed.
    """

    def weigh(record: SlideRecord) -> float | None:
        counts = judged(record, plan, withdrawn, key).status is SlideStatus.USABLE
        return tile_weight(plan, record.attributes) if counts else None

    return store.cohort(scan_key(plan), weigh)


def summary(store: SiteStore, plan: CohortPlan, key: bytes) -> ScanSummary:
    """Counts for `status` and `approve`. Depends on patients: it stays at the site."""
    seen = list(records(store, plan, key).values())
    usable = [record for record in seen if record.status is SlideStatus.USABLE]
    return ScanSummary(
        slides=dict(Counter(record.status for record in seen)),
        reasons=dict(Counter(record.reason for record in seen if record.reason is not None)),
        patients=len({record.patient for record in usable}),
        tiles=sum(record.tile_count for record in usable),
    )
