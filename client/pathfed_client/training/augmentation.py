"""From tiles as they are read to tensors as the objective takes them: turned, recoloured, normalised. On the CPU or the tiles' device.

Every draw is of one tile and its own, so that no patient's tensors depend on another's. Cutting a tile at a drawn place inside its source
(extended-context translation) happens while it is read, where it costs nothing (`slides.tiling`).

Colour: tiles are moved in the space of haematoxylin, eosin and residual density (Ruifrok and Johnston 2001, Anal Quant Cytol Histol
23:291), each stain by a factor and an offset of its own (Tellez et al. 2018, IEEE Trans Med Imaging 37:2126, "HED-light").
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pathfed_common.encoder.spec import PIXEL_MEAN, PIXEL_STD
from pathfed_common.privacy.randomness import KeyedRandom

#: Optical densities of red, green and blue in haematoxylin, eosin and residual, one row a stain (Ruifrok and Johnston 2001, table 1).
STAINS = ((0.650, 0.704, 0.286), (0.072, 0.990, 0.105), (0.268, 0.570, 0.776))
_CPU = torch.device("cpu")
#: Draws a tile takes: three for its position, six for its colour.
_DRAWS = 9


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """How tiles are changed, each by draws of its own.

    Attributes:
        flips: mirror left-right and top-bottom, each with probability 1/2.
        quarter_turns: turn by 0, 90, 180 or 270 degrees, each equally likely.
        hed_jitter: stains' factors are uniform on 1 ± this, their offsets on ± this (optical density, natural logarithm); 0 for none.
    """

    flips: bool = True
    quarter_turns: bool = True
    hed_jitter: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.hed_jitter < 1:
            raise ValueError(f"hed_jitter must be within 0 and below 1, got {self.hed_jitter}")


#: Tiles as they are.
NO_AUGMENTATION = Augmentation(flips=False, quarter_turns=False)


def training_tensors(tiles_NHWC: NDArray[np.uint8], augmentation: Augmentation, random: KeyedRandom, device: torch.device = _CPU) -> Tensor:
    """Tiles as the encoder takes them: normalised float32 (N, 3, H, W), contiguous, on `device`.

    Args:
        tiles_NHWC: uint8 RGB; square where quarter turns are asked for.
        augmentation: how they are changed.
        random: gives the draws, nine for each tile whatever the augmentation, so that tiles keep theirs when it changes.
        device: where colours are moved and normalised; tiles travel there as bytes.

    Raises:
        ValueError: not uint8, not of that shape, or not square though they are to be turned.
    """
    if tiles_NHWC.dtype != np.uint8 or tiles_NHWC.ndim != 4 or tiles_NHWC.shape[-1] != 3:
        raise ValueError(f"tiles must be uint8 (N, H, W, 3), got {tiles_NHWC.dtype} {tiles_NHWC.shape}")
    if augmentation.quarter_turns and tiles_NHWC.shape[1] != tiles_NHWC.shape[2]:
        raise ValueError(f"tiles that are turned must be square, got {tiles_NHWC.shape}")
    draws = random.uniforms(_DRAWS * len(tiles_NHWC)).reshape(-1, _DRAWS)
    placed_NCHW = _placed(tiles_NHWC, augmentation, draws, np.float32 if device == _CPU else np.uint8)
    pixels_NCHW = torch.from_numpy(placed_NCHW).to(device).float()
    if augmentation.hed_jitter > 0:
        pixels_NCHW = _recoloured(pixels_NCHW, augmentation.hed_jitter, draws[:, 3:])
    mean, std = _pixel_constants(device)
    return pixels_NCHW.div_(255).sub_(mean).div_(std)


def _placed(
    tiles_NHWC: NDArray[np.uint8], augmentation: Augmentation, draws: NDArray[np.float64], dtype: type[np.float32] | type[np.uint8]
) -> NDArray[np.float32] | NDArray[np.uint8]:
    """Flipped and turned, (N, 3, H, W): each tile is copied once, from a view of it into its place."""
    n, height, width, _ = tiles_NHWC.shape
    shape = (n, 3, height, width)
    placed = np.empty(shape, np.float32) if dtype is np.float32 else np.empty(shape, np.uint8)
    for index, (across, down, turn) in enumerate(draws[:, :3]):
        tile_HWC: NDArray[np.uint8] = tiles_NHWC[index]
        if augmentation.flips and across < 0.5:
            tile_HWC = tile_HWC[:, ::-1]
        if augmentation.flips and down < 0.5:
            tile_HWC = tile_HWC[::-1]
        if augmentation.quarter_turns:
            tile_HWC = np.rot90(tile_HWC, int(turn * 4))
        placed[index] = tile_HWC.transpose(2, 0, 1)
    return placed


def _recoloured(pixels_NCHW: Tensor, jitter: float, draws: NDArray[np.float64]) -> Tensor:
    """Stains moved: one 3 x 3 matrix and one offset a tile, applied to natural optical densities."""
    stains = np.array(STAINS)
    stains /= np.linalg.norm(stains, axis=1, keepdims=True)
    factors_NS, offsets_NS = 1 + jitter * (2 * draws[:, :3] - 1), jitter * (2 * draws[:, 3:] - 1)
    matrix_NCC = np.einsum("cs,ns,sd->ndc", np.linalg.inv(stains), factors_NS, stains)
    shift_NC = offsets_NS @ stains
    device = pixels_NCHW.device
    densities_NCL = -torch.log(pixels_NCHW.clamp(min=1).flatten(2) / 255)
    moved = torch.bmm(torch.from_numpy(matrix_NCC).to(device, torch.float32), densities_NCL)
    moved += torch.from_numpy(shift_NC).to(device, torch.float32).unsqueeze(-1)
    return (255 * torch.exp(-moved)).clamp(0, 255).reshape(pixels_NCHW.shape)


@cache
def _pixel_constants(device: torch.device) -> tuple[Tensor, Tensor]:
    mean, std = (torch.tensor(values, dtype=torch.float32, device=device).view(1, 3, 1, 1) for values in (PIXEL_MEAN, PIXEL_STD))
    return mean, std
