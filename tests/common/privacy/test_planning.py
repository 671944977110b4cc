"""Planning: what meets a target really does, its neighbour does not, and what cannot be met is refused."""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pathfed_common.errors import ErrorCode, PrivacyError
from pathfed_common.privacy import planning
from pathfed_common.privacy.accounting import epsilon, multi_site_epsilon
from pathfed_common.privacy.planning import (
    NOISE_BOUNDS,
    Answer,
    Cost,
    epsilon_by_round,
    fewest_patients,
    least_noise,
    most_expected_patients,
    most_rounds,
)

#: Cheap to account for: the losses are small.
COST = Cost(expected_patients=64, patients=4000, noise_multiplier=4.0, rounds=100, steps=2, sites=1, delta=1e-6)


def test_epsilon_is_the_accountants_for_one_site_and_several() -> None:
    assert COST.epsilon == epsilon(sampling_rate=0.016, noise_multiplier=4.0, steps=200, delta=1e-6)
    assert replace(COST, sites=3).epsilon == multi_site_epsilon(COST.event, sites=3, delta=1e-6)


def test_epsilon_by_round_grows_to_that_of_the_whole_run() -> None:
    values = epsilon_by_round(COST, [1, 10, 50, 100])
    assert values == sorted(values)
    assert values[-1] == COST.epsilon
    assert epsilon_by_round(replace(COST, sites=2), [50])[0] == COST.epsilon


Question = tuple[Callable[[Cost, float], Answer], str, Callable[[float], float]]
QUESTIONS: list[Question] = [
    (least_noise, "noise_multiplier", lambda value: value - 10.0 ** (math.floor(math.log10(value)) - 3)),
    (most_expected_patients, "expected_patients", lambda value: value + 1),
    (most_rounds, "rounds", lambda value: int(value) + 1),
    (fewest_patients, "patients", lambda value: int(value) - 1),
]


@pytest.mark.parametrize("target", [0.2, 0.9])
@pytest.mark.parametrize("sites", [1, 2])
@pytest.mark.parametrize(("question", "name", "worse"), QUESTIONS, ids=lambda value: value if isinstance(value, str) else "")
def test_the_answer_meets_the_target_and_the_next_worse_one_does_not(question, name: str, worse, sites: int, target: float) -> None:
    cost = replace(COST, sites=sites)
    found = question(cost, target)
    kind = type(getattr(cost, name))
    assert replace(cost, **{name: kind(found.value)}).epsilon == found.epsilon <= target
    assert replace(cost, **{name: kind(worse(found.value))}).epsilon > target


def test_where_the_search_begins_does_not_change_the_answer() -> None:
    starts = [least_noise(replace(COST, noise_multiplier=noise), 0.5) for noise in (3.0, 50.0, 900.0)]
    assert len(set(starts)) == 1
    assert len({most_rounds(replace(COST, rounds=rounds), 0.5) for rounds in (1, 100, 5000)}) == 1


@pytest.mark.parametrize(
    ("question", "changes", "target"),
    [
        (least_noise, {"rounds": 1_000_000, "expected_patients": 4000}, 0.05),
        (most_expected_patients, {"noise_multiplier": 1.0}, 1e-4),
        (most_rounds, {"noise_multiplier": 1.0}, 1e-4),
    ],
)
def test_a_target_out_of_reach_is_refused(question: Callable[[Cost, float], Answer], changes: dict[str, float], target: float) -> None:
    with pytest.raises(PrivacyError, match=f"epsilon {target:g}") as caught:
        question(replace(COST, **changes), target)  # type: ignore[arg-type]
    assert caught.value.code is ErrorCode.TARGET_OUT_OF_REACH


@pytest.mark.parametrize("target", [0.0, -1.0, math.nan, math.inf])
def test_a_target_that_is_none_is_refused(target: float) -> None:
    with pytest.raises(ValueError, match="target must be"):
        most_rounds(COST, target)


def test_bounds_are_kept_where_everything_within_them_meets_the_target() -> None:
    generous = replace(COST, noise_multiplier=500.0, rounds=1, steps=1)
    assert most_expected_patients(generous, 1.0).value == 4000
    assert fewest_patients(generous, 1.0).value == 64
    assert least_noise(replace(generous, noise_multiplier=0.3), 50.0).value == NOISE_BOUNDS[0]


def test_the_grid_of_sigma_has_four_digits_and_no_gap() -> None:
    low, high = (planning._noise_index(noise) for noise in NOISE_BOUNDS)
    values = [planning._noise(index) for index in range(low, high + 1)]
    assert (values[0], values[-1]) == NOISE_BOUNDS
    assert values == sorted(set(values))
    assert all(later / earlier <= 1.001 + 1e-12 for earlier, later in itertools.pairwise(values))


@given(st.floats(0.2, 1e4))
def test_a_sigma_is_rounded_up_by_less_than_a_thousandth(noise: float) -> None:
    index = planning._noise_index(noise)
    assert planning._noise(index - 1) < noise <= planning._noise(index)


@settings(max_examples=200)
@given(st.integers(-500, 500), st.integers(-400, 400), st.integers(1, 300), st.floats(0.1, 3.0))
def test_the_search_finds_the_last_number_within_the_target_of_any_growing_cost(edge: int, first: int, stride: int, bend: float) -> None:
    """With a made-up cost whose answer is known: epsilon at the edge is the target, and beyond it is more."""

    class Made:
        def __init__(self, index: int) -> None:
            self.epsilon = math.exp(bend * (index - edge) / 100)
            self.event, self.delta = None, None

    with patch.object(planning, "lower_bound", lambda *_: 0.0):
        found = planning._largest(Made, 1.0, first=first, least=-450, most=450, stride=stride)  # type: ignore[arg-type]
    assert found == (None if edge < -450 else min(edge, 450))
