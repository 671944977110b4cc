import pytest
from hypothesis import given
from hypothesis import strategies as st

from pathfed_server.transport import limits
from pathfed_server.transport.limits import RateLimit


def test_a_burst_passes_and_then_as_many_as_the_rate_allows():
    now = 0.0
    limit = RateLimit(per_second=2, burst=3, monotonic=lambda: now)
    assert [limit.allows("a") for _ in range(5)] == [True, True, True, False, False]
    assert limit.allows("b"), "each caller has a bucket of its own"
    now = 0.6
    assert [limit.allows("a") for _ in range(2)] == [True, False]
    now = 100.0
    assert [limit.allows("a") for _ in range(4)] == [True, True, True, False]


@given(st.lists(st.floats(0, 3), max_size=60))
def test_over_any_time_no_more_than_burst_and_rate_pass(gaps):
    now = passed = 0.0
    limit = RateLimit(per_second=2, burst=3, monotonic=lambda: now)
    for gap in gaps:
        now += gap
        passed += limit.allows("a")
    assert passed <= 3 + 2 * now + 1e-6


def test_callers_without_end_take_no_memory_without_end(monkeypatch):
    monkeypatch.setattr(limits, "_MOST_CALLERS", 10)
    limit = RateLimit(per_second=1, burst=1, monotonic=lambda: 0.0)
    assert all(limit.allows(str(caller)) for caller in range(100))
    assert len(limit._buckets) == 10
    assert not limit.allows("99")


@pytest.mark.parametrize("settings", [{"per_second": 0, "burst": 1}, {"per_second": 1, "burst": 0}, {"per_second": -1, "burst": 5}])
def test_a_limit_that_lets_nobody_call_is_a_mistake(settings):
    with pytest.raises(ValueError, match="per_second"):
        RateLimit(**settings)
