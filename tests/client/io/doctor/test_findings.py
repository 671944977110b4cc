"""Each finding has its severity, its codes and its hint, and names nothing that could not be pasted to an operator."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pathfed_client.io.doctor.findings import (
    BYTES_PER_SLIDE,
    COMFORTABLE_FREE,
    LEAST_FREE,
    Severity,
    judge,
    judge_content,
    judge_decoders,
    judge_devices,
    judge_direct,
    judge_disk,
    judge_folders,
    judge_formats,
    judge_keys,
    judge_mpp,
    judge_patients,
    judge_readable,
    judge_server,
    judge_speed,
)
from pathfed_client.io.doctor.seen import (
    DecoderSeen,
    DevicesSeen,
    FoldersSeen,
    KeySeen,
    ListSeen,
    MppState,
    SiteSeen,
    SlideSeen,
    SpeedSeen,
    mpp_state,
)
from pathfed_common.errors import ErrorCode
from pathfed_common.plan import CohortPlan, load_plan

OK, NOTE, WARNING, ERROR = Severity
PLAN = load_plan(
    """
name = "a"
[cohort]
tiles_per_patient = 4
[privacy]
expected_patients = 100
noise_multiplier = 1.0
clip_norm = 1.0
epsilon_limit = 50.0
[rounds]
count = 3
steps = 2
deadline_s = 60
quorum = 1
""",
    where="a",
)
GOOD = SlideSeen(path="SURNAME.svs", vendor="aperio", mpp=MppState.FINE, direct=True)


def bad(code: ErrorCode, **changes: object) -> SlideSeen:
    return replace(GOOD, code=code, direct=None, **changes)  # type: ignore[arg-type]


UNOPENED = bad(ErrorCode.SLIDE_UNOPENABLE, vendor=None, mpp=None)
COARSE = bad(ErrorCode.SLIDE_MPP_UNUSABLE, mpp=MppState.COARSE)


@pytest.mark.parametrize(
    ("seen", "severity", "code"),
    [
        (FoldersSeen(folders=2, slides=9), OK, None),
        (FoldersSeen(folders=2), ERROR, "PF201"),
        (FoldersSeen(folders=2, overlap=True), ERROR, "PF217"),
        (FoldersSeen(folders=2, away=1, slides=9, unlisted=("b//",)), ERROR, "PF216"),
        (FoldersSeen(folders=1, slides=9, unlisted=("2019",)), WARNING, "PF216"),
        (FoldersSeen(folders=1, slides=0, unlisted=("2019",)), ERROR, "PF216"),
    ],
)
def test_folders(seen, severity, code):
    found = judge_folders(seen)
    assert (found.severity, [*found.codes]) == (severity, [code] if code else [])
    assert bool(found.hint) == (severity is not OK)


@pytest.mark.parametrize(
    ("seen", "severity", "codes"),
    [
        (ListSeen(slides=4, mapped=4), OK, {}),
        (ListSeen(slides=4, mapped=3, unmapped=("SURNAME.svs",)), WARNING, {"PF204": 1}),
        (ListSeen(slides=4, mapped=4, missing=2, ambiguous=1), WARNING, {"PF212": 3}),
        (ListSeen(slides=4, mapped=0), ERROR, {"PF204": 4}),
        (ListSeen(slides=0, missing=2), NOTE, {"PF212": 2}),
        (ListSeen(slides=4, code=ErrorCode.PATIENT_LIST_UNREADABLE), ERROR, {"PF202": 1}),
    ],
)
def test_patients(seen, severity, codes):
    found = judge_patients(seen)
    assert (found.severity, found.codes) == (severity, codes)
    assert bool(found.hint) == (severity not in (OK, NOTE))


@pytest.mark.parametrize("code", ["PF205", "PF206", "PF220", "PF221"])
def test_one_unreadable_slide_warns_and_nothing_but_unreadable_slides_is_an_error(code):
    broken = bad(ErrorCode(code))
    assert judge_readable([GOOD, broken], 2).severity is WARNING
    found = judge_readable([broken, broken], 2)
    assert (found.severity, found.codes, found.slides) == (ERROR, {code: 2}, ("SURNAME.svs", "SURNAME.svs"))


def test_slides_that_can_be_read_but_not_used_are_not_called_unreadable():
    assert judge_readable([GOOD, COARSE, bad(ErrorCode.SLIDE_NOT_BRIGHTFIELD)], 3).severity is OK


def test_a_sample_that_was_cut_short_says_so():
    assert "time ran out before the other 7" in judge_readable([GOOD], 8).what
    assert "time" not in judge_readable([GOOD], 1).what
    assert judge_readable([], 0).severity is NOTE


def test_formats_are_counted():
    assert judge_formats([GOOD, GOOD, UNOPENED]).counts == {"aperio": 2, "not opened": 1}
    assert judge_formats([]).severity is NOTE


@pytest.mark.parametrize(
    ("mpp", "state"),
    [
        ((0.5, 0.5), "fine"),
        ((0.25, 0.25), "fine"),
        (None, "missing"),
        ((28.97, 28.97), "implausible"),
        ((float("nan"), 0.5), "implausible"),
        ((0.5, 0.9), "implausible"),
        ((1.0, 1.0), "coarser than the plan"),
    ],
)
def test_a_resolution_is_judged_as_a_scan_does(mpp, state):
    assert mpp_state(mpp, CohortPlan()).value == state


def test_resolutions_are_told_apart_and_only_those_of_slides_that_can_be_read():
    missing = bad(ErrorCode.SLIDE_MPP_UNUSABLE, mpp=MppState.MISSING)
    broken = bad(ErrorCode.SLIDE_UNREADABLE, mpp=MppState.MISSING)
    found = judge_mpp([GOOD, missing, COARSE, COARSE, broken, UNOPENED])
    assert (found.severity, found.codes) == (WARNING, {"PF207": 3})
    assert "1 missing, 2 coarser than the plan" in found.what
    assert judge_mpp([missing]).severity is ERROR
    assert judge_mpp([GOOD, broken]).severity is OK
    assert judge_mpp([UNOPENED]).severity is NOTE


def test_slides_without_tiles_are_noted_and_warned_of_when_there_are_no_others():
    without = bad(ErrorCode.SLIDE_WITHOUT_TISSUE)
    found = judge_content([GOOD, without, COARSE, UNOPENED])
    assert (found.severity, found.codes) == (NOTE, {"PF209": 1})
    assert judge_content([without]).severity is WARNING
    assert judge_content([GOOD]).severity is OK


@pytest.mark.parametrize(("direct", "openslide"), [(False, True), (True, False), (False, False)])
def test_a_decoder_that_gives_other_pixels_is_an_error(direct, openslide):
    right = DecoderSeen("jpeg-rgb", direct=True, openslide=True)
    assert judge_decoders([right]).severity is OK
    found = judge_decoders([right, DecoderSeen("jpeg-ycbcr", direct=direct, openslide=openslide)])
    assert found.severity is ERROR
    assert ("jpeg-ycbcr by direct decoding" in found.what, "jpeg-ycbcr by OpenSlide" in found.what) == (not direct, not openslide)
    assert "jpeg-rgb" not in found.what


def test_decoders_that_end_the_process_are_an_error():
    assert judge_decoders([]).severity is ERROR


def test_slides_that_fall_back_are_noted():
    assert judge_direct([GOOD]).severity is OK
    found = judge_direct([GOOD, replace(GOOD, direct=False), UNOPENED])
    assert (found.severity, found.counts) == (NOTE, {"direct": 1, "through OpenSlide": 1})
    assert judge_direct([UNOPENED]).severity is NOTE


def test_speed_is_set_against_the_plans_rounds():
    fast = SpeedSeen(slides=3, tiles=400, failed=0, seconds=2.0, workers=1)
    assert judge_speed(fast, None).severity is OK
    found = judge_speed(fast, PLAN)  # 100 patients x 4 tiles x 2 steps at 200 a second
    assert (found.severity, found.counts["seconds_a_round"]) == (OK, 4.0)
    slow = replace(fast, seconds=40.0)
    assert (judge_speed(slow, PLAN).severity, judge_speed(slow, None).severity) == (WARNING, OK)
    assert judge_speed(replace(fast, failed=1), None).severity is NOTE


@pytest.mark.parametrize("seen", [None, SpeedSeen(slides=3, tiles=0, failed=8, seconds=2.0, workers=1)])
def test_without_a_tile_no_speed_is_claimed(seen):
    found = judge_speed(seen, PLAN)
    assert (found.severity, found.counts) == (NOTE, {})


def test_the_disk_must_hold_what_the_slides_need():
    assert judge_disk(COMFORTABLE_FREE + BYTES_PER_SLIDE, 1).severity is OK
    assert judge_disk(COMFORTABLE_FREE + BYTES_PER_SLIDE - 1, 1).severity is WARNING
    found = judge_disk(LEAST_FREE + BYTES_PER_SLIDE - 1, 1)
    assert (found.severity, found.codes) == (ERROR, {"PF901": 1})


@given(free=st.integers(0, 1 << 45), slides=st.integers(0, 10**7), more=st.integers(0, 1 << 40))
def test_more_room_never_makes_the_disk_worse(free, slides, more):
    order = list(Severity)
    assert order.index(judge_disk(free + more, slides).severity) <= order.index(judge_disk(free, slides).severity)


def test_keys_that_are_missing_or_open_to_others_are_an_error():
    good = KeySeen("keys/flower", there=True, exposed=False)
    assert judge_keys([good]).severity is OK
    found = judge_keys([good, KeySeen("keys/a", there=False, exposed=False), KeySeen("keys/b", there=True, exposed=True)])
    assert (found.severity, found.codes) == (ERROR, {"PF906": 2})
    assert "others get at keys/b" in found.what
    assert "missing: keys/a" in found.what


def test_a_gpu_that_is_not_there_is_an_error_and_gpus_left_alone_are_told():
    missing = judge_devices(DevicesSeen(kind="", count=2, gpus=1, code=ErrorCode.DEVICE_MISSING))
    assert (missing.severity, missing.codes) == (ERROR, {"PF910": 1})
    assert judge_devices(DevicesSeen(kind="cpu", count=1, gpus=0)).severity is OK
    assert judge_devices(DevicesSeen(kind="cuda", count=8, gpus=8)).what == "training runs on 8 GPUs"
    some, none = (judge_devices(DevicesSeen(kind=kind, count=1, gpus=2)) for kind in ("cuda", "cpu"))
    assert (some.severity, some.what) == (NOTE, "training runs on the GPU; GPUs not used: 1")
    assert (none.severity, none.what) == (NOTE, "training runs on the CPU; GPUs not used: 2")


def test_a_server_that_is_away_is_a_warning_and_a_strange_certificate_an_error():
    assert judge_server(None).severity is OK
    assert judge_server(ErrorCode.SERVER_UNREACHABLE).severity is WARNING
    assert judge_server(ErrorCode.CERTIFICATE_REFUSED).severity is ERROR
    assert judge_server(ErrorCode.HOME_UNUSABLE).severity is ERROR


def test_names_are_told_only_when_asked_for():
    seen = SiteSeen(
        folders=FoldersSeen(folders=1, slides=3, unlisted=("SURNAME",)),
        patients=ListSeen(slides=3, mapped=2, unmapped=("SURNAME.svs",)),
        sample=[GOOD, UNOPENED, COARSE, bad(ErrorCode.SLIDE_WITHOUT_TISSUE)],
        drawn=4,
        decoders=[],
        speed=None,
        free_bytes=0,
        keys=[],
        server=None,
        devices=DevicesSeen(kind="cpu", count=1, gpus=0),
    )
    findings = judge(seen, PLAN)
    assert "SURNAME" not in repr(seen) + repr(findings)
    assert "SURNAME" not in json.dumps([finding.to_dict(show_slides=False) for finding in findings])
    named = {finding.check for finding in findings if "SURNAME" in json.dumps(finding.to_dict(show_slides=True))}
    assert named == {"folders", "patients", "readable", "mpp", "content"}
    assert len({finding.check for finding in findings}) == len(findings)
