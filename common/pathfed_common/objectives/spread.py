"""Terms that keep the features of a patient's tiles apart. Only tiles of one patient are compared; a single tile has no term, it is 0.

Legend of shape suffixes: N tiles (own part), A tiles of all parts, D width.
"""

import math
from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from pathfed_common.objectives.across import ALONE, Across, fine

#: (features (N, D), parts of the patient) -> this part's share of the patient's term, a scalar.
Spread = Callable[[Tensor, Across], Tensor]

#: Concentration of the von Mises-Fisher kernel.
KAPPA = 5.0
_EPS = 1e-8


def kde(features_ND: Tensor, across: Across = ALONE) -> Tensor:
    """Mean over the tiles of the log density that the other tiles make there: 1/N sum_i log(1/(N-1) sum_{j != i} exp(kappa z_i . z_j)).

    z are the features on the unit sphere. Lower is more uniform. From -kappa to kappa, which all tiles on one spot have.

    Source: the uniformity loss of Wang and Isola (2020, arXiv:2005.10242, section 4.1) with a von Mises-Fisher kernel, a kernel density
    estimate such as Virchow2 takes in place of KoLeo (Zimmermann et al. 2024, arXiv:2408.00738), smooth where KoLeo's logarithm of a
    distance is not: neighbouring tiles of a slide are nearly equal.
    """
    own, tiles = across.place(len(features_ND))
    unit_ND = functional.normalize(fine(features_ND), dim=-1)
    if tiles == 1:
        return unit_ND.new_zeros(())
    closeness_NA = KAPPA * (unit_ND @ across.gather(unit_ND).T)
    others_NA = closeness_NA.masked_fill(_self(closeness_NA, own), -math.inf)
    return (others_NA.logsumexp(-1) - math.log(tiles - 1)).sum() / tiles


def koleo(features_ND: Tensor, across: Across = ALONE) -> Tensor:
    """Minus the mean log distance of each tile to its nearest other tile, on the unit sphere.

    Source: the differential entropy estimate of Kozachenko and Leonenko as a regulariser, Sablayrolles et al. (2019, arXiv:1806.03198,
    section 3.2). At most 19 for tiles in one spot.
    """
    own, tiles = across.place(len(features_ND))
    unit_ND = functional.normalize(fine(features_ND), dim=-1)
    if tiles == 1:
        return unit_ND.new_zeros(())
    all_AD = across.gather(unit_ND)
    with torch.no_grad():
        closeness_NA = unit_ND @ all_AD.T
        nearest_N = closeness_NA.masked_fill(_self(closeness_NA, own), -2.0).argmax(-1)
    distance_N = torch.linalg.vector_norm(unit_ND - all_AD[nearest_N] + _EPS, dim=-1)
    out: Tensor = -(distance_N + _EPS).log().sum() / tiles
    return out


def _self(pairs_NA: Tensor, own: int) -> Tensor:
    """Where a tile meets itself; `own` is the first own tile's index among all."""
    rows = torch.arange(pairs_NA.shape[0], device=pairs_NA.device)[:, None] + own
    return rows == torch.arange(pairs_NA.shape[1], device=pairs_NA.device)


SPREADS: Final[dict[str, Spread]] = {"kde": kde, "koleo": koleo}
