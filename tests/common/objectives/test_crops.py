"""Crops: boxes inside the tile with the stated laws, cut exactly where they say."""

import numpy as np
import pytest
import torch

from pathfed_common.objectives import crops

COUNT = 20_000


def boxes(
    scale: crops.Range = (0.1, 0.5), aspect: float = 4 / 3, count: int = COUNT
) -> "np.ndarray[tuple[int, ...], np.dtype[np.float64]]":
    return crops.boxes(np.random.default_rng(1).random(count * crops.BOX_NUMBERS), scale=scale, aspect=aspect)


@pytest.mark.parametrize(("scale", "aspect"), [((0.1, 0.5), 4 / 3), ((0.9, 1.0), 2.0), ((1.0, 1.0), 1.0), ((0.05, 0.05), 1.0)])
def test_boxes_lie_inside_the_tile(scale: crops.Range, aspect: float) -> None:
    x, y, width, height = boxes(scale, aspect).T
    assert (np.abs(x) + np.abs(width)).max() <= 1 + 1e-12
    assert (np.abs(y) + np.abs(height)).max() <= 1 + 1e-12


def test_areas_shapes_places_and_mirrors_have_their_laws() -> None:
    x, _, width, height = boxes().T
    area, ratio = np.abs(width * height), np.abs(width / height)
    tolerance = 5 / np.sqrt(COUNT)
    assert (area.min(), area.max()) == (pytest.approx(0.1, abs=1e-3), pytest.approx(0.5, abs=1e-3))
    assert area.mean() == pytest.approx(0.3, abs=tolerance * 0.4 / np.sqrt(12))
    assert np.log(ratio).mean() == pytest.approx(0, abs=tolerance)
    assert (ratio.min(), ratio.max()) == (pytest.approx(3 / 4, abs=1e-3), pytest.approx(4 / 3, abs=1e-3))
    place = x / (1 - np.abs(width))
    assert (place.mean(), place.var()) == (pytest.approx(0, abs=tolerance), pytest.approx(1 / 3, abs=tolerance))
    for side in (width, height):
        assert (side < 0).mean() == pytest.approx(0.5, abs=tolerance / 2)


def test_the_whole_tile_comes_out_unchanged_and_mirrored_as_told() -> None:
    tiles = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    told = torch.tensor([[0.0, 0, 1, 1], [0, 0, -1, 1], [0, 0, 1, -1]]).expand(2, 3, 4)
    cut = crops.cut(tiles, told, 8)
    assert cut.shape == (2, 3, 3, 8, 8)
    for view, expected in enumerate((tiles, tiles.flip(3), tiles.flip(2))):
        torch.testing.assert_close(cut[:, view], expected)


def test_a_box_at_whole_pixels_is_that_part_of_its_own_tile() -> None:
    tiles = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    # Columns 2 to 5 and rows 4 to 7 of the first, the upper left quarter of the second.
    told = torch.tensor([[[-0.0, 0.5, 0.5, 0.5]], [[-0.5, -0.5, 0.5, 0.5]]])
    cut = crops.cut(tiles, told, 4)
    torch.testing.assert_close(cut[0, 0], tiles[0, :, 4:8, 2:6])
    torch.testing.assert_close(cut[1, 0], tiles[1, :, :4, :4])


def test_colours_scale_and_shift_each_channel_within_the_jitter() -> None:
    colours = crops.colours(np.random.default_rng(3).random(6 * 5000), jitter=0.2)
    factors, offsets = colours[:, 0], colours[:, 1]
    assert np.abs(factors - 1).max() <= 0.2 < np.abs(factors - 1).max() + 0.01
    assert np.abs(offsets).max() <= 0.2 < np.abs(offsets).max() + 0.01
    made = crops.recolour(torch.ones(1, 1, 3, 2, 2), torch.tensor([[[[1.0, 2, 3], [0, 0.5, -1]]]]))
    assert made[0, 0, :, 0, 0].tolist() == [1.0, 2.5, 2.0]
