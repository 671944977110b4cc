import numpy as np
import pytest

from pathfed_client.slides.quality import check_thumbnail, checked_mpp, flat_share, is_flat
from pathfed_client.slides.reader import Thumbnail
from pathfed_common.errors import SiteDataError


@pytest.mark.parametrize(("mpp", "expected"), [((0.1, 0.1), 0.1), ((0.499, 0.499), 0.499), ((0.25, 0.26), 0.255), ((2.0, 2.0), 2.0)])
def test_plausible_resolution_is_taken(mpp, expected):
    assert checked_mpp(mpp, where="a.svs") == pytest.approx(expected)


@pytest.mark.parametrize(
    "mpp", [None, (28.97, 28.97), (352.8, 352.8), (1000, 1000), (0.09, 0.09), (2.01, 2.01), (0, 0), (-0.5, -0.5), (float("nan"), 0.5)]
)
def test_missing_and_absurd_resolutions_are_refused(mpp):
    with pytest.raises(SiteDataError, match=r"PF207.*where: a\.svs"):
        checked_mpp(mpp, where="a.svs")


def test_resolution_that_differs_between_axes_is_refused():
    with pytest.raises(SiteDataError, match="not square"):
        checked_mpp((0.5, 0.55), where="a.svs")


def test_one_colour_is_flat_and_glass_with_noise_is_not():
    assert is_flat(np.full((8, 8, 3), 255, np.uint8))
    assert is_flat(np.zeros((8, 8, 3), np.uint8))
    assert is_flat(np.random.default_rng(0).integers(120, 123, (8, 8, 3), dtype=np.uint8))
    assert not is_flat(np.random.default_rng(0).integers(238, 247, (8, 8, 3), dtype=np.uint8))


def thumbnail(pixels, valid=True) -> Thumbnail:
    pixels = pixels.astype(np.uint8)
    return Thumbnail(pixels, np.full(pixels.shape[:2], valid), cell=16)


def noisy(mean, size=40):
    return np.clip(np.random.default_rng(0).normal(mean, 5, (size, size, 3)), 0, 255)


@pytest.mark.parametrize("mean", [(243, 243, 243), (180, 110, 160), (120, 80, 140)], ids=["glass", "tissue", "dense tissue"])
def test_brightfield_passes(mean):
    check_thumbnail(thumbnail(noisy(mean)), where="a.svs")


def test_brightfield_with_black_padding_passes():
    pixels = noisy((230, 220, 230))
    pixels[:, :30] = 0
    check_thumbnail(thumbnail(pixels), where="a.svs")


@pytest.mark.parametrize("mean", [(1, 1, 25), (5, 60, 5), (20, 20, 200)], ids=["dapi", "fitc", "bright dapi"])
def test_fluorescence_is_refused(mean):
    with pytest.raises(SiteDataError, match="PF208"):
        check_thumbnail(thumbnail(noisy(mean)), where="a.ndpi")


def test_transparent_slide_is_refused():
    with pytest.raises(SiteDataError, match=r"PF206.*transparent"):
        check_thumbnail(thumbnail(noisy((240, 240, 240)), valid=False), where="a.svs")


def test_share_of_constant_blocks_is_counted():
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    assert flat_share(pixels) == 0
    pixels[32:] = 128
    assert flat_share(pixels) == 0.5
    assert flat_share(np.full((5, 70, 3), 9, np.uint8)) == 1


def test_no_real_tile_is_constant_in_large_part(real_tiles):
    assert max(flat_share(tile) for tile in real_tiles[0]) < 0.2
