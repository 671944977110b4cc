"""The self-test passes with sound libraries and sees a difference of one level in one pixel."""

from dataclasses import replace

import pytest

from pathfed_client.io import direct_reader
from pathfed_client.io.doctor.decoders import check_decoders
from pathfed_client.io.doctor.samples import SAMPLES
from pathfed_client.io.openslide_reader import OpenSlideReader
from pathfed_client.slides import native
from pathfed_client.slides.native import Codec, Decoder

NAMES = ["jpeg-rgb", "jpeg-ycbcr", "jpeg-ycbcr-420", "jpeg-2000"]


def verdicts(found):
    return [(one.direct, one.openslide) for one in found]


def test_the_installed_decoders_give_the_known_pixels():
    found = check_decoders()
    assert [one.sample for one in found] == NAMES
    assert verdicts(found) == [(True, True)] * 4


@pytest.mark.parametrize("name", ["simplejpeg", "imagecodecs"])
def test_a_library_that_is_one_level_off_in_one_pixel_is_seen(monkeypatch, name):
    function = {"simplejpeg": "decode_jpeg", "imagecodecs": "jpeg2k_decode"}[name]
    library = getattr(native, name)
    real = getattr(library, function)

    def off(*arguments, **more):
        pixels = real(*arguments, **more).copy()
        pixels[7, 5, 1] ^= 1
        return pixels

    monkeypatch.setattr(library, function, off)
    concerned = [name == "simplejpeg"] * 3 + [name == "imagecodecs"]
    assert verdicts(check_decoders()) == [(not hit, True) for hit in concerned]


def test_an_openslide_that_is_off_is_seen(monkeypatch):
    real = OpenSlideReader.read_region

    def off(*arguments):
        pixels = real(*arguments).copy()
        pixels[0, 0, 0] ^= 1
        return pixels

    monkeypatch.setattr(OpenSlideReader, "read_region", off)
    assert verdicts(check_decoders()) == [(True, False)] * 4


def test_a_decoder_that_takes_rgb_for_ycbcr_is_seen(monkeypatch):
    def mistaken(level):
        return Decoder(replace(level, codec=Codec.JPEG_YCBCR) if level.codec is Codec.JPEG_RGB else level)

    monkeypatch.setattr(direct_reader, "Decoder", mistaken)
    assert verdicts(check_decoders()) == [(False, True), *[(True, True)] * 3]


def test_a_decoder_that_fails_altogether_is_wrong_and_no_crash():
    class Cut:
        name, pixels = "jpeg-rgb", SAMPLES[0].pixels

        def file(self) -> bytes:
            return SAMPLES[0].file()[:-300]

    class Nothing(Cut):
        def file(self) -> bytes:
            return b"no slide"

    assert verdicts(check_decoders([Cut(), Nothing()])) == [(False, False)] * 2  # type: ignore[list-item]
