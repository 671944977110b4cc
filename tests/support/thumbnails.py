"""Thumbnails whose truth is known: painted slides, real tiles on glass, and the marks that filters look for."""

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pathfed_client.slides.reader import Thumbnail
from pathfed_common.synthetic import STAINS, draw_anatomy, draw_stain, paint_with_tissue

Pixels = NDArray[np.float32]
Mask = NDArray[np.bool_]

CELL_PX = 16  # pixels at 0.5 um/px to a thumbnail cell of 8 um
TILE_CELLS = 14  # a real tile of 224 pixels
GLASS_CELLS = 16
#: Stain tones of five hospitals: factors on the optical density of R, G, B.
TONES = np.array([[1.00, 1.00, 1.00], [1.18, 0.92, 1.06], [0.84, 1.10, 0.94], [1.06, 1.16, 0.86], [0.92, 0.86, 1.14]])
#: RGB of ink on glass.
INKS = {
    "blue": (30, 60, 160),
    "dark blue": (20, 30, 90),
    "green": (30, 120, 60),
    "pale green": (70, 150, 80),
    "teal": (70, 130, 130),
    "red": (200, 30, 40),
    "pale red": (220, 60, 70),
    "black": (30, 30, 32),
    "grey-black": (50, 48, 55),
}
_LIGHT = 244.0


def reduced(pixels: NDArray[np.generic], factor: int) -> Pixels:
    """Means of blocks; what does not fill a block is cut off."""
    rows, columns = pixels.shape[0] // factor, pixels.shape[1] // factor
    cut = pixels[: rows * factor, : columns * factor].astype(np.float32)
    return np.asarray(cut.reshape(rows, factor, columns, factor, *pixels.shape[2:]).mean(axis=(1, 3)), np.float32)


def thumbnail(pixels: NDArray[np.generic], valid: Mask | None = None) -> Thumbnail:
    whole = np.ones(pixels.shape[:2], bool) if valid is None else valid
    return Thumbnail(np.clip(pixels, 0, 255).astype(np.uint8), whole, cell=float(CELL_PX))


@lru_cache(maxsize=8)
def painted(laboratory: int, side: int = 2048) -> tuple[Pixels, Mask]:
    """A painted slide as light that passes, 0 to 1 of each channel, at thumbnail size, and where its tissue is."""
    random = np.random.default_rng(laboratory)
    picture, tissue = paint_with_tissue(side, side, random, draw_stain(random, laboratory), draw_anatomy(random))
    light = np.array(STAINS[laboratory].light, np.float32)
    return np.asarray(reduced(picture, CELL_PX) / light, np.float32), reduced(tissue, CELL_PX) > 0.5


def load_tiles(folder: Path) -> tuple[NDArray[np.uint8], list[str]]:
    """The real lung tiles (n, 224, 224, 3), and each one's class."""
    paths = sorted((folder / "tiles" / "lc25000_lung").rglob("*.jpeg"))
    tiles = np.stack([np.asarray(Image.open(path).convert("RGB").resize((224, 224))) for path in paths])
    return tiles, [path.parent.name for path in paths]


def sheet(small: Pixels, tone: int, random: np.random.Generator) -> tuple[Pixels, Mask]:
    """Tiles in a square on noisy glass, as make_hospitals.py lays them, in one hospital's tone; and where they lie.

    Args:
        small: (n, 14, 14, 3), tiles at thumbnail size.
        tone: index into `TONES`.
        random: of the glass.
    """
    side = int(np.sqrt(len(small)))
    tiles = np.asarray(255 * (np.clip(small[: side * side], 1, 255) / 255) ** TONES[tone], np.float32)
    size = side * TILE_CELLS + 2 * GLASS_CELLS
    pixels = random.normal(242, 0.2, (size, size, 3)).astype(np.float32)
    inner = np.s_[GLASS_CELLS:-GLASS_CELLS, GLASS_CELLS:-GLASS_CELLS]
    pixels[inner] = tiles.reshape(side, side, TILE_CELLS, TILE_CELLS, 3).swapaxes(1, 2).reshape(side * TILE_CELLS, side * TILE_CELLS, 3)
    there = np.zeros((size, size), bool)
    there[inner] = True
    return pixels, there


def sheets(tiles: NDArray[np.uint8], per_sheet: int = 36) -> Iterator[tuple[Pixels, Mask]]:
    """Every tile once, mixed, on sheets of changing tone."""
    random = np.random.default_rng(3)
    small = np.stack([reduced(tile, CELL_PX) for tile in tiles])[random.permutation(len(tiles))]
    for number, start in enumerate(range(0, len(small) - per_sheet + 1, per_sheet)):
        yield sheet(small[start : start + per_sheet], number % len(TONES), random)


def dice(found: Mask, truth: Mask) -> float:
    return float(2 * (found & truth).sum() / max(1, found.sum() + truth.sum()))


def stroke(shape: tuple[int, int], random: np.random.Generator, width: float) -> Pixels:
    """A curved stroke across a picture, 0 to 1, `width` cells wide."""
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    along = np.linspace(0, 1, 200)[:, None, None]
    a, b, c = random.uniform(0.15, 0.85, 3)
    y = (a + (b - a) * along + 0.12 * np.sin(6 * (along + c))) * shape[0]
    distance = np.sqrt(((rows - y) ** 2 + (columns - (0.05 + 0.9 * along) * shape[1]) ** 2).min(axis=0))
    return np.asarray(np.clip(width / 2 - distance + 0.5, 0, 1), np.float32)


def inked(pixels: Pixels, colour: tuple[int, int, int], random: np.random.Generator, width: float = 40) -> tuple[Pixels, Mask]:
    """A pen mark over a slide: ink takes its share of the light, whatever lies below it. Returns where it is, too."""
    mark = stroke(pixels.shape[:2], random, width)
    strength = (mark * random.uniform(0.8, 1))[..., None]
    return np.asarray(pixels * (np.array(colour, np.float32) / _LIGHT) ** strength, np.float32), mark > 0.5


def folded(pixels: Pixels, tissue: Mask, random: np.random.Generator, *, layers: int = 3, width: float = 8) -> tuple[Pixels, Mask]:
    """A fold across the tissue: `layers` times its density along a ridge. Returns where it is, too."""
    ridge = stroke(pixels.shape[:2], random, width)[..., None]
    density = np.maximum(np.log10(_LIGHT) - np.log10(pixels + 1), 0)
    return (_LIGHT * 10 ** -(density * (1 + (layers - 1) * ridge))).astype(np.float32), (ridge[..., 0] > 0.5) & tissue
