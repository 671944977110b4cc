import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pathfed_client.slides.native import Codec, NativeLevel, Span
from pathfed_client.slides.tiling import TileGrid, choose_level, fits, scan_key, tile_cells, tile_grid
from pathfed_common.plan import CohortPlan

PLAN = CohortPlan()
FIXED = CohortPlan(play_px=0)


def native(side: int, codec: Codec = Codec.JPEG_YCBCR, height: int | None = None) -> NativeLevel:
    return NativeLevel(
        width=5000, height=5000, tile_width=side, tile_height=height or side, codec=codec, tables=b"", span=lambda _: Span(0, 0)
    )


def grid_of(slide_mpp, downsamples=(1,), plan=PLAN, size=(5000, 4000), native=None) -> TileGrid:
    level = choose_level(slide_mpp=slide_mpp, downsamples=downsamples, plan=plan)
    return tile_grid(slide_mpp=slide_mpp, level=level, downsample=downsamples[level], size=size, plan=plan, native=native)


@pytest.mark.parametrize(
    ("slide_mpp", "downsamples", "level", "crop", "reduce"),
    [
        (0.5, (1,), 0, 224, 1),
        (0.499, (1, 2.0005), 0, 224, 1),
        (0.25, (1, 2, 4), 1, 224, 1),
        (0.25, (1, 4, 16), 0, 448, 2),
        (0.2282, (1, 2, 4, 8), 1, 224, 1),  # 0.4564 um/px is within a tenth of 0.5: read as it is
        (0.2, (1, 2, 4), 1, 280, 1),  # 0.4 is not: resampled from 280
        (0.2, (1,), 0, 560, 2),  # shrunk to 0.4 while it is read, then resampled
        (0.27, (1, 2, 4), 1, 224, 1),  # 0.54 um/px is within the tolerance
        (0.28, (1, 2, 4), 0, 400, 1),  # 0.56 is not
        (0.125, (1,), 0, 896, 4),
        (0.0625, (1,), 0, 1792, 8),
    ],
)
def test_the_best_level_is_read_as_it_is_within_the_tolerance_and_shrunk_or_resampled_otherwise(
    slide_mpp, downsamples, level, crop, reduce
):
    grid = grid_of(slide_mpp, downsamples, FIXED)
    assert (grid.level, grid.crop, grid.reduce, grid.step) == (level, crop, reduce, crop)


def test_slide_coarser_than_the_tolerance_does_not_fit():
    assert fits(slide_mpp=0.55, plan=PLAN)
    assert not fits(slide_mpp=0.56, plan=PLAN)
    assert not fits(slide_mpp=float("nan"), plan=PLAN)
    with pytest.raises(ValueError, match=r"at most 0.55 um/px, got 0.56"):
        choose_level(slide_mpp=0.56, downsamples=(1,), plan=PLAN)


@pytest.mark.parametrize(("slide_mpp", "downsamples"), [(0, (1,)), (-1, (1,)), (0.5, ())])
def test_impossible_slides_are_refused(slide_mpp, downsamples):
    with pytest.raises(ValueError, match="must be positive"):
        choose_level(slide_mpp=slide_mpp, downsamples=downsamples, plan=PLAN)


@pytest.mark.parametrize(
    ("side", "slide_mpp", "step", "reduce"),
    [
        (256, 0.5, 256, 1),
        (240, 0.5, 240, 1),
        (512, 0.5, 256, 1),  # half a native tile is nearer to 256 than a whole one
        (1024, 0.5, 256, 1),
        (128, 0.5, 256, 1),  # two native tiles
        (200, 0.5, 400, 1),  # one native tile does not hold a tile, so it is two
        (256, 0.25, 512, 2),
        (240, 0.25, 480, 2),
        (1022, 0.5, 256, 1),  # no part of it is near 256 and holds a tile, but for 511
    ],
)
def test_sources_are_whole_native_tiles_or_whole_parts_of_one(side, slide_mpp, step, reduce):
    grid = grid_of(slide_mpp, native=native(side))
    assert grid.direct
    assert grid.reduce == reduce
    if side == 1022:
        assert grid.step == 511
    else:
        assert grid.step == step


