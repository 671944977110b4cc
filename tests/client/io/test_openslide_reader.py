import numpy as np
import pytest

from pathfed_client.io import openslide_reader
from pathfed_client.io.openslide_reader import ALLOWED_PROPERTIES, OpenSlideReader
from pathfed_common.errors import SiteDataError


def reader(path) -> OpenSlideReader:
    return OpenSlideReader(path, name="slide")


def test_frame_levels_and_resolution(tmp_path, write_slide):
    with reader(write_slide(tmp_path / "a.tif", mpp=0.25)) as slide:
        assert slide.dimensions == (768, 640)
        assert slide.downsamples == (1, 2, 4)
        assert slide.mpp == (0.25, 0.25)
        assert slide.vendor == "generic-tiff"


def test_region_is_where_it_was_asked_for(tmp_path, write_slide, tissue):
    with reader(write_slide(tmp_path / "a.tif")) as slide:
        fine = slide.read_region(200, 100, 0, 96, 64)
        coarse = slide.read_region(200, 100, 1, 48, 32)
    assert fine.shape == (64, 96, 3)
    assert fine.dtype == np.uint8
    expected = tissue[100:164, 200:296].astype(float)
    small = expected.reshape(32, 2, 48, 2, 3).mean(axis=(1, 3))
    for seen, truth in ((fine, expected), (coarse, small)):
        error = np.abs(seen - truth).mean()
        assert error < 10  # JPEG
        for moved in (np.roll(truth, 3, axis=0), np.roll(truth, 3, axis=1)):
            assert np.abs(seen - moved).mean() > 2 * error


def test_thumbnail_covers_the_slide_and_keeps_its_scale(tmp_path, write_slide, tissue):
    with reader(write_slide(tmp_path / "a.tif")) as slide:
        small = slide.thumbnail(64)
        whole = slide.thumbnail(10_000)
    assert (small.pixels.shape, small.cell) == ((54, 64, 3), 12.0)
    assert small.valid.all()
    assert whole.pixels.shape == (640, 768, 3)
    expected = tissue[:636].reshape(53, 12, 64, 12, 3).mean(axis=(1, 3))
    assert np.abs(small.pixels[:53] - expected).mean() < 4


def test_thumbnail_read_in_bands_is_the_same(tmp_path, write_slide, monkeypatch):
    with reader(write_slide(tmp_path / "a.tif")) as slide:
        at_once = slide.thumbnail(100)
        monkeypatch.setattr(openslide_reader, "_BAND_PX", 20_000)
        in_bands = slide.thumbnail(100)
    np.testing.assert_array_equal(at_once.pixels, in_bands.pixels)
    assert at_once.cell == in_bands.cell


@pytest.mark.parametrize("content", [b"", b"not a slide", b"II*\0" + bytes(100)])
def test_file_that_is_no_slide_is_refused(tmp_path, content):
    (tmp_path / "a.svs").write_bytes(content)
    with pytest.raises(SiteDataError, match="PF205"):
        reader(tmp_path / "a.svs")


def test_missing_file_is_refused(tmp_path):
    with pytest.raises(SiteDataError, match="PF205"):
        reader(tmp_path / "a.svs")


@pytest.mark.parametrize("take_out", [False, True], ids=["nonsense", "missing"])
def test_damaged_tile_is_an_error_and_the_others_can_still_be_read(tmp_path, write_slide, break_tile, take_out):
    path = write_slide(tmp_path / "a.tif")
    with reader(path) as slide:
        before = slide.read_region(300, 300, 0, 128, 128)
    break_tile(path, 0, take_out=take_out)
    with reader(path) as slide:
        with pytest.raises(SiteDataError, match="PF206"):
            slide.read_region(10, 10, 0, 128, 128)
        np.testing.assert_array_equal(slide.read_region(300, 300, 0, 128, 128), before)
        with pytest.raises(SiteDataError, match="PF206"):
            slide.read_region(200, 10, 0, 128, 128)


def test_region_beyond_the_slide_is_an_error_not_white(tmp_path, write_slide):
    with reader(write_slide(tmp_path / "a.tif")) as slide:
        for x in (700, 5000):
            with pytest.raises(SiteDataError, match="PF206"):
                slide.read_region(x, 0, 0, 128, 128)


def test_hole_is_marked_in_the_thumbnail(tmp_path, write_slide, break_tile):
    path = write_slide(tmp_path / "a.tif")
    break_tile(path, 0, take_out=True)
    with reader(path) as slide:
        thumbnail = slide.thumbnail(768)
    assert not thumbnail.valid[:256, :256].any()
    assert thumbnail.valid[256:].all()
    assert thumbnail.valid[:, 256:].all()
    assert (thumbnail.pixels[:256, :256] == 255).all()


def test_only_technical_properties_are_kept(slides_data):
    with reader(slides_data / "ok" / "CMU-1-Small-Region.svs") as slide:
        assert set(slide.properties) <= set(ALLOWED_PROPERTIES)
        assert slide.properties["openslide.vendor"] == "aperio"
        assert slide.mpp == (0.499, 0.499)


def test_any_file_of_a_dicom_series_opens_the_slide(slides_data):
    files = sorted((slides_data / "ok" / "dicom_CMU").iterdir())
    assert len(files) == 4
    pictures = []
    for path in files:
        with reader(path) as slide:
            assert slide.dimensions == (2220, 2967)
            pictures.append(slide.read_region(1000, 1000, 0, 64, 64))
    assert all((picture == pictures[0]).all() for picture in pictures)


def test_slide_whose_pixels_cannot_be_decoded_is_unreadable(slides_data):
    with reader(slides_data / "bad" / "openslide_unreadable.svs") as slide:
        for _ in range(2):
            with pytest.raises(SiteDataError, match="PF206"):
                slide.read_region(0, 0, 0, 16, 16)
