"""Rules that bound what a few sites can do to a round's aggregate, beyond the norm that admission bounds.

They see released numbers alone, so privacy is as without them (post-processing). They change the noise: see docs/how-to/operators.md.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from pathfed_common.ids import SiteName


def trimmed_mean(values: Tensor, weights: Sequence[float], trim: int) -> Tensor:
    """The weighted mean of each number's values without the `trim` largest and the `trim` smallest (Yin et al. 2018, arXiv:1803.01498).

    Among n sites of equal weight, m <= trim of them hostile and h_1 <= ... <= h_(n-m) the honest values, it lies within [h_1, h_(n-m)]
    whatever the hostile values are; a single one moves it by at most (h_(n-trim) - h_trim) / (n - 2 trim). With public weights, the first
    bound holds as it stands. Of equal values, the first site's counts as the smaller.

    Args:
        values: float32, one row a site, in order of the site names; finite.
        weights: public weight of each site.
        trim: how many values are left out at each end.

    Returns:
        float32, one number a column: sums in order of the values, in float64, rounded once.

    Raises:
        ValueError: nothing would be left.
    """
    sites = len(values)
    if 2 * trim >= sites:
        raise ValueError(f"of {sites} values {trim} at each end cannot be left out")
    order = torch.from_numpy(np.argsort(values.numpy(), axis=0, kind="stable"))
    sizes = torch.tensor(weights, dtype=torch.float64)
    added = torch.zeros(values.shape[1], dtype=torch.float64)
    total = torch.zeros_like(added)
    for rank in range(trim, sites - trim):
        site = order[rank]
        weight = sizes[site]
        added += values.gather(0, site[None])[0].to(torch.float64).mul_(weight)
        total += weight
    return added.div_(total).to(torch.float32)


def norm_factors(norms: Mapping[SiteName, float]) -> dict[SiteName, float]:
    """min(1, median / norm) for each site: a longer update than the round's lower median counts as if it were as long as that.

    Bounding norms is due to Sun et al. 2019 (arXiv:1911.07963); that the bound follows the norms of the round, to Andrew et al. 2021
    (arXiv:1905.03871). Here the factor multiplies the site's weight, so that what is written stays a weighted mean.

    Args:
        norms: L2 norm of each site's update; finite, at least one.
    """
    median = sorted(norms.values())[(len(norms) - 1) // 2]
    return {site: 1.0 if norms[site] <= median else median / norms[site] for site in sorted(norms)}
