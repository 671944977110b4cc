"""Masks: as many places for every tile, distinct, in blocks, and as many of them masked as the law says."""

import numpy as np
import pytest
from numpy.typing import NDArray

from pathfed_common.objectives import masking


def drawn(grid: int, least: int, most: int, tiles: int = 2000) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    return masking.draw(np.random.default_rng(1).random(tiles * masking.numbers(grid)), grid=grid, least=least, most=most)


@pytest.mark.parametrize(("grid", "least", "most"), [(14, 19, 98), (4, 1, 8), (2, 1, 3), (2, 2, 2)])
def test_places_are_distinct_patches_and_the_count_is_within_bounds(grid: int, least: int, most: int) -> None:
    places, masked = drawn(grid, least, most)
    assert places.shape == (2000, most)
    assert (places.min(), places.max()) == (0, grid**2 - 1)
    assert all(len(set(row)) == most for row in places.tolist())
    assert (masked.min(), masked.max()) == (least, most)
    assert masked.mean() == pytest.approx((least + most) / 2, abs=5 * (most - least + 1) / np.sqrt(12 * 2000))


def test_masks_come_in_blocks() -> None:
    """Two neighbours are both masked much more often than they would be at independent places."""
    grid = 14
    places, masked = drawn(grid, 40, 40)
    mask = np.zeros((len(places), grid * grid), bool)
    np.put_along_axis(mask, places[:, :40], values=True, axis=1)
    square = mask.reshape(-1, grid, grid)
    both = (square[:, :, 1:] & square[:, :, :-1]).mean()
    assert both > 2 * (40 / 196) ** 2
    assert (masked == 40).all()


def test_every_patch_is_masked_now_and_then() -> None:
    places, _ = drawn(14, 40, 40)
    shares = np.bincount(places.ravel(), minlength=196) / 2000
    assert shares.min() > 0.005
    assert shares.max() < 0.5


def test_counts_are_whole_patches_at_least_one_and_never_all() -> None:
    assert masking.counts(196, (0.1, 0.5)) == (19, 98)
    assert masking.counts(4, (0.0, 0.5)) == (1, 2)
    for patches, most in ((1, 0.9), (4, 0.2), (4, 1.0)):
        with pytest.raises(ValueError, match=f"some but not all of {patches} patches"):
            masking.counts(patches, (0.0, most))
