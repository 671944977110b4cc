from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from pathfed_common import digest
from pathfed_common.ids import RunName, SiteName
from pathfed_common.turns import whose_turn

PLAN, RUN = digest.of_bytes(b"plan"), RunName("run-1")
SITES = st.sets(st.sampled_from([SiteName(f"site-{number}") for number in range(12)]), max_size=12)


@given(SITES, st.integers(1, 12), st.integers(1, 40))
def test_every_site_is_asked_equally_often_to_within_one_round(sites, at_most, rounds):
    asked = Counter(site for index in range(1, rounds + 1) for site in whose_turn(PLAN, RUN, index, sites, at_most))
    times = [asked[site] for site in sites]
    assert not times or max(times) - min(times) <= 1
    assert sum(times) == rounds * min(at_most, len(sites))


@given(SITES, st.integers(1, 10**6))
def test_zero_asks_all(sites, index):
    assert whose_turn(PLAN, RUN, index, sites, 0) == sites


@given(SITES, st.integers(1, 12), st.integers(1, 10**6))
def test_the_order_in_which_sites_are_named_makes_no_difference(sites, at_most, index):
    assert whose_turn(PLAN, RUN, index, sorted(sites), at_most) == whose_turn(PLAN, RUN, index, sorted(sites, reverse=True), at_most)


def test_the_rule_is_what_it_was_when_records_were_made():
    """Records of runs that are over are checked by it: a change of the rule would refuse them."""
    sites = [SiteName(name) for name in ("a-hospital", "b-hospital", "c-hospital", "d-hospital")]
    assert [sorted(whose_turn(PLAN, RUN, index, sites, 2)) for index in (1, 2, 3)] == PINNED


PINNED = [["a-hospital", "b-hospital"], ["c-hospital", "d-hospital"], ["a-hospital", "b-hospital"]]
