"""Who shares a pass: nobody's company changes when another patient leaves, but for one node of the trie."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pathfed_client.training.engines.grouping import groups

KEYS = st.lists(st.integers(0, 2**64 - 1), unique=True, max_size=60)


def as_sets(keys: list[int], most: int) -> set[frozenset[int]]:
    return {frozenset(keys[place] for place in group) for group in groups(keys, most)}


@given(KEYS, st.integers(1, 9))
def test_groups_divide_the_patients_and_are_no_larger_than_asked(keys: list[int], most: int) -> None:
    found = groups(keys, most)
    assert sorted(place for group in found for place in group) == list(range(len(keys)))
    assert all(1 <= len(group) <= most for group in found)


@given(KEYS.filter(bool), st.integers(1, 9), st.data())
def test_a_patient_who_leaves_changes_one_node_alone(keys: list[int], most: int, data: st.DataObject) -> None:
    leaving = data.draw(st.sampled_from(keys))
    before, after = as_sets(keys, most), as_sets([key for key in keys if key != leaving], most)
    gone, new = before - after, after - before
    assert len(gone) <= most + 1
    assert len(new) <= 1
    assert frozenset().union(*gone) - {leaving} == frozenset().union(*new)


def test_groups_filled_in_order_would_not_pass_that_test() -> None:
    keys = [number * 2**58 for number in range(40)]

    def in_order(kept: list[int]) -> set[frozenset[int]]:
        return {frozenset(kept[start : start + 4]) for start in range(0, len(kept), 4)}

    assert len(in_order(keys) - in_order(keys[1:])) == 10
    assert len(as_sets(keys, 4) - as_sets(keys[1:], 4)) <= 5


@given(KEYS, st.integers(1, 9), st.randoms())
def test_the_order_in_which_patients_come_does_not_matter(keys: list[int], most: int, random) -> None:
    shuffled = random.sample(keys, len(keys))
    assert as_sets(keys, most) == as_sets(shuffled, most)


def test_groups_are_not_mostly_alone() -> None:
    import random

    drawn = random.Random(1)
    found = groups([drawn.getrandbits(64) for _ in range(2000)], 8)
    assert 2000 / len(found) > 4


def test_equal_keys_are_taken_alone_and_wrong_arguments_refused() -> None:
    assert groups([5, 5, 5], 2) == [[0], [1], [2]]
    assert groups([], 3) == []
    with pytest.raises(ValueError, match="most must be at least 1"):
        groups([1], 0)
    with pytest.raises(ValueError, match="within 0 and"):
        groups([2**64], 1)
