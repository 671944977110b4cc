"""Cohort rules in a plan: what is taken, and with which code the rest is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pathfed_common.cohort_rules import CohortExclude, CohortInclude, contradiction, normal_value
from pathfed_common.errors import ErrorCode, PlanError
from pathfed_common.plan import Plan, load_plan, plan_from_bytes

LEAST = """
name = "least"
[privacy]
expected_patients = 2
noise_multiplier = 1.0
clip_norm = 1.0
epsilon_limit = 8.0
[rounds]
count = 1
"""


def plan(text: str) -> Plan:
    return load_plan(LEAST + text, where="plan.toml")


def test_rules_are_read_and_survive_their_canonical_bytes():
    made = plan(
        '[cohort.include]\norgan = ["Lung"]\nacquired_from = "2015-01-01"\nacquired_until = "2015-01-01"\n'
        '[cohort.exclude]\nstain = ["IHC"]\n'
        '[[cohort.tile_weights]]\nattribute = "cancer_type"\nvalue = "mesothelioma"\nweight = 8\n'
        '[[cohort.tile_weights]]\nattribute = "cancer_type"\nvalue = "rest"\nweight = 0.5\n'
    )
    assert made.cohort.include == CohortInclude(organ=("Lung",), acquired_from="2015-01-01", acquired_until="2015-01-01")
    assert made.cohort.exclude == CohortExclude(stain=("IHC",))
    assert [(rule.attribute, rule.value, rule.weight) for rule in made.cohort.tile_weights] == [
        ("cancer_type", "mesothelioma", 8.0),
        ("cancer_type", "rest", 0.5),
    ]
    assert plan_from_bytes(made.canonical_bytes(), where="bytes") == made
    assert hash(made.cohort) == hash(plan_from_bytes(made.canonical_bytes(), where="bytes").cohort)


WEIGHT = '[[cohort.tile_weights]]\nattribute = "organ"\nvalue = "lung"\nweight = 2.0\n'


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ('[cohort.include]\norgan = "lung"\n', ErrorCode.PLAN_WRONG_TYPE),
        ("[cohort.include]\norgan = [1]\n", ErrorCode.PLAN_WRONG_TYPE),
        ('[cohort.include]\norgan = [""]\n', ErrorCode.PLAN_OUT_OF_BOUNDS),
        ('[cohort.include]\norgan = ["  "]\n', ErrorCode.PLAN_IMPOSSIBLE),
        (f'[cohort.include]\norgan = ["{"x" * 201}"]\n', ErrorCode.PLAN_OUT_OF_BOUNDS),
        (f"[cohort.include]\norgan = {[str(n) for n in range(257)]}\n", ErrorCode.PLAN_OUT_OF_BOUNDS),
        ('[cohort.include]\npatient = ["x"]\n', ErrorCode.PLAN_UNKNOWN_KEY),
        ('[cohort.exclude]\nacquired_from = "2015-01-01"\n', ErrorCode.PLAN_UNKNOWN_KEY),
        ('[cohort.include]\nacquired_from = "2015-1-1"\n', ErrorCode.PLAN_IMPOSSIBLE),
        ('[cohort.include]\nacquired_from = "20150101"\n', ErrorCode.PLAN_IMPOSSIBLE),
        ('[cohort.include]\nacquired_from = "2015-W01-1"\n', ErrorCode.PLAN_IMPOSSIBLE),
        ('[cohort.include]\nacquired_until = "2015-02-29"\n', ErrorCode.PLAN_IMPOSSIBLE),
        ("[cohort.include]\nacquired_until = 2015-02-28\n", ErrorCode.PLAN_WRONG_TYPE),
        ('[cohort.include]\nacquired_from = "2016-01-02"\nacquired_until = "2016-01-01"\n', ErrorCode.PLAN_IMPOSSIBLE),
        ('[cohort.include]\norgan = ["Lung"]\n[cohort.exclude]\norgan = [" lung "]\n', ErrorCode.PLAN_IMPOSSIBLE),
        (WEIGHT.replace("2.0", "0.0"), ErrorCode.PLAN_OUT_OF_BOUNDS),
        (WEIGHT.replace("2.0", "-1.0"), ErrorCode.PLAN_OUT_OF_BOUNDS),
        (WEIGHT.replace("2.0", "inf"), ErrorCode.PLAN_OUT_OF_BOUNDS),
        (WEIGHT.replace("2.0", "nan"), ErrorCode.PLAN_OUT_OF_BOUNDS),
        (WEIGHT.replace("2.0", "1e4"), ErrorCode.PLAN_OUT_OF_BOUNDS),
        (WEIGHT.replace("2.0", '"2"'), ErrorCode.PLAN_WRONG_TYPE),
        (WEIGHT.replace('"organ"', '"acquired"'), ErrorCode.PLAN_OUT_OF_BOUNDS),
        (WEIGHT.replace('value = "lung"', ""), ErrorCode.PLAN_WRONG_TYPE),
        (WEIGHT + WEIGHT.replace("lung", "LUNG"), ErrorCode.PLAN_IMPOSSIBLE),
    ],
)
def test_rules_that_cannot_be_used_are_refused_with_their_code(text, code):
    with pytest.raises(PlanError) as caught:
        plan(text)
    assert caught.value.code is code
    assert "cohort" in str(caught.value)


def test_the_contradiction_is_named():
    assert contradiction(CohortInclude(stain=("HE",)), CohortExclude(stain=("ihc", "he"))) == "stain 'he'"
    assert contradiction(CohortInclude(stain=("HE",)), CohortExclude(organ=("he",))) is None


@pytest.mark.parametrize("text", ["Lung", " lung ", "LUNG", "\uff2cung", "lung\t"])
def test_spellings_of_one_value_are_one_value(text):
    assert normal_value(text) == "lung"


@given(st.text())
def test_the_normal_form_of_a_normal_form_of_plain_text_is_itself(text):
    plain = text.encode("ascii", "ignore").decode()
    assert normal_value(normal_value(plain)) == normal_value(plain)
