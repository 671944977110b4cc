"""A slide as a plan sees it."""

from dataclasses import replace

import pytest

from pathfed_client.cohort.cohort import Pseudonym
from pathfed_client.cohort.withdrawal import Withdrawn, WithdrawnKind, of_slide
from pathfed_client.io.site_cohort import judged
from pathfed_client.io.site_records import SlideRecord, SlideStatus
from pathfed_common import digest
from pathfed_common.cohort_rules import CohortInclude
from pathfed_common.errors import ErrorCode
from pathfed_common.plan import CohortPlan

KEY = bytes(range(32))
PLAN = CohortPlan(include=CohortInclude(organ=("lung",)))
LUNG = SlideRecord(
    path="a.tif",
    fingerprint=digest.of_bytes(b"a"),
    size=1,
    mtime_ns=1,
    scan_key=digest.of_bytes(b"rules"),
    status=SlideStatus.USABLE,
    patient=Pseudonym("1" * 32),
    attributes={"organ": "lung"},
)
LIVER = replace(LUNG, attributes={"organ": "liver"})
REFUSED = replace(LIVER, status=SlideStatus.REFUSED, reason=ErrorCode.SLIDE_UNREADABLE, detail="d")
MISSING = replace(LIVER, status=SlideStatus.MISSING, reason=ErrorCode.SLIDE_MISSING)
PATIENT = frozenset({Withdrawn(WithdrawnKind.PATIENT, "1" * 32)})
SLIDE = of_slide(KEY, "a.tif", None)
OTHERS = frozenset({Withdrawn(WithdrawnKind.PATIENT, "2" * 32)}) | of_slide(KEY, "b.tif", digest.of_bytes(b"b"))


@pytest.mark.parametrize(
    ("record", "withdrawn", "status", "reason"),
    [
        (LUNG, (), SlideStatus.USABLE, None),
        (LUNG, OTHERS, SlideStatus.USABLE, None),
        (LIVER, (), SlideStatus.REFUSED, ErrorCode.SLIDE_OUTSIDE_RULES),
        (LUNG, PATIENT, SlideStatus.REFUSED, ErrorCode.SLIDE_WITHDRAWN),
        (LUNG, SLIDE, SlideStatus.REFUSED, ErrorCode.SLIDE_WITHDRAWN),
        (LIVER, SLIDE, SlideStatus.REFUSED, ErrorCode.SLIDE_WITHDRAWN),
        (REFUSED, (), SlideStatus.REFUSED, ErrorCode.SLIDE_UNREADABLE),
        (REFUSED, PATIENT, SlideStatus.REFUSED, ErrorCode.SLIDE_WITHDRAWN),
        (MISSING, PATIENT, SlideStatus.MISSING, ErrorCode.SLIDE_MISSING),
    ],
)
def test_withdrawals_come_before_rules_and_rules_look_at_usable_slides_alone(record, withdrawn, status, reason):
    seen = judged(record, PLAN, withdrawn, KEY)
    assert (seen.status, seen.reason) == (status, reason)
    assert replace(seen, status=record.status, reason=record.reason, detail=record.detail) == record
