import numpy as np
import pytest
from thumbnails import folded, painted, sheets, thumbnail

from pathfed_client.io.openslide_reader import OpenSlideReader
from pathfed_client.slides.folds import fold_mask
from pathfed_client.slides.masks import optical_density
from pathfed_client.slides.tissue import tissue_of
from pathfed_common.plan import QualityPlan

DARKNESS = QualityPlan().fold_darkness


def found(small) -> tuple[np.ndarray, np.ndarray]:
    density = optical_density(small)
    tissue = tissue_of(density, small.valid)
    return fold_mask(density, tissue, darkness=DARKNESS), tissue


def test_hardly_any_real_tissue_is_taken_for_a_fold(real_tiles):
    taken = [(mask & tissue).sum() / tissue.sum() for mask, tissue in (found(thumbnail(pixels)) for pixels, _ in sheets(real_tiles[0]))]
    assert np.mean(taken) < 0.003
    assert max(taken) < 0.02


@pytest.mark.parametrize(("name", "mpp", "most"), [("CMU-1-Small-Region.svs", 0.5, 0.04), ("TCGA-CR-7395-01A-01-TS1.svs", 0.25, 0.003)])
def test_little_of_the_real_slides_is_taken_for_a_fold(data_folder, name, mpp, most):
    with OpenSlideReader(data_folder / "slides" / "ok" / name, name=name) as reader:
        mask, tissue = found(reader.thumbnail(round(max(reader.dimensions) * mpp / 8)))
    assert mask.sum() / tissue.sum() < most


@pytest.mark.parametrize("laboratory", range(5))
def test_a_threefold_ridge_is_found_and_unfolded_tissue_is_not(laboratory):
    light, tissue = painted(laboratory)
    assert found(thumbnail(light * 243))[0][tissue].mean() < 0.005
    shares, beside = [], []
    for seed in range(3):
        marked, truth = folded(light * 243, tissue, np.random.default_rng(seed))
        mask, _ = found(thumbnail(marked))
        shares.append(mask[truth].mean())
        beside.append(mask[tissue & ~truth].mean())
    assert np.mean(shares) > 0.4
    assert np.mean(beside) < 0.03


def test_dense_tissue_everywhere_is_no_fold():
    pixels = np.random.default_rng(0).normal((110, 60, 120), 4, (60, 60, 3))
    assert not found(thumbnail(pixels))[0].any()


def test_a_slide_without_tissue_has_no_fold():
    assert not found(thumbnail(np.full((40, 40, 3), 243.0)))[0].any()


def test_a_darkness_that_means_nothing_is_refused():
    with pytest.raises(ValueError, match="above 1"):
        fold_mask(np.zeros((4, 4, 3), np.float32), np.ones((4, 4), bool), darkness=1.0)
