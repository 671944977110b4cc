import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pathfed_client.slides.tiling import TileGrid, fits, scan_key, tile_corners, tile_grid
from pathfed_common.plan import CohortPlan

PLAN = CohortPlan()


@pytest.mark.parametrize(
    ("slide_mpp", "downsamples", "expected"),
    [
        (0.5, (1,), TileGrid(side=224, level=0, level_px=224)),
        (0.499, (1, 2.0005), TileGrid(side=224, level=0, level_px=224)),
        (0.25, (1, 2, 4), TileGrid(side=448, level=1, level_px=224)),
        (0.25, (1, 4, 16), TileGrid(side=448, level=0, level_px=448)),
        (0.2282, (1, 2, 4, 8), TileGrid(side=491, level=1, level_px=246)),
        (0.27, (1, 2, 4), TileGrid(side=415, level=1, level_px=208)),  # level 1 is 0.54 um/px: within the tolerance
        (0.28, (1, 2, 4), TileGrid(side=400, level=0, level_px=400)),  # 0.56 is not
        (0.54, (1, 2), TileGrid(side=207, level=0, level_px=207)),
        (0.125, (1, 2, 4, 8), TileGrid(side=896, level=2, level_px=224)),
    ],
)
def test_level_is_the_coarsest_that_needs_no_upsampling_beyond_tolerance(slide_mpp, downsamples, expected):
    assert tile_grid(slide_mpp=slide_mpp, downsamples=downsamples, plan=PLAN) == expected


def test_slide_coarser_than_the_tolerance_does_not_fit():
    assert fits(slide_mpp=0.55, plan=PLAN)
    assert not fits(slide_mpp=0.56, plan=PLAN)
    assert not fits(slide_mpp=float("nan"), plan=PLAN)
    with pytest.raises(ValueError, match=r"at most 0.55 um/px, got 0.56"):
        tile_grid(slide_mpp=0.56, downsamples=(1,), plan=PLAN)


@pytest.mark.parametrize(("slide_mpp", "downsamples"), [(0, (1,)), (-1, (1,)), (0.5, ())])
def test_impossible_slides_are_refused(slide_mpp, downsamples):
    with pytest.raises(ValueError, match="must be positive"):
        tile_grid(slide_mpp=slide_mpp, downsamples=downsamples, plan=PLAN)


def test_scan_key_names_the_rules_that_shape_tiles_and_no_others():
    key = scan_key(PLAN)
    assert key == scan_key(CohortPlan(tiles_per_patient=9))
    others = [CohortPlan(mpp=0.25), CohortPlan(mpp_tolerance=0.2), CohortPlan(tile_px=256), CohortPlan(tissue_share=0.5)]
    assert len({key, *map(scan_key, others)}) == 5


@pytest.mark.parametrize(
    ("width", "height", "side", "expected"), [(448, 224, 224, 2), (447, 224, 224, 1), (223, 500, 224, 0), (700, 700, 224, 9), (1, 1, 1, 1)]
)
def test_full_tissue_gives_every_whole_tile(width, height, side, expected):
    mask = np.ones((-(-height // 16), -(-width // 16)), bool)
    assert len(tile_corners(mask, cell=16, width=width, height=height, side=side, tissue_share=1)) == expected


def test_corners_run_in_rows_from_the_top():
    corners = tile_corners(np.ones((4, 6), bool), cell=10, width=60, height=40, side=20, tissue_share=1)
    assert corners.tolist() == [[0, 0], [20, 0], [40, 0], [0, 20], [20, 20], [40, 20]]
    assert corners.dtype == np.int32


@pytest.mark.parametrize(("share", "expected"), [(0.0, 1), (0.25, 1), (0.26, 0)])
def test_share_is_reached_exactly_at_its_bound(share, expected):
    mask = np.zeros((4, 4), bool)
    mask[:2, :2] = True
    assert len(tile_corners(mask, cell=1, width=4, height=4, side=4, tissue_share=share)) == expected


def test_a_tile_without_any_tissue_never_counts():
    assert len(tile_corners(np.zeros((4, 4), bool), cell=1, width=4, height=4, side=2, tissue_share=0)) == 0


@pytest.mark.parametrize("change", [{"cell": 0}, {"width": 0}, {"side": 0}, {"mask": np.zeros((0, 4), bool)}, {"mask": np.zeros(4, bool)}])
def test_impossible_grids_are_refused(change):
    arguments = {"mask": np.ones((4, 4), bool), "cell": 1, "width": 4, "height": 4, "side": 2, "tissue_share": 0.5} | change
    with pytest.raises(ValueError, match="mask must be"):
        tile_corners(arguments.pop("mask"), **arguments)


@settings(max_examples=120, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    cell=st.integers(1, 7),
    width=st.integers(1, 90),
    height=st.integers(1, 90),
    side=st.integers(1, 40),
    share=st.floats(0, 1),
)
def test_tiles_lie_inside_apart_and_hold_the_tissue_they_should(seed, cell, width, height, side, share):
    shape = (-(-height // cell), -(-width // cell))
    mask = np.random.default_rng(seed).random(shape) < 0.5
    corners = tile_corners(mask, cell=cell, width=width, height=height, side=side, tissue_share=share)
    full = np.repeat(np.repeat(mask, cell, 0), cell, 1)[:height, :width]  # the same tissue, pixel by pixel
    chosen = {(int(x), int(y)) for x, y in corners}
    assert len(chosen) == len(corners)
    for y in range(0, height - side + 1, side):
        for x in range(0, width - side + 1, side):
            tissue = full[y : y + side, x : x + side].mean()
            if abs(tissue - share) > 1e-6:
                assert ((x, y) in chosen) == (tissue > share), (x, y, tissue)
            chosen.discard((x, y))
    assert not chosen, "corners off the grid"


@settings(max_examples=60, deadline=None)
@given(
    slide_mpp=st.floats(0.1, 0.55),
    factors=st.lists(st.floats(1.2, 4), max_size=5),
    tile_px=st.sampled_from([32, 224, 256, 512]),
)
def test_a_tile_covers_what_the_plan_says_and_is_read_no_coarser(slide_mpp, factors, tile_px):
    plan = CohortPlan(tile_px=tile_px)
    downsamples = np.cumprod([1.0, *factors]).tolist()
    grid = tile_grid(slide_mpp=slide_mpp, downsamples=downsamples, plan=plan)
    assert grid.side * slide_mpp == pytest.approx(tile_px * 0.5, abs=slide_mpp / 2 + 1e-9)
    assert slide_mpp * downsamples[grid.level] <= 0.55
    assert grid.level == len(downsamples) - 1 or slide_mpp * downsamples[grid.level + 1] > 0.55
    assert grid.level_px >= tile_px / 1.1 - 1
