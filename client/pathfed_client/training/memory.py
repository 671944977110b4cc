"""Memory that runs out is found out before the charge: tiles a pass takes at once are halved until a try on synthetic tiles fits.

A GPU's allocator says when its limit is reached. A CPU's does not until the kernel ends the process, so there the need is estimated.
"""

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from pathfed_client.training.device import COPIES, parameter_bytes
from pathfed_client.training.local_round import synthetic_patients
from pathfed_common.objectives.objective import Objective

#: Words of allocators whose errors are plain RuntimeErrors.
_WORDS = ("out of memory", "can't allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on the CPU or a GPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _WORDS)


class DoesNotFit(Exception):  # noqa: N818  an outcome, not a fault
    """Not even one tile at a time fits."""


def fit_microbatch(attempt: Callable[[int], None], tiles: int) -> int:
    """The most tiles a pass may take at once, of `tiles`, `tiles / 2`, ..., 1, so that an attempt does not run out of memory.

    Args:
        attempt: trains on public tiles, so many at once; whether it runs out of memory tells nothing of a patient.
        tiles: where to start.

    Raises:
        DoesNotFit: one tile at a time is too many.
        Exception: whatever else `attempt` raises.
    """
    at_once = tiles
    while True:
        try:
            attempt(at_once)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if at_once == 1:
                raise DoesNotFit(f"one tile at a time is too much: {type(error).__name__}") from error
        else:
            return at_once
        at_once = -(-at_once // 2)


def activation_bytes(objective: nn.Module, tile_px: int) -> int:
    """Bytes that a forward pass over one public tile keeps for the backward pass, weights left out."""
    patient = next(synthetic_patients(objective, tile_px, 1))
    weights = {parameter.untyped_storage().data_ptr() for parameter in objective.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        cast(Objective, objective).loss(patient.tiles, patient.draws)
    return sum(kept.values())


def tiles_within(objective: nn.Module, tile_px: int, most: int, *, copies_shared_by: int = 1) -> int:
    """How many tiles at once fit into `most` bytes by estimate: weights, gradient and sum, and each tile's activations. 0: not even one.

    Args:
        objective: the model.
        tile_px: side of a tile, pixels.
        most: bytes.
        copies_shared_by: processes among which weights, gradient and sum are cut; each has `most`.
    """
    room = most - COPIES * parameter_bytes(objective) // copies_shared_by
    return max(0, room // max(1, activation_bytes(objective, tile_px)))
