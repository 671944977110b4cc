"""The L2 norm of an update or a state, in the same bits on every machine, a block at a time.

    norm = sqrt(sum of the squares of all numbers)

A tensor's squares are added in runs of 4096, counted from its first number: a run's halves are added to each other, number by number, until
one number is left. A library's own sum would add in an order that depends on the processor. The runs' sums are then added exactly
(`math.fsum`). So the norm depends neither on the size of blocks nor on threads or machine, and may decide what a third party recomputes.
"""

import math
from collections.abc import Callable
from math import prod

import torch
from torch import Tensor
from torch.nn.functional import pad

from pathfed_common.encoder.blocks import BLOCK, BlockReader, spans

_RUN = 4096


def l2_norm(reader: BlockReader, *, only: Callable[[str], bool] = lambda _: True, block: int = BLOCK) -> float:
    """L2 norm over some tensors; not finite exactly when one of their numbers is not.

    float32 numbers are below 3.5e38, so no sum of fewer than 10^200 of their squares overflows float64.

    Args:
        reader: the tensors.
        only: which of them count, by name.
        block: numbers in a block, a multiple of 4096.

    Raises:
        ValueError: `block` is another number, or the file changed.
        OSError: the file cannot be read.
    """
    if block % _RUN or block < _RUN:
        raise ValueError(f"block must be a multiple of {_RUN}, got {block}")
    tensors = []
    for name, shape in sorted(reader.shapes.items()):
        if only(name):
            runs = [run for start, stop in spans(prod(shape), block) for run in _squares(reader.read(name, start, stop))]
            if not all(map(math.isfinite, runs)):
                return math.inf
            tensors.append(math.fsum(runs))
    return math.sqrt(math.fsum(tensors))


def _squares(values: Tensor) -> list[float]:
    """Sum of squares of each run; the last one is filled up with zeros."""
    wide = pad(values.to(torch.float64), (0, -len(values) % _RUN))
    sums = wide.mul_(wide).view(-1, _RUN)
    while sums.shape[1] > 1:
        left, right = sums.chunk(2, dim=1)
        sums = left + right
    return sums.view(-1).tolist()
