"""Sampling patients and tiles."""

import itertools
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from pathfed_client.cohort.cohort import Cohort, Patient, Pseudonym, SlideId, SlideTiles, TileRef
from pathfed_client.cohort.sampling import _below, draw_patients, draw_tiles
from pathfed_common.privacy.randomness import KeyedRandom


def random(**context: str | int) -> KeyedRandom:
    return KeyedRandom(bytes(32), context)


def patient(number: int, *tiles_of_slides: int) -> Patient:
    slides = [SlideTiles(SlideId(10 * number + index), count, f"{count:032x}") for index, count in enumerate(tiles_of_slides)]
    return Patient(Pseudonym(f"{number:032x}"), tuple(slides))


COHORT = Cohort.of(patient(number, 2) for number in range(20))


def test_each_patient_is_drawn_with_the_rate_and_independently() -> None:
    draws = np.zeros((2000, 20), bool)
    for index in range(2000):
        drawn = {p.pseudonym for p in draw_patients(COHORT, 0.3, random(step=index))}
        draws[index] = [p.pseudonym in drawn for p in COHORT.patients]
    for of_one in draws.T:
        assert stats.binomtest(int(of_one.sum()), 2000, 0.3).pvalue > 1e-5
    # Independent draws: the number drawn has the binomial's variance, 20 * .3 * .7 = 4.2; a batch of fixed size has none.
    assert draws.sum(1).var() == pytest.approx(4.2, rel=0.15)


def test_a_draw_may_be_empty_and_may_be_everyone() -> None:
    assert draw_patients(COHORT, 0.0, random()) == ()
    assert draw_patients(COHORT, 1.0, random()) == tuple(COHORT.patients)
    assert draw_patients(Cohort.of(()), 0.5, random()) == ()


def test_tiles_are_drawn_across_all_slides_without_repetition() -> None:
    of_two = patient(1, 30, 10)
    slides = []
    for index in range(1000):
        refs = draw_tiles(of_two, 4, random(step=index))
        assert len(set(refs)) == 4
        slides += [ref.slide for ref in refs]
    # Every tile is equally likely, so the slide with 30 of 40 tiles gives three quarters.
    assert np.mean([slide == 10 for slide in slides]) == pytest.approx(0.75, abs=0.03)


def test_a_patient_with_fewer_tiles_gives_all_of_them_once() -> None:
    refs = draw_tiles(patient(1, 2, 1), 8, random())
    assert sorted((ref.slide, ref.tile) for ref in refs) == [(10, 0), (10, 1), (11, 0)]


def test_a_patient_without_tiles_gives_none() -> None:
    assert draw_tiles(patient(1, 0, 0), 4, random()) == ()


def test_no_tile_asked_for_is_refused() -> None:
    with pytest.raises(ValueError, match="tiles must be at least 1, got 0"):
        draw_tiles(patient(1, 2), 0, random())


def weighted(*slides: tuple[int, float]) -> Patient:
    """A patient with slides of (tiles, weight)."""
    plain = patient(1, *(tiles for tiles, _ in slides))
    return Patient(plain.pseudonym, tuple(one._replace(weight=weight) for one, (_, weight) in zip(plain.slides, slides, strict=True)))


def index(ref: TileRef, of: Patient) -> int:
    firsts = np.cumsum([0, *(slide.tiles for slide in of.slides)])
    return int(firsts[ref.slide - 10] + ref.tile)


def law(weights: Sequence[float], k: int) -> dict[tuple[int, ...], float]:
    """Probability of every sequence of k tiles: one after the other, by weight among those left."""
    found = {}
    for sequence in itertools.permutations(range(len(weights)), k):
        left, probability = sum(weights), 1.0
        for tile in sequence:
            probability *= weights[tile] / left
            left -= weights[tile]
        found[sequence] = probability
    return found


