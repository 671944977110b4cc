"""Memory that runs out is found out before the charge: tiles a pass takes at once are halved until a try on synthetic tiles fits.

A GPU's allocator says when its limit is reached. A CPU's does not until the kernel ends the process, so there the need is estimated.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pathfed_client.training.compute import Compute
from pathfed_client.training.device import held_bytes
from pathfed_client.training.engines.passes import Passes
from pathfed_client.training.engines.serial import clear_gradients, out_of_memory
from pathfed_client.training.local_round import synthetic_patients


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
            if not out_of_memory(error):
                raise
            if at_once == 1:
                raise DoesNotFit(f"one tile at a time is too much: {type(error).__name__}") from error
        else:
            return at_once
        at_once = -(-at_once // 2)


def one_pass(objective: nn.Module, compute: Compute, tile_px: int, tiles: int) -> None:
    """Forward and backward over so many public tiles, whatever the weights are; raises where memory runs out."""
    patient = next(synthetic_patients(objective, tile_px, tiles))
    try:
        torch.autograd.backward(Passes(objective, compute).loss(patient.tiles, patient.draws))
    finally:
        clear_gradients(dict(objective.named_parameters()))


def activation_bytes(objective: nn.Module, compute: Compute, tile_px: int) -> int:
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
        Passes(objective, compute).loss(patient.tiles, patient.draws)
    return sum(kept.values())


def tiles_within(objective: nn.Module, compute: Compute, tile_px: int, most: int, *, shared_by: int = 1) -> int:
    """How many tiles at once fit into `most` bytes by estimate: weights, gradient and sum, and each tile's activations. 0: not even one.

    Args:
        objective: the model.
        compute: how passes are run.
        tile_px: side of a tile, pixels.
        most: bytes.
        shared_by: processes among which weights, gradient and sum are cut; each has `most`.
    """
    room = most - held_bytes(objective) // shared_by
    return max(0, room // max(1, activation_bytes(objective, compute, tile_px)))
