import numpy as np
import pytest
from thumbnails import INKS, inked, painted, sheets, thumbnail

from pathfed_client.io.openslide_reader import OpenSlideReader
from pathfed_client.slides.masks import optical_density
from pathfed_client.slides.pen import pen_mask
from pathfed_client.slides.tissue import tissue_mask

FAINT = {"sky blue": (90, 120, 200), "crimson": (170, 20, 50)}


def found(pixels) -> np.ndarray:
    return pen_mask(optical_density(thumbnail(pixels)))


@pytest.fixture(scope="module")
def real_sheets(real_tiles):
    return list(sheets(real_tiles[0]))


def test_hardly_a_cell_of_the_real_tiles_is_taken_for_ink(real_sheets):
    taken = [found(pixels)[there].mean() for pixels, there in real_sheets]
    assert len(taken) > 40
    assert np.mean(taken) < 1e-4
    assert max(taken) < 2e-3


@pytest.mark.parametrize(
    ("name", "mpp"), [("CMU-1-Small-Region.svs", 0.5), ("TCGA-CR-7395-01A-01-TS1.svs", 0.25), ("philips_like_CMU.tiff", 0.5)]
)
def test_no_tissue_of_the_real_slides_is_taken_for_ink(data_folder, name, mpp):
    with OpenSlideReader(data_folder / "slides" / "ok" / name, name=name) as reader:
        small = reader.thumbnail(round(max(reader.dimensions) * mpp / 8))
    assert (pen_mask(optical_density(small)) & tissue_mask(small)).sum() == 0


@pytest.mark.parametrize("ink", INKS)
def test_a_stroke_is_found_on_glass_and_over_tissue_and_nothing_beside_it(real_sheets, ink):
    random = np.random.default_rng(0)
    on_tissue, on_glass = [], []
    for pixels, there in real_sheets[::5]:
        marked, truth = inked(pixels, INKS[ink], random)
        mask = found(marked)
        on_tissue.append(mask[truth & there].mean())
        on_glass.append(mask[truth & ~there].mean())
        assert mask[~truth].mean() < 0.01
    assert np.mean(on_tissue) > 0.85
    assert np.mean(on_glass) > 0.75


@pytest.mark.parametrize("ink", FAINT)
def test_faint_ink_is_found_in_part(real_sheets, ink):
    random = np.random.default_rng(0)
    shares = []
    for pixels, _ in real_sheets[::10]:
        marked, truth = inked(pixels, FAINT[ink], random)
        shares.append(found(marked)[truth].mean())
    assert np.mean(shares) > 0.2


@pytest.mark.parametrize("laboratory", range(5))
def test_painted_tissue_is_not_ink(laboratory):
    light, _ = painted(laboratory)
    assert not found(light * 243).any()


def test_dots_of_ink_too_small_for_a_stroke_are_left():
    pixels = np.full((60, 60, 3), 243.0)
    pixels[20:22, 20:22] = (30, 30, 32)
    assert not found(pixels).any()
