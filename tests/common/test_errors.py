import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pathfed_common.errors import ErrorCode, HostError, PathfedError, PlanError, ProvenanceError, RoundError, error_from_dict

FAMILIES = {kind.family: kind for kind in PathfedError.__subclasses__()}
TEXT = st.none() | st.text(max_size=30)


@given(st.sampled_from(ErrorCode), st.text(max_size=30), TEXT, TEXT, TEXT)
def test_an_error_survives_json_between_two_processes(code, what, where, value, remedy):
    error = FAMILIES[code.value[:3]](code, what, where=where, value=value, remedy=remedy)
    again = error_from_dict(json.loads(json.dumps(error.to_dict())))
    assert type(again) is type(error)
    assert again.to_dict() == error.to_dict()
    assert str(again) == str(error)


@pytest.mark.parametrize(
    ("kind", "code"), [(PlanError, ErrorCode.DISK_FULL), (HostError, ErrorCode.PLAN_UNKNOWN_KEY), (RoundError, ErrorCode.RECORD_CHANGED)]
)
def test_a_code_of_another_family_is_a_bug_of_ours(kind, code):
    with pytest.raises(ValueError, match=code.value):
        kind(code, "mixed up")


def test_the_line_has_code_what_where_value_and_remedy():
    error = PlanError(ErrorCode.PLAN_OUT_OF_BOUNDS, "too small", where="plan.toml, key a", value=0, remedy="raise it")
    assert str(error) == "PF104: too small | where: plan.toml, key a | value: 0 | do: raise it"
    assert str(PlanError(ErrorCode.PLAN_OUT_OF_BOUNDS, "too small")) == "PF104: too small"


@pytest.mark.parametrize(
    "raw",
    [
        {},
        {"code": "PF999", "what": "", "where": None, "value": None, "remedy": None},
        {"code": "PF901"},
        {"code": None, "what": "x", "where": None, "value": None, "remedy": None},
        "PF901",
        None,
    ],
)
def test_what_is_no_error_is_not_taken_for_one(raw):
    with pytest.raises(ValueError):
        error_from_dict(raw)


def test_every_code_has_one_family_and_every_family_one_exit_status_of_its_own():
    assert all(code.value[:3] in FAMILIES for code in ErrorCode)
    statuses = [kind.exit_status for kind in FAMILIES.values()]
    assert len(set(statuses)) == len(statuses)
    # Not to be mixed up with a bug (1), a usage error (2), `verify` without trust (3), a signal (128 and above).
    assert all(3 < status < 128 for status in statuses)
    assert ProvenanceError.exit_status == 16
