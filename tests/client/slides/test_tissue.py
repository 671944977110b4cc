import numpy as np
import pytest

from pathfed_client.slides.reader import Thumbnail
from pathfed_client.slides.tissue import tissue_mask
from pathfed_common.synthetic import STAINS, draw_anatomy, draw_stain, paint


def thumbnail(pixels, valid=None) -> Thumbnail:
    pixels = np.clip(pixels, 0, 255).astype(np.uint8)
    return Thumbnail(pixels, np.ones(pixels.shape[:2], bool) if valid is None else valid, cell=16)


def glass(seed=0, size=80, colour=(242, 242, 243)):
    return np.random.default_rng(seed).normal(colour, 2, (size, size, 3))


def test_nothing_but_glass_holds_no_tissue():
    assert tissue_mask(thumbnail(glass())).sum() == 0


def test_nothing_but_tissue_is_all_tissue():
    pixels = np.random.default_rng(0).normal((190, 130, 175), 15, (80, 80, 3))
    assert tissue_mask(thumbnail(pixels)).mean() > 0.99


@pytest.mark.parametrize("colour", [(185, 110, 165), (235, 205, 222), (90, 60, 130), (160, 120, 90)], ids=["pink", "pale", "blue", "brown"])
def test_stained_island_is_found_with_its_outline(colour):
    pixels = glass()
    pixels[20:60, 30:70] = np.random.default_rng(1).normal(colour, 6, (40, 40, 3))
    mask = tissue_mask(thumbnail(pixels))
    truth = np.zeros((80, 80), bool)
    truth[20:60, 30:70] = True
    assert (mask != truth)[22:58, 32:68].mean() < 0.02
    assert mask[~truth].mean() < 0.05


@pytest.mark.parametrize("colour", [(40, 40, 42), (205, 205, 207)], ids=["black ink", "shadow"])
def test_ink_and_shadow_are_not_tissue(colour):
    pixels = glass()
    pixels[20:60, 30:70] = colour
    assert tissue_mask(thumbnail(pixels)).mean() < 0.02


def test_holes_in_the_file_are_not_tissue():
    pixels = glass()
    pixels[10:70, 10:70] = (180, 110, 160)
    valid = np.ones((80, 80), bool)
    valid[:, 40:] = False
    mask = tissue_mask(thumbnail(pixels, valid))
    assert mask[20:60, 15:38].all()
    assert not mask[:, 40:].any()


def test_a_slide_without_data_has_no_tissue():
    assert not tissue_mask(thumbnail(glass(), np.zeros((80, 80), bool))).any()


def test_specks_are_dropped_and_pinholes_closed():
    pixels = glass()
    pixels[5, 5] = (150, 60, 130)
    pixels[30:60, 30:60] = (180, 110, 160)
    pixels[45, 45] = 242
    mask = tissue_mask(thumbnail(pixels))
    assert not mask[:10, :10].any()
    assert mask[45, 45]


@pytest.mark.parametrize("laboratory", range(len(STAINS)))
def test_painted_tissue_of_every_laboratory_is_found(laboratory):
    random = np.random.default_rng(laboratory)
    picture = paint(768, 768, random, draw_stain(random, laboratory), draw_anatomy(random))
    small = picture.reshape(96, 8, 96, 8, 3).mean(axis=(1, 3))
    mask = tissue_mask(thumbnail(small))
    stained = small.max(axis=2) - small.min(axis=2) > 45
    assert mask[stained].mean() > 0.95
    assert not mask[0].any()
    assert 0.15 < mask.mean() < 0.9
