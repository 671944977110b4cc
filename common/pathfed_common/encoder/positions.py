"""Position embeddings for images of another size than the one they were made for.

Legend of shape suffixes: N tiles or 1, L patches, D token width, r and c rows and columns of the old grid, R and C of the new one.
"""

import torch
from torch import Tensor
from torch.nn import functional

Grid = tuple[int, int]


def resample_positions(positions_NLD: Tensor, old: Grid, new: Grid) -> Tensor:
    """Position embedding of a grid of patches, resampled to another grid: bicubic with antialias, as timm's `resample_abs_pos_embed`.

    Resampling is linear and separable, so it is done by one small matrix for rows and one for columns. The values are timm's to float32's
    rounding; the backward is a matrix product, which, unlike that of torch's interpolation on a GPU, gives the same bits each time.
    Computed in float32 (float64 for float64) whatever autocast says; differentiable.

    Args:
        positions_NLD: one row for each patch, row by row of the grid.
        old: rows and columns of the grid it was made for.
        new: rows and columns wanted.

    Returns:
        (N, R * C, D), in the type of `positions_NLD`; the very tensor given if the grids are the same.

    Raises:
        ValueError: `positions_NLD` has not one row for each patch of `old`.
    """
    if positions_NLD.ndim != 3 or positions_NLD.shape[1] != old[0] * old[1]:
        raise ValueError(f"positions must be (N, {old[0] * old[1]}, D) for a grid of {old}, got {tuple(positions_NLD.shape)}")
    if old == new:
        return positions_NLD
    with torch.autocast(positions_NLD.device.type, enabled=False):
        exact_NLD = positions_NLD.to(torch.promote_types(positions_NLD.dtype, torch.float32))
        rows_Rr, columns_Cc = (_matrix(before, after, exact_NLD) for before, after in zip(old, new, strict=True))
        grid_NrcD = exact_NLD.unflatten(1, old)
        sampled = torch.einsum("Rr,NrcD->NRcD", rows_Rr, grid_NrcD)
        sampled = torch.einsum("Cc,NRcD->NRCD", columns_Cc, sampled)
        return sampled.flatten(1, 2).to(positions_NLD.dtype)


def _matrix(before: int, after: int, like: Tensor) -> Tensor:
    """The resampling of one axis, (after, before): what torch's own interpolation makes of each unit vector."""
    with torch.no_grad():
        # As one square picture: given pictures one pixel wide, torch 2.13's antialiased interpolation repeats the first row.
        units = torch.eye(before, device=like.device, dtype=like.dtype).view(1, 1, before, before)
        return functional.interpolate(units, size=(after, before), mode="bicubic", antialias=True).view(after, before)
