import numpy as np
import pytest

from pathfed_common import synthetic
from pathfed_common.synthetic import draw_anatomy, draw_stain, paint, synthetic_tiles


def test_equal_seeds_give_equal_tiles_and_others_do_not():
    first = synthetic_tiles(3, 96, seed=7)
    assert first.shape == (3, 96, 96, 3)
    assert first.dtype == np.uint8
    np.testing.assert_array_equal(first, synthetic_tiles(3, 96, seed=7))
    assert np.mean(first != synthetic_tiles(3, 96, seed=8)) > 0.5
    assert np.mean(first[0] != first[1]) > 0.5


def test_a_tile_does_not_depend_on_how_many_are_asked_for():
    np.testing.assert_array_equal(synthetic_tiles(1, 64, seed=3)[0], synthetic_tiles(4, 64, seed=3)[0])


def test_no_tiles_are_an_empty_array():
    assert synthetic_tiles(0, 64, seed=0).shape == (0, 64, 64, 3)


@pytest.mark.parametrize(("count", "px"), [(-1, 64), (1, 0)])
def test_impossible_sizes_are_refused(count, px):
    with pytest.raises(ValueError, match=f"got {count} and {px}"):
        synthetic_tiles(count, px, seed=0)


def test_tiles_look_stained():
    tiles = synthetic_tiles(12, 112, seed=0).reshape(12, -1, 3).astype(float)
    red, green, blue = tiles.mean(axis=1).T
    assert np.all(green < red)
    assert np.all(green < blue)
    assert np.all(tiles.std(axis=1).mean(axis=1) > 12)
    dark_share = (tiles.max(axis=2) < 150).mean()
    assert 0.01 < dark_share < 0.5, "nuclei"


def test_slide_is_tissue_on_glass():
    random = np.random.default_rng(1)
    stain = draw_stain(random, 0)
    picture = paint(640, 512, random, stain, draw_anatomy(random))
    assert picture.shape == (512, 640, 3)
    edge = np.concatenate([picture[:8].reshape(-1, 3), picture[:, :8].reshape(-1, 3)]).astype(float)
    assert np.abs(edge.mean(axis=0) - stain.light).max() < 6
    assert 0 < edge.std(axis=0).min() < 8
    stained = (picture.max(axis=2).astype(int) - picture.min(axis=2) > 40).mean()
    assert 0.2 < stained < 0.85


@pytest.mark.parametrize("size", [(1, 1), (17, 900), (2100, 40)])
def test_any_size_can_be_painted(size: tuple[int, int]) -> None:
    random = np.random.default_rng(0)
    picture = paint(size[0], size[1], random, draw_stain(random, 1), draw_anatomy(random))
    assert picture.shape == (size[1], size[0], 3)


def test_laboratories_differ_in_tone():
    means = []
    for laboratory in range(len(synthetic.STAINS)):
        random = np.random.default_rng(5)
        picture = paint(256, 256, random, draw_stain(random, laboratory), draw_anatomy(random), glass=False)
        means.append(picture.reshape(-1, 3).mean(axis=0))
    distances = [np.abs(a - b).max() for i, a in enumerate(means) for b in means[:i]]
    assert min(distances) > 5
