"""Where on a slide there is tissue, judged on a thumbnail of a few um/px.

Optical density rather than saturation, so that one threshold fits weak and strong stains, yellow and pink glass, dim and uneven light.
What tissue has and glass, dust, shadows and black ink lack is *colour in density*: the densest channel above the lightest. The score is
the mean of that difference and of the mean density; its threshold is Otsu's (1979, IEEE Trans SMC 9:62), held between two guards: on a
slide of nothing but glass Otsu would split its noise, on one of nothing but tissue its shades.

Measured (tests/client/slides/test_tissue_truth.py: Dice against known outlines under 5 stain tones of 16 kinds of slide: painted ones
plain, pale, very pale, dense, on yellow, pink and dim glass, in uneven light, at JPEG quality 30, with black padding, white fill,
coverslip shadow and noise; and squares of the three classes of real lung tiles on glass): mean 0.98, worst 0.96. A fixed saturation
threshold has 0.92, worst 0.51 (at 0.05); 0.94, 0.51 (0.07); 0.93, 0.39 (0.10): they fail on yellow or pink glass or on pale tissue. Otsu
on saturation has 0.96, worst 0.77: on lung with air spaces it has 0.79 where this has 0.98.
"""

import numpy as np

from pathfed_client.slides.masks import Mask, Plane, colour_in_density, majority, mean_density, optical_density, sampled
from pathfed_client.slides.reader import Thumbnail

#: um/px at which thumbnails are judged: a tile of 112 um is then 14 pixels wide.
THUMBNAIL_MPP = 8.0
#: Guards of the threshold, score of tissue.
SCORE_FLOOR, SCORE_CEILING = 0.02, 0.05

_COLOURED = 0.02  # least difference between the densest and the lightest channel: dust, shadows and black ink are grey
_DENSE = 0.01  # least mean density: a faint tint in glass is none


def tissue_mask(thumbnail: Thumbnail) -> Mask:
    """Stained things on a brightfield thumbnail: tissue, and coloured ink, which `pen.pen_mask` finds.

    Args:
        thumbnail: of a brightfield slide.

    Returns:
        bool (rows, columns); false where the file holds no data.
    """
    return tissue_of(optical_density(thumbnail), thumbnail.valid)


def tissue_of(density: Plane, valid: Mask) -> Mask:
    """`tissue_mask` of a thumbnail whose `optical_density` is known.

    Args:
        density: float32 (rows, columns, 3).
        valid: bool (rows, columns), where the file holds data.
    """
    mean = mean_density(density)
    colour = colour_in_density(density)
    score = (mean + colour) / 2
    bound = min(max(_otsu(sampled(score[valid])), SCORE_FLOOR), SCORE_CEILING)
    # A majority vote among neighbours drops specks and closes pinholes.
    found = majority((score > bound) & (colour > _COLOURED) & (mean > _DENSE) & valid, 1)
    return np.asarray(found & valid)


def _otsu(values: Plane, bins: int = 256) -> float:
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
