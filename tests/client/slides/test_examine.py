import numpy as np
import pytest
from PIL import Image, ImageFilter

from pathfed_client.slides.examine import examine
from pathfed_client.slides.filters import FilteredSlideError
from pathfed_client.slides.reader import Thumbnail
from pathfed_common.errors import ErrorCode, SiteDataError
from pathfed_common.plan import CohortPlan, QualityPlan
from pathfed_common.synthetic import draw_anatomy, draw_stain, paint

PLAN = CohortPlan(tile_px=96, play_px=0)


class ArrayReader:
    """A slide in memory; `holes` are level-0 rectangles (x, y, width, height) the file cannot deliver."""

    vendor = "array"
    properties: dict[str, str] = {}  # noqa: RUF012

    def __init__(self, pixels, *, mpp=(0.5, 0.5), holes=()) -> None:
        self.pixels, self.mpp, self.holes = pixels, mpp, holes
        self.dimensions = (pixels.shape[1], pixels.shape[0])
        self.downsamples = (1.0,)
        self.level_dimensions = (self.dimensions,)
        self.reads = 0

    def read_region(self, x, y, level, width, height):
        self.reads += 1
        if any(x < hx + hw and hx < x + width and y < hy + hh and hy < y + height for hx, hy, hw, hh in self.holes):
            raise SiteDataError(ErrorCode.SLIDE_UNREADABLE, "hole")
        return self.pixels[y : y + height, x : x + width]

    def thumbnail(self, max_px):
        cell = -(-max(self.dimensions) // max_px)
        small = self.pixels[: self.pixels.shape[0] // cell * cell, : self.pixels.shape[1] // cell * cell]
        small = small.reshape(small.shape[0] // cell, cell, small.shape[1] // cell, cell, 3).mean(axis=(1, 3)).astype(np.uint8)
        return Thumbnail(small, np.ones(small.shape[:2], bool), cell=float(cell))

    def close(self):
        pass


@pytest.fixture(scope="module")
def picture():
    random = np.random.default_rng(2)
    return paint(768, 768, random, draw_stain(random, 1), draw_anatomy(random))


def test_tiles_hold_the_tissue_and_leave_the_glass(picture):
    facts = examine(ArrayReader(picture), PLAN, where="a")
    assert (facts.mpp, facts.width, facts.height) == (0.5, 768, 768)
    assert facts.tiles.grid.source_side == 96
    stained = picture.max(axis=2).astype(int) - picture.min(axis=2) > 40
    shares = np.array([[stained[y : y + 96, x : x + 96].mean() for x in range(0, 768, 96)] for y in range(0, 768, 96)])
    chosen = facts.tiles.cells()
    assert len(facts.tiles) == chosen.sum() > 0
    assert chosen[shares > 0.75].all()
    assert not chosen[shares < 0.1].any()


def test_a_few_holes_do_not_cost_the_slide(picture):
    whole = examine(ArrayReader(picture), PLAN, where="a")
    x, y = whole.tiles.corners()[0]
    holed = examine(ArrayReader(picture, holes=[(x + 10, y + 10, 5, 5)]), PLAN, where="a")
    np.testing.assert_array_equal(holed.tiles.cells(), whole.tiles.cells())


def test_slide_whose_tissue_cannot_be_read_is_unreadable_though_its_thumbnail_is_fine(picture):
    with pytest.raises(SiteDataError, match=r"PF206.*where there is tissue.*12 of 12"):
        examine(ArrayReader(picture, holes=[(0, 0, 768, 768)]), PLAN, where="a")


def test_broken_slide_without_resolution_is_called_broken(picture):
    with pytest.raises(SiteDataError, match="PF206"):
        examine(ArrayReader(np.zeros_like(picture), mpp=None), PLAN, where="a")
    with pytest.raises(SiteDataError, match="PF207"):
        examine(ArrayReader(picture, mpp=None), PLAN, where="a")


@pytest.mark.parametrize("stated", [None, (28.97, 28.97), (0.25, 0.25)])
def test_a_resolution_given_by_the_hospital_counts_instead_of_the_files(picture, stated):
    facts = examine(ArrayReader(picture, mpp=stated), PLAN, where="a", mpp_override=0.5)
    assert (facts.mpp, facts.tiles.grid.source_side) == (0.5, 96)
    with pytest.raises(SiteDataError, match="PF207"):
        examine(ArrayReader(picture), PLAN, where="a", mpp_override=28.97)


def test_slide_coarser_than_the_plan_is_refused_before_it_is_read(picture):
    reader = ArrayReader(picture, mpp=(0.6, 0.6))
    with pytest.raises(SiteDataError, match=r"PF207.*coarser"):
        examine(reader, PLAN, where="a")
    assert reader.reads == 0


@pytest.mark.parametrize(("level", "code"), [(0, "PF206"), (128, "PF206"), (255, "PF206")])
def test_slide_of_one_colour_is_unreadable(picture, level, code):
    with pytest.raises(SiteDataError, match=code):
        examine(ArrayReader(np.full_like(picture, level)), PLAN, where="a")


def test_clean_glass_is_a_slide_without_tissue():
    pixels = np.random.default_rng(0).integers(238, 247, (768, 768, 3), dtype=np.uint8)
    with pytest.raises(SiteDataError, match="PF209"):
        examine(ArrayReader(pixels), PLAN, where="a")


def test_tiny_slide_is_without_tissue_rather_than_a_crash(picture):
    with pytest.raises(SiteDataError, match="PF209"):
        examine(ArrayReader(picture[380:410, 380:410]), PLAN, where="a")


def test_the_filters_say_what_they_removed(picture):
    filters = examine(ArrayReader(picture), PLAN, where="a").filters
    assert [count.name for count in filters.removed] == ["pen", "fold", "focus"]
    assert filters.tissue_tiles > 0
    assert filters.sharp == filters.sampled > 0


def test_blurred_slide_is_out_of_focus_and_the_report_counts_all_its_tiles(picture):
    blurred = np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(3)))
    with pytest.raises(FilteredSlideError, match=r"PF214.*median sharpness 0\.[0-9]+.*0 of") as caught:
        examine(ArrayReader(blurred), PLAN, where="a")
    report = caught.value.report
    assert report.culprit is not None
    assert (report.culprit.name, report.culprit.tiles) == ("focus", report.tissue_tiles)
    lenient = CohortPlan(tile_px=96, play_px=0, quality=QualityPlan(sharp_share=0))
    assert len(examine(ArrayReader(blurred), lenient, where="a").tiles) == report.tissue_tiles


def test_slide_whose_tissue_is_all_inked_names_the_filter_that_took_it(picture):
    pale = 255 - (255 - picture.astype(float)) * 0.4
    inked = (pale * (np.array((70, 150, 80)) / 244)).astype(np.uint8)
    inked[:, :80] = picture[:, :80]  # a strip of clean glass
    with pytest.raises(FilteredSlideError, match=r"PF215.*pen removed") as caught:
        examine(ArrayReader(inked), PLAN, where="a")
    assert caught.value.report.culprit == caught.value.report.removed[0]


def test_tiles_that_are_constant_in_part_are_unreadable(picture):
    class Cut(ArrayReader):
        def read_region(self, x, y, level, width, height):
            pixels = super().read_region(x, y, level, width, height).copy()
            pixels[height // 4 :] = 128
            return pixels

    with pytest.raises(SiteDataError, match=r"PF206.*where there is tissue"):
        examine(Cut(picture), PLAN, where="a")
