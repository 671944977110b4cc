"""Memory that a site's process and its ranks share: base state, update, tiles. It has no name, and goes when the last of them ends."""

import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from torch import Tensor

from pathfed_client.training.ranks.program import SharedNumbers

_ALIGNED = 64
_Shape = tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """What lies in the memory, one after the other.

    Attributes:
        state: shape of each tensor of the base state, float32.
        update: shape of each trained tensor, float32.
        tiles: slots, tiles a slot, height, width, colours; bytes.
    """

    state: Mapping[str, _Shape]
    update: Mapping[str, _Shape]
    tiles: tuple[int, int, int, int, int]

    @property
    def size(self) -> int:
        """Bytes in all."""
        return _stop(self.update, _stop(self.state, 0)) + prod(self.tiles)


def create(layout: Layout) -> int:
    """New memory, all zero; its file descriptor, which is closed when another program is started unless it is passed on.

    The memory is taken page by page as it is written, and given back when the last process that holds it ends.
    """
    descriptor = os.memfd_create("pathfed-ranks", os.MFD_CLOEXEC)
    os.ftruncate(descriptor, layout.size)
    return descriptor


def attach(descriptor: int, layout: Layout) -> SharedNumbers:
    """The memory as tensors and tiles. Reading sees what the other processes wrote."""
    mapped = mmap.mmap(descriptor, 0)
    middle = _stop(layout.state, 0)
    tiles = np.frombuffer(mapped, np.uint8, prod(layout.tiles), _stop(layout.update, middle)).reshape(layout.tiles)
    state = _tensors(mapped, layout.state, 0)
    update = {name: tensor.view(-1) for name, tensor in _tensors(mapped, layout.update, middle).items()}
    return SharedNumbers(state=state, update=update, tiles=tiles)


def _tensors(mapped: mmap.mmap, shapes: Mapping[str, _Shape], start: int) -> dict[str, Tensor]:
    tensors = {}
    for name, shape in sorted(shapes.items()):
        numbers = prod(shape)
        flat = torch.frombuffer(mapped, dtype=torch.float32, count=numbers, offset=start) if numbers else torch.empty(0)
        tensors[name] = flat.view(shape)
        start += _aligned(numbers)
    return tensors


def _stop(shapes: Mapping[str, _Shape], start: int) -> int:
    return start + sum(_aligned(prod(shape)) for shape in shapes.values())


def _aligned(numbers: int) -> int:
    """Bytes of so many fp32 numbers, filled up."""
    return -(-4 * numbers // _ALIGNED) * _ALIGNED
