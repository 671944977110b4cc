import numpy as np
import pytest
from thumbnails import inked, painted, thumbnail

from pathfed_client.slides.filters import FilterCount, FilterReport, filter_warnings, filtered_tiles, slide_masks
from pathfed_client.slides.tile_map import make_map
from pathfed_client.slides.tiling import TileGrid
from pathfed_common.plan import CohortPlan, QualityPlan

PLAN = QualityPlan()
CELL, SIDE = 16.0, 224


@pytest.fixture(scope="module")
def marked():
    light, _ = painted(0)
    return inked(light * 243, (30, 120, 60), np.random.default_rng(1), width=20)


def laid(pixels, plan=PLAN):
    """Masks, corners of the tiles that are left in level-0 pixels, and the report."""
    masks = slide_masks(thumbnail(pixels), plan)
    height, width = (int(size * CELL) for size in masks.tissue.shape)
    grid = TileGrid(level=0, downsample=1, width=width, height=height, step=SIDE, crop=SIDE, reduce=1, tile_px=SIDE, direct=False)
    cells, report = filtered_tiles(masks, grid, CohortPlan(quality=plan), cell=CELL)
    return masks, make_map(grid, cells).corners(), report


def test_what_is_removed_and_what_is_left_add_up(marked):
    masks, corners, report = laid(marked[0])
    assert [count.name for count in report.removed] == ["pen", "fold"]
    assert report.tissue_cells - sum(count.cells for count in report.removed) == masks.usable.sum()
    assert report.tissue_tiles - sum(count.tiles for count in report.removed) == len(corners)
    assert report.removed[0].tiles > 0
    assert report.culprit == report.removed[0]


def test_no_tile_that_is_left_holds_more_ink_than_the_plan_allows(marked):
    for share in (0.0, 0.1, 0.4):
        masks, corners, _ = laid(marked[0], QualityPlan(artefact_share=share))
        assert len(corners) > 0
        for x, y in (corners / CELL).astype(int):
            assert (masks.pen | masks.fold)[y : y + 14, x : x + 14].mean() <= share + 1e-9


def test_filters_can_be_switched_off(marked):
    masks, corners, report = laid(marked[0], QualityPlan(pen_marks=False, folds=False))
    assert not masks.pen.any()
    assert not masks.fold.any()
    assert len(corners) == report.tissue_tiles
    assert report.culprit is None


def test_a_clean_slide_loses_nothing():
    _, corners, report = laid(painted(1)[0] * 243)
    assert len(corners) == report.tissue_tiles > 0
    assert all(count.cells == count.tiles == 0 for count in report.removed)


def counts(pen=0, fold=0, focus=0, whole=100) -> FilterReport:
    removed = (FilterCount("pen", pen, pen), FilterCount("fold", fold, fold), FilterCount("focus", focus, focus))
    return FilterReport(tissue_cells=whole, tissue_tiles=whole, removed=removed)


def test_a_filter_that_takes_nearly_everything_of_a_slide_is_warned_of():
    found = filter_warnings({"a.svs": counts(pen=90), "b.svs": counts(pen=89), "c.svs": counts(whole=1000)})
    assert [(one.slide, one.filter, one.share) for one in found] == [("a.svs", "pen", 0.9)]


def test_a_filter_that_takes_nearly_everything_of_a_site_is_warned_of_first():
    found = filter_warnings({"a.svs": counts(focus=100), "b.svs": counts(focus=85)})
    assert [(one.slide, one.filter, round(one.share, 3)) for one in found] == [(None, "focus", 0.925), ("a.svs", "focus", 1.0)]


def test_many_tiles_lost_to_little_ink_are_warned_of_as_well():
    report = FilterReport(tissue_cells=100, tissue_tiles=10, removed=(FilterCount("pen", 20, 10),))
    assert filter_warnings({"a.svs": report})[0].share == 1


def test_slides_without_tissue_are_not_warned_of():
    assert filter_warnings({"a": FilterReport(0, 0, (FilterCount("pen", 0, 0),)), "b": counts()}) == ()
    assert filter_warnings({}) == ()
