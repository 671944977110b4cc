"""Where on a slide there is tissue, judged on a thumbnail of a few um/px.

Optical density rather than brightness, so that one threshold fits weak and strong stains: with light I0 from empty glass a pixel I has
density log10(I0 / I) in each channel (Beer-Lambert). The threshold on the mean density is Otsu's (1979, IEEE Trans SMC 9:62), held
between two guards: on a slide of nothing but glass Otsu would split its noise, on one of nothing but tissue its shades.
"""

import numpy as np
from numpy.typing import NDArray

from pathfed_client.slides.reader import Thumbnail

#: um/px at which thumbnails are judged: a tile of 112 um is then 14 pixels wide.
THUMBNAIL_MPP = 8.0
#: Guards of the threshold, mean optical density.
DENSITY_FLOOR, DENSITY_CEILING = 0.045, 0.07

_COLOURED = 0.03  # least difference between the densest and the lightest channel: dust, shadows and black ink are grey
_GLASS_FLOOR = 200.0  # glass is assumed at least this bright, or a slide without any would take its palest tissue for it


def tissue_mask(thumbnail: Thumbnail) -> NDArray[np.bool_]:
    """Tissue on a brightfield thumbnail.

    Grey things (dust, shadows, black ink) and green ink are left out; red and blue ink look like stain and are not told apart.

    Args:
        thumbnail: of a brightfield slide.

    Returns:
        bool (rows, columns); false where the file holds no data.
    """
    density = _density(thumbnail)
    mean = density.mean(axis=2)
    bound = min(max(_otsu(mean[thumbnail.valid]), DENSITY_FLOOR), DENSITY_CEILING)
    red, green, blue = density[..., 0], density[..., 1], density[..., 2]
    coloured = density.max(axis=2) - density.min(axis=2) > _COLOURED
    green_ink = (green < 0.8 * red) & (green < 0.8 * blue)
    # A majority vote among neighbours drops specks and closes pinholes.
    votes = _box((mean > bound) & coloured & ~green_ink & thumbnail.valid)
    return np.asarray((votes > 0.5) & thumbnail.valid)


def _density(thumbnail: Thumbnail) -> NDArray[np.float64]:
    """Optical density (rows, columns, 3) against the slide's own glass, over 3 x 3 neighbourhoods, at least 0."""
    pixels = thumbnail.pixels.astype(np.float64)
    seen = pixels[thumbnail.valid]
    glass = np.maximum(np.percentile(seen, 98, axis=0), _GLASS_FLOOR) if len(seen) else np.full(3, 255.0)
    smooth = np.stack([_box(pixels[..., channel]) for channel in range(3)], axis=2)
    return np.asarray(np.maximum(np.log10(glass + 1) - np.log10(smooth + 1), 0))


def _box(values: NDArray[np.float64] | NDArray[np.bool_]) -> NDArray[np.float64]:
    """Mean over 3 x 3 neighbours; beyond the edge the nearest row or column repeats."""
    padded = np.pad(np.asarray(values, np.float64), 1, mode="edge")
    rows = padded[:-2] + padded[1:-1] + padded[2:]
    return np.asarray((rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]) / 9)


def _otsu(values: NDArray[np.float64], bins: int = 128) -> float:
    """The threshold between the two classes with the largest variance between them; 0 for no values."""
    if len(values) == 0:
        return 0.0
    counts, edges = np.histogram(values, bins=bins, range=(0.0, 1.0))
    centres = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts)
    above = below[-1] - below
    total = np.cumsum(counts * centres)
    both = (below > 0) & (above > 0)
    if not both.any():
        return 0.0
    gap = total[both] / below[both] - (total[-1] - total[both]) / above[both]
    return float(edges[1:][both][np.argmax(below[both] * above[both] * gap**2)])
