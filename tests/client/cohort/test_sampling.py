"""Sampling patients and tiles."""

import numpy as np
import pytest
from scipy import stats

from pathfed_client.cohort.cohort import Cohort, Patient, Pseudonym, SlideId, SlideTiles
from pathfed_client.cohort.sampling import draw_patients, draw_tiles
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
