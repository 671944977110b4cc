"""Pen marks on a thumbnail: blue, green, red and black ink, on glass and over tissue.

Ink is told from stain by which channels it absorbs, at densities stain does not reach once averaged over 8 um. Measured on the 1,480 real
lung tiles at 8 um/px under five stain tones, as largest values met: red over green density 1.36 where red is above 0.3, and 1.23 above 0.4;
blue over green density 0.58 where green is above 0.4 and red below 0.4 of it (blood included); colour over mean density never below 0.9 at
a mean above 0.3; mean density 0.42. The bounds below stand beyond all of these.

Removed by mistake (tests/client/slides/test_pen.py): none of 289,296 cells of those tiles, none of the real slides' tissue. Found of
strokes 0.3 mm wide at 80 to 100% strength, on glass and over tissue: 92 to 100% of blue, green, teal, red and black ink; 63% of crimson and
39% of sky blue, which are as light as stain. Specks of 50 um, such as the teal margin dye of the CMU slide, are not found: the tissue
between them is wanted. The bounds hold at 8 um/px; a much finer picture has darker cells (at 4 um/px, slightly looser bounds took 272 cells
of the TCGA slide's eosin for red ink).
"""

import numpy as np

from pathfed_client.slides.masks import Mask, Plane, box_mean, colour_in_density, majority, mean_density, near

#: Mean density above which a cell beside ink is taken for its fringe.
_FRINGE = 0.35

_BAND = 256  # rows judged at once, so that a large thumbnail's intermediate planes stay small


def pen_mask(density: Plane) -> Mask:
    """Where there is ink.

    Args:
        density: float32 (rows, columns, 3) of `masks.optical_density`.

    Returns:
        bool (rows, columns).
    """
    ink = np.concatenate([_ink(density[top : top + _BAND]) for top in range(0, len(density), _BAND)])
    if not ink.any():
        return ink
    core = box_mean(ink, 1) > 0.6
    if not core.any():
        return np.asarray(core)
    core = majority(np.asarray(core), 2)  # a stroke is wider than 40 um; what is smaller is blood or dust
    fringe = near(core, 3) & (mean_density(density) > _FRINGE)
    return np.asarray(core | fringe)


def _ink(density: Plane) -> Mask:
    """Cells no stain explains, of any of the four inks."""
    red, green, blue = density[..., 0], density[..., 1], density[..., 2]
    mean = mean_density(density)
    colour = colour_in_density(density)
    green_ink = (green < 0.9 * np.minimum(red, blue)) & (mean > 0.12)
    blue_ink = (blue < red) & (
        ((red > 1.4 * green) & (red > 0.3)) | ((red > 1.25 * green) & (red > 0.42)) | ((red > 0.95 * green) & (red > 0.6))
    )
    red_ink = ((red < 0.3 * green) & (blue > 0.7 * green) & (green > 0.45)) | ((red < 0.35 * green) & (blue > 0.6 * green) & (green > 0.7))
    black_ink = ((colour < 0.3 * mean) & (mean > 0.4)) | ((colour < 0.5 * mean) & (mean > 0.6))
    return np.asarray(green_ink | blue_ink | red_ink | black_ink)
