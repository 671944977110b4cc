"""Random crops of tiles (multi-crop, Caron et al. 2020, arXiv:2006.09882): drawn as boxes, cut by bilinear sampling on the device.

Drawing takes a fixed count of numbers, and cutting has fixed shapes: a box is placed without the rejection loop of common implementations.

Legend of shape suffixes: N tiles, V views (crops of a tile), C channels, H and W pixels, S side of a crop, pixels.
"""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

#: Uniform numbers that one box takes, and one view's colours.
BOX_NUMBERS = 6
COLOUR_NUMBERS = 6

Range = tuple[float, float]


def boxes(uniforms_M: NDArray[np.float64], *, scale: Range, aspect: float) -> NDArray[np.float64]:
    """Random boxes inside a tile, each mirrored with probability 1/2 in each direction: float64 (M / 6, 4).

    A row is (centre x, centre y, half width, half height) in units of half the tile's side, the tile's centre being (0, 0); a negative half
    means mirrored. Areas are uniform in `scale`, logarithms of width / height uniform in ± log `aspect`, places uniform among those inside
    the tile. A box longer than the tile is cut to its side.

    Args:
        uniforms_M: numbers in [0, 1), 6 for each box.
        scale: least and greatest share of the tile's area.
        aspect: greatest ratio of the sides, at least 1.
    """
    area, ratio, across, down, mirror_x, mirror_y = uniforms_M.reshape(-1, BOX_NUMBERS).T
    area = scale[0] + area * (scale[1] - scale[0])
    stretch = np.exp((ratio - 0.5) * math.log(aspect))
    half_width, half_height = (np.minimum(np.sqrt(area) * factor, 1.0) for factor in (stretch, 1 / stretch))
    centre_x, centre_y = ((1 - half) * (2 * place - 1) for half, place in ((half_width, across), (half_height, down)))
    signs = [np.where(mirror < 0.5, -1.0, 1.0) for mirror in (mirror_x, mirror_y)]
    return np.stack([centre_x, centre_y, half_width * signs[0], half_height * signs[1]], axis=1)


def cut(images_NCHW: Tensor, boxes_NV4: Tensor, side: int) -> Tensor:
    """The crops of each image, (N, V, C, S, S), bilinearly sampled; a box of the crop's own size at whole pixels comes out unchanged.

    There is no low-pass filter: a box much larger than `side` pixels comes out aliased. The plan's bounds keep boxes near the crops' size.
    """
    n, views = boxes_NV4.shape[:2]
    steps_S = (torch.arange(side, device=images_NCHW.device, dtype=images_NCHW.dtype) * 2 + 1) / side - 1
    centre_x, centre_y, half_width, half_height = boxes_NV4.to(images_NCHW.dtype).flatten(0, 1).unbind(-1)
    x_BSS, y_BSS = torch.broadcast_tensors(
        (centre_x[:, None] + half_width[:, None] * steps_S)[:, None, :], (centre_y[:, None] + half_height[:, None] * steps_S)[:, :, None]
    )
    # One image's crops lie below each other in one grid: the image is read once for all of them and never repeated.
    grid_NHW2 = torch.stack([x_BSS, y_BSS], dim=-1).reshape(n, views * side, side, 2)
    with torch.autocast(images_NCHW.device.type, enabled=False):
        cut_NCHW = functional.grid_sample(images_NCHW, grid_NHW2, mode="bilinear", padding_mode="border", align_corners=False)
    out: Tensor = cut_NCHW.unflatten(2, (views, side)).transpose(1, 2)
    return out


def colours(uniforms_M: NDArray[np.float64], *, jitter: float) -> NDArray[np.float64]:
    """Random changes of colour, float64 (M / 6, 2, 3): each channel's factor in 1 ± `jitter` and offset in ± `jitter`, uniform."""
    centred = (uniforms_M.reshape(-1, 2, 3) * 2 - 1) * jitter
    out: NDArray[np.float64] = centred + np.array([1.0, 0.0]).reshape(1, 2, 1)
    return out


def recolour(crops_NVCHW: Tensor, colours_NV23: Tensor) -> Tensor:
    """Crops with each channel scaled and shifted (in units of the normalised pixels' standard deviation)."""
    factors, offsets = colours_NV23.to(crops_NVCHW.dtype)[..., None, None].unbind(2)
    return crops_NVCHW * factors + offsets
