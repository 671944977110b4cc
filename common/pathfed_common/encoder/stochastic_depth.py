"""Stochastic depth (Huang et al. 2016, arXiv:1603.09382) under the privacy unit.

A residual branch is dropped for each tile on its own, by a number that comes from the patient's own source. So a tile's tokens go on
depending on that tile alone, and taking a patient away changes nothing for the others. (Dropping a branch for a whole batch, or drawing
from a generator that all patients share, would tie them together.)

Legend of shape suffixes: N tiles, B residual branches, two a block: attention, then MLP.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def drop_rates(depth: int, rate: float) -> NDArray[np.float64]:
    """Probability with which each branch is dropped, float64 (2 * depth,): ``l / depth * rate`` for both branches of block l = 1 .. depth.

    Source: Huang et al. (2016), section 3, the linear decay rule, equation 4.

    Raises:
        ValueError: `depth` is below 1, or `rate` is outside [0, 1).
    """
    if depth < 1:
        raise ValueError(f"depth must be at least 1, got {depth}")
    if not 0 <= rate < 1:
        raise ValueError(f"rate must be at least 0 and below 1, got {rate}")
    return np.repeat(np.arange(1, depth + 1) / depth * rate, 2)


def drop_path_factors(uniforms: NDArray[np.float64], tiles: int, depth: int, rate: float) -> Tensor:
    """Factors on the residual branches of each tile, float32 (N, 2 * depth) on the CPU: 0 where dropped, else ``1 / (1 - drop rate)``.

    The mean of every factor over the draws is 1, so that nothing has to be scaled when no branch is dropped.

    Args:
        uniforms: ``tiles * 2 * depth`` numbers in [0, 1) from the patient's own source, tile by tile; a branch whose number is below its
            drop rate is dropped.
        tiles: of one patient, N.
        depth: blocks of the encoder.
        rate: drop rate of the last block; the others follow by `drop_rates`.

    Raises:
        ValueError: as `drop_rates`, or another number of numbers.
    """
    rates_B = drop_rates(depth, rate)
    if uniforms.shape != (tiles * len(rates_B),):
        raise ValueError(f"uniforms must be {tiles * len(rates_B)} numbers for {tiles} tiles and {depth} blocks, got {uniforms.shape}")
    kept_NB = uniforms.reshape(tiles, len(rates_B)) >= rates_B
    return torch.from_numpy((kept_NB / (1 - rates_B)).astype(np.float32))