def p_value(of: Patient, k: int, expected: dict[tuple[int, ...], float], draws: int = 6000) -> float:
    """How well draws fit the probabilities of all sequences."""
    counts = Counter(tuple(index(ref, of) for ref in draw_tiles(of, k, random(step=step))) for step in range(draws))
    assert set(counts) <= set(expected)
    sequences = sorted(expected)
    return float(stats.chisquare([counts[one] for one in sequences], [draws * expected[one] for one in sequences]).pvalue)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_tiles_are_drawn_by_exactly_the_stated_law_and_by_no_other(k: int) -> None:
    of = weighted((1, 1.0), (3, 0.3), (1, 2.5))
    weights = [1.0, 0.3, 0.3, 0.3, 2.5]
    assert p_value(of, k, law(weights, k)) > 1e-4
    # Both directions: a little more or less weight on one slide, equal weights, and weight by slide instead of by tile are told apart.
    for wrong in ([1.0, 0.4, 0.4, 0.4, 2.5], [1.0, 0.22, 0.22, 0.22, 2.5], [1.0] * 5, [1.0, 0.1, 0.1, 0.1, 2.5]):
        assert p_value(of, k, law(wrong, k)) < 1e-6


def test_tiles_of_one_slide_are_equally_likely_whatever_the_weights() -> None:
    of = weighted((6, 7.0), (4, 0.001))
    firsts = Counter(draw_tiles(of, 1, random(step=step))[0].tile for step in range(3000))
    assert stats.chisquare([firsts[tile] for tile in range(6)]).pvalue > 1e-4


def test_a_common_factor_of_all_weights_changes_nothing_and_equal_weights_draw_as_none() -> None:
    plain, factor = patient(1, 4, 5), weighted((4, 3.7), (5, 3.7))
    assert draw_tiles(plain, 5, random(step=1)) == draw_tiles(factor, 5, random(step=1))
    one, ten = weighted((4, 1.0), (5, 2.0)), weighted((4, 8.0), (5, 16.0))
    assert draw_tiles(one, 5, random(step=1)) == draw_tiles(ten, 5, random(step=1))


@given(
    slides=st.lists(st.tuples(st.integers(0, 12), st.floats(1e-15, 1e15)), min_size=1, max_size=6),
    tiles=st.integers(1, 40),
    step=st.integers(0, 1000),
)
def test_weighted_tiles_are_distinct_and_all_of_them_where_there_are_fewer(slides, tiles, step) -> None:
    of = weighted(*slides)
    refs = draw_tiles(of, tiles, random(step=step))
    assert len(refs) == len({(ref.slide, ref.tile) for ref in refs}) == min(tiles, of.tile_count)
    assert refs == draw_tiles(of, tiles, random(step=step)), "keyed: the same draw again"
    assert draw_tiles(of, max(1, tiles // 2), random(step=step)) == refs[: max(1, tiles // 2)], "a shorter draw is a longer one's beginning"


def test_large_numbers_below_a_bound_are_uniform() -> None:
    bound = 3 * 2**70 + 1
    drawn = [_below(bound, random(step=step)) for step in range(3000)]
    assert all(0 <= number < bound for number in drawn)
    assert stats.kstest([number / bound for number in drawn], "uniform").pvalue > 1e-4
    assert {_below(1, random(step=step)) for step in range(10)} == {0}
    assert {_below(2, random(step=step)) for step in range(40)} == {0, 1}


def test_a_weight_is_part_of_the_cohorts_digest() -> None:
    one, other = (Cohort.of((weighted((2, 1.0), (3, weight)),)) for weight in (1.0, 2.0))
    assert one.digest != other.digest
    assert one.digest == Cohort.of((patient(1, 2, 3),)).digest
    assert [slide.weight for slide in other.patients[0].slides] == [1.0, 2.0]


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_a_cohort_refuses_weights_that_are_no_weights(weight: float) -> None:
    with pytest.raises(ValueError, match="weights"):
        Cohort.of((weighted((2, weight)),))
