"""Direct decoding gives OpenSlide's pixels, bit for bit, or is not used."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

from pathfed_client.io import direct_reader
from pathfed_client.io.direct_reader import DirectLevel, agrees, open_direct, trusted_level
from pathfed_client.io.openslide_reader import OpenSlideReader
from pathfed_common.errors import SiteDataError

DIRECT = {
    "ok/CMU-1-Small-Region.svs": (0,),
    "ok/TCGA-CR-7395-01A-01-TS1.svs": (0, 1),
    "ok/philips_like_CMU.tiff": (0, 1),
    "ok/google_camelyon_jpeg.dcm": (0,),
    "ok/dicom_CMU": (0,),
    "ok/hamamatsu_test3-DAPI-2-387.ndpi": (),
}


def opened(files: list[Path], width: int, height: int) -> DirectLevel:
    direct = open_direct(files, width, height, name="a")
    assert direct is not None
    return direct


def files_of(path: Path) -> list[Path]:
    return sorted(path.iterdir()) if path.is_dir() else [path]


@pytest.mark.parametrize("name", DIRECT)
def test_real_slides_are_decoded_directly_and_bit_for_bit_as_openslide_does(slides_data, name):
    files = files_of(slides_data / name)
    with OpenSlideReader(files[0], name=name) as reader:
        levels = range(len(reader.level_dimensions))
        trusted = tuple(level for level in levels if trusted_level(reader, files, name, level) is not None)
        assert trusted == DIRECT[name]
        random = np.random.default_rng(0)
        width, height = reader.level_dimensions[0]
        if not trusted:
            return
        with opened(files, width, height) as direct:
            for _ in range(12):
                x, y = int(random.integers(0, width - 300)), int(random.integers(0, height - 260))
                np.testing.assert_array_equal(direct.read(x, y, 300, 260), reader.read_region(x, y, 0, 300, 260))


@pytest.fixture
def slide(tmp_path, write_slide) -> Path:
    return write_slide(tmp_path / "a.tif")


def test_a_rectangle_is_the_same_however_many_native_tiles_it_touches(slide):
    with opened([slide], 768, 640) as direct, OpenSlideReader(slide, name="a") as reader:
        for x, y, width, height in ((0, 0, 768, 640), (255, 255, 2, 2), (256, 256, 256, 256), (10, 500, 700, 140), (767, 639, 1, 1)):
            np.testing.assert_array_equal(direct.read(x, y, width, height), reader.read_region(x, y, 0, width, height))


@pytest.mark.parametrize("reduce", [2, 4, 8])
def test_shrunk_rectangles_fit_each_other_across_native_tiles(slide, reduce):
    with opened([slide], 768, 640) as direct:
        whole = direct.read(0, 0, 768, 640, reduce=reduce)
        assert whole.shape == (640 // reduce, 768 // reduce, 3)
        part = direct.read(8 * reduce, 16 * reduce, 64 * reduce, 24 * reduce, reduce=reduce)
        np.testing.assert_array_equal(part, whole[16:40, 8:72])
        means = direct.read(0, 0, 768, 640).reshape(640 // reduce, reduce, 768 // reduce, reduce, 3).astype(float).mean(axis=(1, 3))
        assert np.abs(whole - means).mean() < 3


@pytest.mark.parametrize("region", [(-1, 0, 5, 5), (0, 0, 0, 5), (760, 0, 9, 5), (0, 636, 5, 5)])
def test_rectangles_outside_the_level_are_refused(slide, region):
    with opened([slide], 768, 640) as direct, pytest.raises(ValueError, match="not inside"):
        direct.read(*region)


def test_places_that_do_not_fit_the_shrinking_are_refused(slide):
    with opened([slide], 768, 640) as direct, pytest.raises(ValueError, match="cannot be shrunk"):
        direct.read(1, 0, 64, 64, reduce=2)


@pytest.mark.parametrize("take_out", [False, True], ids=["nonsense", "missing"])
def test_a_damaged_native_tile_is_an_error_and_never_white_and_its_neighbours_can_be_read(slide, break_tile, take_out):
    break_tile(slide, 4, take_out=take_out)
    with opened([slide], 768, 640) as direct:
        for region in ((256, 256, 256, 256), (200, 200, 100, 100)):
            with pytest.raises(SiteDataError, match="PF206"):
                direct.read(*region)
        assert direct.read(0, 0, 256, 256).std() > 5


def test_a_level_of_another_size_is_not_opened(slide, tmp_path):
    assert open_direct([slide], 767, 640, name="a") is None
    assert open_direct([tmp_path / "gone.tif"], 768, 640, name="a") is None
    (tmp_path / "text.tif").write_text("no slide")
    assert open_direct([tmp_path / "text.tif"], 768, 640, name="a") is None


def test_a_slide_on_which_the_two_differ_is_not_trusted(slide, monkeypatch):
    """Plant the mistake that simplejpeg alone makes: RGB tiles taken for YCbCr, or the reverse."""
    with OpenSlideReader(slide, name="a") as reader:
        assert trusted_level(reader, [slide], "a", 0) is not None
        real = vars(direct_reader)["Decoder"]

        def mistaken(level):
            from dataclasses import replace

            from pathfed_client.slides.native import Codec

            return real(replace(level, codec=Codec.JPEG_RGB))

        monkeypatch.setattr(direct_reader, "Decoder", mistaken)
        assert trusted_level(reader, [slide], "a", 0) is None


def test_a_difference_of_one_level_in_one_pixel_is_seen(slide, monkeypatch):
    with OpenSlideReader(slide, name="a") as reader, opened([slide], 768, 640) as direct:
        assert agrees(direct, reader, 0)
        real = direct.read

        def off_by_one(*region, **more):
            pixels = real(*region, **more).copy()
            pixels[-1, -1, 2] ^= 1
            return pixels

        monkeypatch.setattr(direct, "read", off_by_one)
        assert not agrees(direct, reader, 0)


def test_a_slide_that_neither_can_read_is_not_trusted(tmp_path, write_slide, break_tile):
    slide = write_slide(tmp_path / "b.tif")
    for tile in range(9):
        break_tile(slide, tile)
    with OpenSlideReader(slide, name="b") as reader:
        assert trusted_level(reader, [slide], "b", 0) is None


def test_levels_that_openslide_interpolates_are_compared_closely(tmp_path, tissue):
    """A second level whose downsample is no whole number, as Aperio's often are."""
    file = tmp_path / "odd.tif"
    data = io.BytesIO()
    with tifffile.TiffWriter(data) as writer:
        options: dict[str, Any] = {"tile": (256, 256), "photometric": "rgb", "compression": "jpeg", "metadata": None}
        writer.write(np.tile(tissue, (2, 2, 1))[:1279, :1535], **options)
        writer.write(tissue[:639, :767], subfiletype=1, **options)
    file.write_bytes(data.getvalue())
    with OpenSlideReader(file, name="odd") as reader:
        assert reader.downsamples[1] != round(reader.downsamples[1])
        assert trusted_level(reader, [file], "odd", 1) is not None


def test_nothing_is_left_open(slide):
    def open_files() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    before = open_files()
    assert open_direct([slide], 1, 1, name="a") is None
    with opened([slide], 768, 640) as direct:
        direct.close()
    assert open_files() == before
