import math
from itertools import pairwise

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from pathfed_server.report.axes import Scale, label, nice_ticks, round_ticks

BOUND = st.floats(min_value=-1e9, max_value=1e9, allow_nan=False, allow_infinity=False)


@given(BOUND, BOUND)
@example(5e-324, 5e-324)
@example(0.0, 0.0)
@example(-1e9, -1e9)
def test_ticks_cover_the_values_are_even_and_few(one, other):
    low, high = sorted((one, other))
    assume(low == high or high - low > 1e-6 * max(1, abs(low), abs(high)))  # finer than any figure we draw
    ticks = nice_ticks(low, high)
    step = ticks[1] - ticks[0]
    assert ticks[0] <= low + 1e-6 * step
    assert ticks[-1] >= high - 1e-6 * step
    assert 2 <= len(ticks) <= 9
    assert all(math.isclose(later - earlier, step, rel_tol=1e-3, abs_tol=1e-9) for earlier, later in pairwise(ticks))


@pytest.mark.parametrize(
    ("low", "high"),
    [(5e-324, 5e-324), (0.0, 5e-324), (-5e-324, 5e-324), (1.0, 1.0 + 2**-52), (-3.0, -3.0), (1e9, 1e9 + 1e-7), (0.0, 1e-299)],
)
def test_values_that_a_drawing_cannot_tell_apart_get_an_axis_that_holds_them(low, high):
    ticks = nice_ticks(low, high)
    assert ticks[0] <= low <= high <= ticks[-1]
    assert ticks == sorted(set(ticks))
    assert 2 <= len(ticks) <= 9


@pytest.mark.parametrize(("low", "high"), [(math.nan, 1.0), (0.0, math.inf), (2.0, 1.0)])
def test_axis_without_finite_order_is_refused(low, high):
    with pytest.raises(ValueError, match="finite low <= high"):
        nice_ticks(low, high)


def test_ticks_are_round_numbers():
    assert nice_ticks(0, 12) == [0, 5, 10, 15]
    assert nice_ticks(0.31, 0.78) == [0.3, 0.4, 0.5, 0.6, 0.7, 0.8]


def test_labels_have_the_decimals_of_their_step():
    assert [label(value, 0.05) for value in (0.1, 0.15)] == ["0.10", "0.15"]
    assert label(12000.0, 500.0) == "12,000"


@given(st.integers(1, 10_000), st.integers(0, 10_000), st.integers(3, 20))
def test_round_labels_are_few_ordered_and_start_at_the_first(first, more, most):
    ticks = round_ticks(first, first + more, most)
    assert len(ticks) <= most + 1
    assert ticks == sorted(set(ticks))
    assert all(first <= tick <= first + more for tick in ticks)
    assert ticks


def test_scale_maps_ends_to_ends():
    scale = Scale(0, 10, 200, 20)
    assert (scale(0), scale(10), scale(5)) == (200, 20, 110)
