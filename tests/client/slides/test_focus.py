import io

import numpy as np
import pytest
from PIL import Image, ImageFilter

from pathfed_client.slides.focus import sharpness, sharpness_at
from pathfed_common.plan import QualityPlan
from pathfed_common.synthetic import synthetic_tiles

BOUND = QualityPlan().min_sharpness


def blurred(tile, sigma, *, quality=80, noise=0.0) -> np.ndarray:
    pixels = np.asarray(Image.fromarray(tile).filter(ImageFilter.GaussianBlur(sigma)) if sigma else tile)
    if noise:
        pixels = np.clip(pixels + np.random.default_rng(0).normal(0, noise, pixels.shape), 0, 255).astype(np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "JPEG", quality=quality)
    return np.asarray(Image.open(data))


def share_in_focus(tiles, **changes) -> float:
    return float(np.mean([sharpness(blurred(tile, **changes)) >= BOUND for tile in tiles]))


def test_real_tiles_are_in_focus(real_tiles):
    assert np.mean([sharpness(tile) >= BOUND for tile in real_tiles[0]]) > 0.995


@pytest.mark.parametrize(("sigma", "most"), [(1.5, 0.05), (2, 0.005), (3, 0), (4, 0)])
def test_real_tiles_blurred_by_a_known_sigma_are_not(real_tiles, sigma, most):
    assert share_in_focus(real_tiles[0][::6], sigma=sigma) <= most


def test_compression_alone_does_not_put_a_tile_out_of_focus(real_tiles):
    assert share_in_focus(real_tiles[0][::6], sigma=0, quality=80) > 0.97


def test_a_camera_s_noise_does_not_hide_blur(real_tiles):
    assert share_in_focus(real_tiles[0][::6], sigma=2.5, noise=3) < 0.05


def test_painted_tiles_are_in_focus_and_blurred_ones_are_not():
    tiles = synthetic_tiles(20, 224, 0)
    assert share_in_focus(tiles, sigma=0, quality=90) == 1
    assert share_in_focus(tiles, sigma=2) == 0


def test_stronger_stain_does_not_change_it():
    tile = synthetic_tiles(1, 224, 3)[0]
    weak = (255 - (255 - tile.astype(float)) * 0.5).astype(np.uint8)
    assert sharpness(weak) == pytest.approx(sharpness(tile), rel=0.03)


def test_a_tile_read_twice_as_fine_is_judged_at_the_plan_s_resolution():
    tile = synthetic_tiles(1, 224, 1)[0]
    fine = tile.repeat(2, axis=0).repeat(2, axis=1)
    assert sharpness_at(fine, 224) == pytest.approx(sharpness(tile), rel=1e-4)
    assert sharpness(fine) < BOUND


def test_reducing_by_a_fraction_keeps_means():
    fine = synthetic_tiles(1, 300, 1)[0]
    area = np.asarray(Image.fromarray(fine).resize((224, 224), Image.Resampling.BOX))
    assert sharpness_at(fine, 224) == pytest.approx(sharpness(area), rel=0.1)


def test_one_colour_has_no_sharpness():
    assert sharpness(np.full((64, 64, 3), 200, np.uint8)) == 0


def test_pictures_too_small_are_refused():
    with pytest.raises(ValueError, match="16 x 16"):
        sharpness(np.zeros((15, 64, 3), np.uint8))
    with pytest.raises(ValueError, match="at least 16"):
        sharpness_at(np.zeros((64, 64, 3), np.uint8), 8)
