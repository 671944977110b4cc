import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from thumbnails import thumbnail

from pathfed_client.slides.masks import box_mean, majority, near, optical_density, sampled, wide_mean


def test_density_of_glass_is_nothing_whatever_its_tone():
    for tone in ((243, 242, 244), (238, 230, 205), (205, 203, 207)):
        assert optical_density(thumbnail(np.full((20, 20, 3), tone))).max() == 0


def test_density_is_logarithmic_and_counts_layers():
    pixels = np.full((20, 40, 3), 240.0)
    pixels[:, 10:20], pixels[:, 20:30] = 120, 60
    density = optical_density(thumbnail(pixels))
    assert density.dtype == np.float32
    assert density[10, 15, 0] == pytest.approx(np.log10(241 / 121), abs=1e-5)
    assert density[10, 25, 0] == pytest.approx(np.log10(241 / 61), abs=1e-5)


def test_white_fill_is_not_taken_for_glass():
    pixels = np.full((40, 40, 3), 255.0)
    pixels[:10] = 238
    assert optical_density(thumbnail(pixels))[:9].max() < 0.01


def test_a_slide_without_data_has_a_density_all_the_same():
    assert np.isfinite(optical_density(thumbnail(np.full((5, 5, 3), 255), np.zeros((5, 5), bool)))).all()


@settings(max_examples=30, deadline=None)
@given(radius=st.integers(1, 4), rows=st.integers(1, 12), columns=st.integers(1, 12), seed=st.integers(0, 99))
def test_box_mean_is_the_mean_of_the_square(radius, rows, columns, seed):
    values = np.random.default_rng(seed).random((rows, columns)).astype(np.float32)
    padded = np.pad(values, radius, mode="edge")
    size = 2 * radius + 1
    slow = [[padded[y : y + size, x : x + size].mean() for x in range(columns)] for y in range(rows)]
    np.testing.assert_allclose(box_mean(values, radius), slow, rtol=1e-4)


def test_wide_mean_is_near_the_true_one_and_keeps_a_constant():
    values = np.random.default_rng(0).random((83, 57)).astype(np.float32)
    apart = np.abs(wide_mean(values, 15) - box_mean(values, 15))
    assert apart[20:-20, 20:-20].max() < 0.05
    np.testing.assert_allclose(wide_mean(np.full((7, 3), 0.25, np.float32), 25), 0.25, rtol=1e-6)


def test_majority_drops_specks_and_near_spreads():
    mask = np.zeros((9, 9), bool)
    mask[4, 4] = True
    assert not majority(mask, 1).any()
    assert near(mask, 2).sum() == 25


def test_a_sample_is_spread_over_all_values():
    values = np.arange(3_500_000)
    some = sampled(values)
    assert len(some) <= 1_200_000
    assert some[-1] > 3_400_000
    np.testing.assert_array_equal(sampled(values[:10]), values[:10])
