import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pathfed_client.slides.tile_map import DamagedMapError, from_bytes, make_map, to_bytes
from pathfed_client.slides.tiling import TileGrid


def a_grid(columns: int, rows: int, **changes) -> TileGrid:
    values = {"level": 1, "downsample": 4.0005, "width": columns * 240 + 7, "height": rows * 240 + 3, "step": 240, "crop": 224, "reduce": 2}
    return TileGrid(**{**values, "tile_px": 112, "direct": True, **changes})


@settings(max_examples=100, deadline=None)
@given(columns=st.integers(1, 70), rows=st.integers(1, 40), seed=st.integers(0, 2**32 - 1), share=st.floats(0, 1))
def test_the_nth_tile_is_the_nth_true_cell_before_and_after_the_bytes(columns, rows, seed, share):
    cells = np.random.default_rng(seed).random((rows, columns)) < share
    tiles = from_bytes(to_bytes(make_map(a_grid(columns, rows), cells)))
    expected = [(int(column), int(row)) for row, column in zip(*np.nonzero(cells), strict=True)]
    assert len(tiles) == len(expected)
    assert [tiles.cell(index) for index in range(len(tiles))] == expected
    np.testing.assert_array_equal(tiles.cells(), cells)
    assert tiles.grid == a_grid(columns, rows)
    for index in (-1, len(tiles)):
        with pytest.raises(IndexError, match="asked for number"):
            tiles.cell(index)


def test_corners_are_in_level_0_pixels_and_in_the_order_of_tiles():
    cells = np.zeros((3, 5), bool)
    cells[0, 1] = cells[2, 4] = True
    assert make_map(a_grid(5, 3), cells).corners().tolist() == [[960, 0], [3840, 1920]]


def test_a_tile_costs_less_than_a_byte():
    """A slide of 100,000 x 80,000 px at 0.25 um/px, a third of it tissue: the issue asks for at most 8 bytes a tile."""
    cells = np.zeros((156, 195), bool)
    cells[50:106, 40:140] = True
    tiles = make_map(a_grid(195, 156), cells)
    assert len(to_bytes(tiles)) / len(tiles) < 1


def test_every_changed_byte_is_noticed():
    data = to_bytes(make_map(a_grid(9, 4), np.ones((4, 9), bool)))
    for place in range(len(data)):
        changed = bytearray(data)
        changed[place] ^= 0x10
        with pytest.raises(DamagedMapError):
            from_bytes(bytes(changed))
    for end in range(len(data)):
        with pytest.raises(DamagedMapError):
            from_bytes(data[:end])


def test_cells_of_another_shape_are_refused():
    with pytest.raises(ValueError, match="cells must be"):
        make_map(a_grid(5, 3), np.ones((5, 3), bool))
