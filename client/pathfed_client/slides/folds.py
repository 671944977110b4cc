"""Folds on a thumbnail: tissue lying on itself, dark ridges relative to the slide's own tissue.

A fold is two further layers of the same section, so its density is up to three times that of the tissue around it, whatever the stain.
A cell counts as fold when it is `density` times as dense as the slide's median tissue and `LOCAL` times as dense as the tissue within
`RADIUS` cells: dense tissue over a wide area is no ridge.

Measured at 8 um/px (tests/client/slides/test_folds.py). With darkness 2.5, the plan's default, removed by mistake: nothing of the real lung
tiles, 2.4% of the CMU slide (its cornified skin is as dark and as narrow as a fold; one tile of 52), nothing of painted slides; found of
ridges 64 um wide painted over them: 43 to 63% where three layers lie on each other, as in a fold, and 0 to 25% of two. With darkness 2.0:
0.2%, 6.9% (6 tiles of 52), nothing; 46 to 78% and 31 to 48%. The default errs towards keeping tissue.
"""

import numpy as np

from pathfed_client.slides.masks import Mask, Plane, majority, mean_density, sampled, wide_mean

#: How much denser than the tissue around it a fold is.
LOCAL = 1.6
#: Cells to each side that count as around it: 0.2 mm at 8 um/px.
RADIUS = 25

_LEAST_CELLS = 50  # on less tissue than this there is no ordinary density to compare with


def fold_mask(density: Plane, tissue: Mask, *, darkness: float) -> Mask:
    """Where tissue is folded.

    Args:
        density: float32 (rows, columns, 3) of `masks.optical_density`.
        tissue: bool (rows, columns), free of ink.
        darkness: how many times as dense as the slide's median tissue a fold is, above 1.

    Returns:
        bool (rows, columns), a part of `tissue`.

    Raises:
        ValueError: a darkness of 1 or less.
    """
    if not darkness > 1:
        raise ValueError(f"darkness must be above 1, got {darkness}")
    if tissue.sum() < _LEAST_CELLS:
        return np.zeros_like(tissue)
    mean = mean_density(density)
    dark = tissue & (mean > darkness * float(np.median(sampled(mean[tissue]))))
    if not dark.any():
        return np.asarray(dark)
    around = wide_mean(mean * tissue, RADIUS) / np.maximum(wide_mean(tissue, RADIUS), 1e-6)
    return np.asarray(majority(dark & (mean > LOCAL * around), 1) & tissue)