def test_sources_start_at_the_corner_where_nothing_is_decoded_directly():
    assert grid_of(0.5).step == 256
    assert grid_of(0.5, native=native(256, height=128)).step == 256
    assert grid_of(0.5, plan=FIXED, native=native(256)).step == 224


def test_jpeg_2000_is_not_shrunk_while_it_is_decoded():
    assert grid_of(0.25, native=native(256, Codec.JPEG_2000_RGB)).reduce == 1
    assert grid_of(0.25, native=native(250)).reduce == 1
    assert grid_of(0.25, native=native(256)).reduce == 2


def test_scan_key_names_the_rules_that_shape_tiles_and_no_others():
    key = scan_key(PLAN)
    assert key == scan_key(CohortPlan(tiles_per_patient=9))
    others = [CohortPlan(mpp=0.25), CohortPlan(mpp_tolerance=0.2), CohortPlan(tile_px=256), CohortPlan(tissue_share=0.5), FIXED]
    assert len({key, *map(scan_key, others)}) == 6


def simple(width, height, side) -> TileGrid:
    return TileGrid(level=0, downsample=1, width=width, height=height, step=side, crop=side, reduce=1, tile_px=side, direct=False)


@pytest.mark.parametrize(
    ("width", "height", "side", "expected"), [(448, 224, 224, 2), (447, 224, 224, 1), (223, 500, 224, 0), (700, 700, 224, 9), (1, 1, 1, 1)]
)
def test_full_tissue_gives_every_whole_source(width, height, side, expected):
    mask = np.ones((-(-height // 16), -(-width // 16)), bool)
    assert tile_cells(mask, cell=16, grid=simple(width, height, side), tissue_share=1).sum() == expected


@pytest.mark.parametrize(("share", "expected"), [(0.0, 1), (0.25, 1), (0.26, 0)])
def test_share_is_reached_exactly_at_its_bound(share, expected):
    mask = np.zeros((4, 4), bool)
    mask[:2, :2] = True
    assert tile_cells(mask, cell=1, grid=simple(4, 4, 4), tissue_share=share).sum() == expected


def test_a_source_without_any_tissue_never_counts():
    assert not tile_cells(np.zeros((4, 4), bool), cell=1, grid=simple(4, 4, 2), tissue_share=0).any()


@pytest.mark.parametrize("change", [{"cell": 0}, {"mask": np.zeros((0, 4), bool)}, {"mask": np.zeros(4, bool)}])
def test_impossible_masks_are_refused(change):
    arguments = {"mask": np.ones((4, 4), bool), "cell": 1} | change
    with pytest.raises(ValueError, match="mask must be"):
        tile_cells(arguments["mask"], cell=arguments["cell"], grid=simple(4, 4, 2), tissue_share=0.5)


@pytest.mark.parametrize(
    "change", [{"crop": 0}, {"crop": 9}, {"reduce": 3}, {"crop": 7, "reduce": 2}, {"downsample": 0.5}, {"width": 0}, {"tile_px": 0}]
)
def test_impossible_grids_are_refused(change):
    with pytest.raises(ValueError, match="not a tile grid"):
        replace(simple(16, 16, 8), **change)


@settings(max_examples=120, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    cell=st.integers(1, 7),
    width=st.integers(1, 90),
    height=st.integers(1, 90),
    side=st.integers(1, 40),
    share=st.floats(0, 1),
)
def test_tiles_hold_the_tissue_they_should(seed, cell, width, height, side, share):
    mask = np.random.default_rng(seed).random((-(-height // cell), -(-width // cell))) < 0.5
    grid = simple(width, height, side)
    cells = tile_cells(mask, cell=cell, grid=grid, tissue_share=share)
    assert cells.shape == (height // side, width // side)
    full = np.repeat(np.repeat(mask, cell, 0), cell, 1)[:height, :width]  # the same tissue, pixel by pixel
    for row in range(grid.rows):
        for column in range(grid.columns):
            tissue = full[row * side : (row + 1) * side, column * side : (column + 1) * side].mean()
            if abs(tissue - share) > 1e-6:
                assert cells[row, column] == (tissue > share), (row, column, tissue)


NATIVES = st.one_of(
    st.none(),
    st.builds(native, st.integers(100, 1100), st.sampled_from(list(Codec))),
    st.builds(native, st.sampled_from([128, 240, 256, 512, 1024]), st.just(Codec.JPEG_RGB)),
)


@settings(max_examples=200, deadline=None)
@given(
    slide_mpp=st.floats(0.1, 0.55),
    factors=st.lists(st.floats(1.2, 4), max_size=5),
    tile_px=st.sampled_from([32, 224, 256, 512]),
    more=st.integers(0, 300),
    tolerance=st.sampled_from([0.0, 0.05, 0.1, 0.3]),
    native=NATIVES,
    across=st.floats(0, 1, exclude_max=True),
    down=st.floats(0, 1, exclude_max=True),
)
def test_every_tile_lies_inside_its_own_source_and_the_slide_and_covers_what_the_plan_says(
    slide_mpp, factors, tile_px, more, tolerance, native, across, down
):
    plan = CohortPlan(tile_px=tile_px, play_px=more, mpp_tolerance=tolerance)
    if not fits(slide_mpp=slide_mpp, plan=plan):
        return
    downsamples = np.cumprod([1.0, *factors]).tolist()
    size = (5000, 4000)
    grid = grid_of(slide_mpp, downsamples, plan, size, native)
    level_mpp = slide_mpp * grid.downsample
    # As coarse as allowed and no coarser.
    assert fits(slide_mpp=level_mpp, plan=plan)
    assert all(not fits(slide_mpp=slide_mpp * down, plan=plan) for down in downsamples if down > grid.downsample)
    # A tile covers tile_px * mpp um, to the tolerance where it is read as it is and to a pixel where it is resampled.
    read_mpp = level_mpp * grid.reduce
    assert read_mpp <= plan.mpp * (1 + tolerance) * (1 + 1e-9)
    if grid.crop == tile_px * grid.reduce:
        assert abs(read_mpp / plan.mpp - 1) <= tolerance + 1.01 / tile_px
    else:
        assert math.isclose(grid.crop * level_mpp, tile_px * plan.mpp, abs_tol=read_mpp * 1.001)
    # Inside its source, the source inside the level, sources apart by construction.
    for column, row in ((0, 0), (grid.columns - 1, grid.rows - 1)):
        if grid.columns and grid.rows:
            x, y = grid.place(column, row, across, down)
            assert column * grid.step <= x <= (column + 1) * grid.step - grid.crop
            assert row * grid.step <= y <= (row + 1) * grid.step - grid.crop
            assert x + grid.crop <= size[0]
            assert y + grid.crop <= size[1]
            assert (x - column * grid.step) % grid.reduce == 0
    # With direct decoding and square native tiles, a source never straddles more native tiles than it must.
    if native is not None and more and grid.step != max(grid.crop, round(plan.source_px * grid.crop / tile_px)):
        assert grid.step % native.tile_width == 0 or native.tile_width % grid.step == 0
        assert grid.step % grid.reduce == 0


def test_every_place_of_the_play_is_equally_likely():
    grid = grid_of(0.5, native=native(256))
    shares = (np.arange(3300) + 0.5) / 3300
    xs = np.array([grid.place(2, 0, share, 0)[0] for share in shares])
    values, counts = np.unique(xs, return_counts=True)
    assert values.tolist() == list(range(512, 512 + 33))
    assert set(counts.tolist()) == {100}
