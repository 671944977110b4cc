import json
import stat

import numpy as np
import pytest
import tifffile
from PIL import Image

from pathfed_client.io import inspection_page
from pathfed_client.io.inspection import inspect
from pathfed_client.slides.filters import FilterCount, FilterReport
from pathfed_common.errors import ErrorCode, HostError, SiteDataError
from pathfed_common.plan import CohortPlan, QualityPlan

PLAN = CohortPlan(tile_px=96)
HIDDEN = "PATIENT^JANE 1961-05-04"


@pytest.fixture
def folder(tmp_path, write_slide):
    write_slide(tmp_path / "slides" / "ward 3" / "a&b.tif")
    return tmp_path / "slides"


def test_a_usable_slide_is_shown_whole(folder, tmp_path):
    found = inspect(folder, "ward 3/a&b.tif", PLAN, tmp_path / "out")
    assert found.usable
    assert found.tiles > 24
    assert len(found.sharpness) == 24
    page = found.page.read_text()
    assert "<title>Slide inspection - stays at this site</title>" in page
    assert "Stays at this site" in page
    assert "ward 3/a&amp;b.tif" in page
    assert f"usable: {found.tiles} tiles" in page
    assert page.count("data:image/png;base64,") == 3
    for words in ("removed by pen", "removed by fold", "removed by focus", "openslide.vendor"):
        assert words in page
    assert found.overlay is not None
    assert found.contact is not None
    for picture in (found.overlay, found.contact):
        with Image.open(picture) as image:
            assert min(image.size) > 90
    assert json.loads(json.dumps(found.to_dict(), default=str))["tiles"] == found.tiles


def test_a_resolution_that_the_hospital_gives_counts_instead_of_the_files(folder, tmp_path, write_slide):
    write_slide(folder / "b.tif", mpp=28.97)
    assert inspect(folder, "b.tif", PLAN, tmp_path / "out").code is ErrorCode.SLIDE_MPP_UNUSABLE
    found = inspect(folder, "b.tif", PLAN, tmp_path / "out", listed_mpp={"b.tif": 0.5}.get)
    assert (found.usable, found.mpp) == (True, (0.5, 0.5))


def test_the_page_fetches_and_runs_nothing(folder, tmp_path):
    page = inspect(folder, "a&b.tif", PLAN, tmp_path / "out").page.read_text()
    for word in ("<script", "<link", "http:", "https:", "@import", "file:"):
        assert word not in page
    assert "default-src 'none'" in page


def test_files_are_for_their_owner_alone(folder, tmp_path):
    out = tmp_path / "deep" / "out"
    inspect(folder, "a&b.tif", PLAN, out)
    assert stat.S_IMODE(out.stat().st_mode) == 0o700
    assert sorted(path.name for path in out.iterdir()) == ["contact.png", "index.html", "overlay.png"]
    assert {stat.S_IMODE(path.stat().st_mode) for path in out.iterdir()} == {0o600}


def test_free_text_of_the_file_is_not_shown(folder, tmp_path, tissue):
    path = folder / "named.tif"
    tifffile.imwrite(
        path, tissue, tile=(256, 256), photometric="rgb", compression="jpeg", description=HIDDEN, resolution=(20000, 20000),
        resolutionunit="CENTIMETER", software=HIDDEN,
    )  # fmt: skip
    found = inspect(folder, "named.tif", PLAN, tmp_path / "out")
    assert found.usable
    assert HIDDEN.encode() in path.read_bytes()
    for file in (tmp_path / "out").iterdir():
        assert b"JANE" not in file.read_bytes()
    assert "JANE" not in json.dumps(found.to_dict(), default=str)


def test_a_refused_slide_is_shown_with_its_reason_and_the_tiles_it_would_have(folder, tmp_path, write_slide, tissue):
    blurred = np.asarray(Image.fromarray(tissue).reduce(8).resize((tissue.shape[1], tissue.shape[0]), Image.Resampling.BICUBIC))
    write_slide(folder / "blurred.tif", blurred)
    found = inspect(folder, "blurred.tif", PLAN, tmp_path / "out")
    assert (found.usable, found.code, found.tiles) == (False, ErrorCode.SLIDE_OUT_OF_FOCUS, 0)
    assert len(found.sharpness) == 24
    assert max(found.sharpness) < PLAN.quality.min_sharpness
    page = found.page.read_text()
    assert "not used, PF214" in page
    assert "removed by focus: nearly everything" in page
    assert "as they would lie without the filters" in page


