"""The tissue mask against known outlines, beside the usual methods: fixed and Otsu thresholds on saturation."""

import io
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from thumbnails import Mask, dice, painted, reduced, sheet, thumbnail

from pathfed_client.io.openslide_reader import OpenSlideReader
from pathfed_client.slides.reader import Thumbnail
from pathfed_client.slides.tissue import _otsu, tissue_mask

Pixels = NDArray[np.generic]
_LIGHT = (243, 242, 244)


def saturation(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    high = pixels.max(axis=2).astype(np.float32)
    return np.asarray((high - pixels.min(axis=2)) / np.maximum(high, 1), np.float32)


def fixed(bound: float) -> Callable[[Thumbnail], Mask]:
    return lambda small: (saturation(small.pixels) > bound) & small.valid


def otsu(small: Thumbnail) -> Mask:
    values = saturation(small.pixels)
    return (values > _otsu(values[small.valid])) & small.valid


RIVALS: dict[str, Callable[[Thumbnail], Mask]] = {"0.05": fixed(0.05), "0.07": fixed(0.07), "0.10": fixed(0.10), "otsu": otsu}


def jpeg(pixels: NDArray[np.uint8], quality: int) -> NDArray[np.uint8]:
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "JPEG", quality=quality)
    return np.asarray(Image.open(data))


def variants(light: NDArray[np.float32], truth: Mask) -> dict[str, tuple[Thumbnail, Mask]]:
    """One painted slide as different stains, scanners and accidents would show it."""
    random = np.random.default_rng(9)
    rows, columns = truth.shape

    def seen(passed: NDArray[np.float32], tone: tuple[float, float, float] = _LIGHT, noise: float = 1.5) -> Thumbnail:
        return thumbnail(passed * np.array(tone, np.float32) + random.normal(0, noise, passed.shape))

    padded, filled = seen(light).pixels.copy(), seen(light, (238, 232, 238)).pixels.copy()
    padded[: rows // 5] = 0
    below = truth.copy()
    below[: rows // 5] = False
    far = ~np.kron(reduced(np.pad(truth, ((0, -rows % 8), (0, -columns % 8))), 8) > 0, np.ones((8, 8), bool))[:rows, :columns]
    filled[far] = 255
    shadow = light.copy()
    shadow[6:9] *= 0.75
    shadow[:, -2:] *= 0.6
    uneven = light * np.linspace(0.86, 1, columns, dtype=np.float32)[None, :, None]
    return {
        "plain": (seen(light), truth),
        "pale": (seen(light**0.35), truth),
        "very pale": (seen(light**0.2), truth),
        "dense": (seen(light**1.6), truth),
        "yellow glass": (seen(light, (238, 230, 205)), truth),
        "pink glass": (seen(light, (244, 228, 238)), truth),
        "dim": (seen(light, (205, 203, 207)), truth),
        "uneven light": (seen(uneven), truth),
        "jpeg 30": (thumbnail(jpeg(seen(light, noise=3).pixels, 30)), truth),
        "black padding": (thumbnail(padded), below),
        "white fill": (thumbnail(filled), truth),
        "coverslip": (seen(shadow), truth),
        "noise": (seen(light, noise=6), truth),
    }


@pytest.fixture(scope="module")
def cases() -> list[tuple[str, Thumbnail, Mask]]:
    return [(name, *case) for laboratory in range(5) for name, case in variants(*painted(laboratory)).items()]


def test_painted_tissue_is_found_under_every_stain_scanner_and_accident(cases):
    scores = {f"{name} {index}": dice(tissue_mask(small), truth) for index, (name, small, truth) in enumerate(cases)}
    assert min(scores.values()) > 0.93, min(scores, key=lambda name: scores[name])
    assert np.mean(list(scores.values())) > 0.965


@pytest.mark.parametrize("rival", RIVALS)
def test_it_beats_thresholds_on_saturation(cases, rival):
    ours = np.array([dice(tissue_mask(small), truth) for _, small, truth in cases])
    theirs = np.array([dice(RIVALS[rival](small), truth) for _, small, truth in cases])
    assert ours.mean() > theirs.mean() + 0.003
    if rival != "otsu":
        assert ours.min() > theirs.min() + 0.1, "a fixed bound fails altogether somewhere"


@pytest.mark.parametrize("kind", ["lung_aca", "lung_scc", "lung_n"])
def test_real_tiles_on_glass_are_found_whole(real_tiles, kind):
    tiles, kinds = real_tiles
    mine = np.stack([reduced(tile, 16) for tile, name in zip(tiles, kinds, strict=True) if name == kind])
    ours, theirs = [], []
    for tone in range(5):
        random = np.random.default_rng(tone)
        pixels, truth = sheet(mine[random.permutation(len(mine))[:25]], tone, random)
        ours.append(dice(tissue_mask(thumbnail(pixels)), truth))
        theirs.append(dice(otsu(thumbnail(pixels)), truth))
    assert min(ours) > 0.95
    if kind == "lung_n":
        assert np.mean(ours) > np.mean(theirs) + 0.1, "air spaces and thin walls"


@pytest.mark.parametrize(
    ("name", "mpp", "low", "high"),
    [
        ("CMU-1-Small-Region.svs", 0.5, 0.33, 0.42),
        ("TCGA-CR-7395-01A-01-TS1.svs", 0.25, 0.58, 0.68),
        ("philips_like_CMU.tiff", 0.5, 0.34, 0.46),
    ],
)
def test_share_of_tissue_on_real_slides_is_what_an_eye_sees(data_folder, name, mpp, low, high):
    with OpenSlideReader(data_folder / "slides" / "ok" / name, name=name) as reader:
        small = reader.thumbnail(round(max(reader.dimensions) * mpp / 8))
    assert low < tissue_mask(small).mean() < high
