"""Which slides a plan's rules leave, and with which weight."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pathfed_client.cohort.rules import outside, tile_weight
from pathfed_common.cohort_rules import ATTRIBUTES, CohortExclude, CohortInclude, TileWeight
from pathfed_common.plan import CohortPlan


def including(**rules) -> CohortPlan:
    return CohortPlan(include=CohortInclude(**rules))


def excluding(**rules) -> CohortPlan:
    return CohortPlan(exclude=CohortExclude(**rules))


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_an_included_value_is_in_and_any_other_or_none_is_out(name):
    plan = including(**{name: (" A ", "B")})
    assert outside(plan, {name: "a"}) is None
    assert outside(plan, {name: "b", "acquired": "2020-01-01"}) is None
    assert outside(plan, {name: "c"}) == name
    assert outside(plan, {}) == name


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_an_excluded_value_or_none_is_out_and_any_other_is_in(name):
    plan = excluding(**{name: (" A ", "B")})
    assert outside(plan, {name: "a"}) == name
    assert outside(plan, {name: "c"}) is None
    assert outside(plan, {}) == name


def test_rules_about_several_attributes_must_all_hold():
    plan = CohortPlan(include=CohortInclude(organ=("lung",), scanner=("s1",)), exclude=CohortExclude(stain=("ihc",)))
    inside = {"organ": "lung", "scanner": "s1", "stain": "he"}
    assert outside(plan, inside) is None
    for name, value in (("organ", "liver"), ("scanner", "s2"), ("stain", "ihc")):
        assert outside(plan, {**inside, name: value}) == name


@pytest.mark.parametrize(
    ("first", "last", "day", "is_in"),
    [
        ("2015-01-01", "", "2015-01-01", True),
        ("2015-01-01", "", "2014-12-31", False),
        ("", "2015-01-01", "2015-01-01", True),
        ("", "2015-01-01", "2015-01-02", False),
        ("2015-01-01", "2015-01-01", "2015-01-01", True),
        ("2015-01-01", "2016-01-01", None, False),
        ("", "", None, True),
    ],
)
def test_days_are_within_both_ends(first, last, day, is_in):
    attributes = {} if day is None else {"acquired": day}
    assert (outside(including(acquired_from=first, acquired_until=last), attributes) is None) == is_in


@given(st.dictionaries(st.sampled_from([*ATTRIBUTES, "acquired", "mpp"]), st.text(min_size=1)))
def test_without_rules_every_slide_is_in_with_weight_one(attributes):
    assert outside(CohortPlan(), attributes) is None
    assert tile_weight(CohortPlan(), attributes) == 1.0


def weights(*rules: tuple[str, str, float]) -> CohortPlan:
    return CohortPlan(tile_weights=tuple(TileWeight.model_validate({"attribute": a, "value": v, "weight": w}) for a, v, w in rules))


def test_weights_of_all_rules_that_fit_multiply():
    plan = weights(("organ", "Lung", 4.0), ("stain", "IHC", 0.5), ("organ", "liver", 3.0))
    assert tile_weight(plan, {"organ": "lung", "stain": "ihc"}) == 2.0
    assert tile_weight(plan, {"organ": "lung"}) == 4.0
    assert tile_weight(plan, {"organ": "liver", "stain": "he"}) == 3.0
    assert tile_weight(plan, {"stain": "lung"}) == 1.0
    assert tile_weight(plan, {}) == 1.0


@pytest.mark.parametrize("weight", [1e-3, 1e3])
def test_the_largest_and_smallest_products_are_still_weights(weight):
    plan = weights(*((name, "x", weight) for name in ATTRIBUTES))
    product = tile_weight(plan, dict.fromkeys(ATTRIBUTES, "x"))
    assert 0 < product < math.inf
    assert product == pytest.approx(weight**5)