def test_a_slide_without_resolution_still_has_a_picture(folder, tmp_path, tissue):
    tifffile.imwrite(folder / "bare.tif", tissue, tile=(256, 256), photometric="rgb", compression="jpeg")
    found = inspect(folder, "bare.tif", PLAN, tmp_path / "out")
    assert (found.code, found.contact, found.sharpness) == (ErrorCode.SLIDE_MPP_UNUSABLE, None, ())
    assert found.overlay is not None


def test_a_file_that_does_not_open_has_a_page_that_says_so(folder, tmp_path):
    (folder / "broken.svs").write_bytes(b"no slide")
    found = inspect(folder, "broken.svs", PLAN, tmp_path / "out")
    assert (found.code, found.overlay, found.width) == (ErrorCode.SLIDE_UNOPENABLE, None, None)
    assert "PF205" in found.page.read_text()


@pytest.mark.parametrize("name", ["none.svs", "../slides/ward 3/a&b.tif", ""])
def test_only_slides_of_the_folder_are_found(folder, tmp_path, name):
    with pytest.raises(SiteDataError, match=r"PF212.*no such slide"):
        inspect(folder, name, PLAN, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_name_that_several_slides_have_is_refused(folder, tmp_path, write_slide):
    write_slide(folder / "ward 4" / "a&b.tif", shift=9)
    with pytest.raises(SiteDataError, match=r"PF212.*several.*ward 3/a&b.tif, ward 4/a&b.tif"):
        inspect(folder, "a&b.tif", PLAN, tmp_path / "out")


def test_a_folder_that_cannot_be_made_is_told(folder, tmp_path):
    (tmp_path / "out").write_bytes(b"")
    with pytest.raises(HostError, match="PF904"):
        inspect(folder, "a&b.tif", PLAN, tmp_path / "out")


def test_the_plan_s_rules_are_those_that_are_applied(folder, tmp_path):
    strict = CohortPlan(tile_px=96, quality=QualityPlan(min_sharpness=0.9))
    assert inspect(folder, "a&b.tif", strict, tmp_path / "out").code is ErrorCode.SLIDE_OUT_OF_FOCUS


def test_a_filter_that_took_nearly_everything_stands_out():
    report = FilterReport(100, 10, (FilterCount("pen", 95, 2), FilterCount("fold", 1, 0)))
    table = inspection_page._filter_table(report, PLAN)
    assert table.count("nearly everything") == 1
    assert ">4<" in table
    assert ">8<" in table


def test_a_contact_sheet_needs_a_sharpness_for_each_tile():
    with pytest.raises(ValueError, match="got 1 and 2"):
        inspection_page.contact_sheet([np.zeros((32, 32, 3), np.uint8)], [1.0, 2.0])


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("ok/CMU-1-Small-Region.svs", None),
        ("ok/dicom_CMU", None),
        ("ok/hamamatsu_test3-DAPI-2-387.ndpi", ErrorCode.SLIDE_NOT_BRIGHTFIELD),
        ("ok/TCGA-CR-7395-01A-01-TS1.svs", ErrorCode.SLIDE_MPP_UNUSABLE),
        ("bad/slideio_corrupted.svs", ErrorCode.SLIDE_UNREADABLE),
        ("bad/histolab_broken.svs", ErrorCode.SLIDE_UNOPENABLE),
    ],
)
def test_real_slides_get_their_page(slides_data, tmp_path, name, code):
    found = inspect(slides_data, name, CohortPlan(), tmp_path / "out")
    assert found.code is code
    assert found.page.stat().st_size > 1000
    if code is None:
        assert found.filters is not None
        assert found.tiles >= 0.95 * found.filters.tissue_tiles, "filters leave a good slide nearly whole"
