"""Which engine a round takes, decided by shapes: public facts alone, so that every round of a plan at a site takes the same one.

The cost of a patient is counted in multiply-adds, with memory traffic and the calls that a pass makes turned into multiply-adds:

    both engines     3 S I O a linear layer and k tiles (forward, input gradient, weight gradient), less efficient with few rows:
                     times 1 + R / rows, with rows = S for the serial engine and P S for a pass over P patients
    serial           5 transfers of each parameter: gradient written, read for the norm and read for the sum, the sum read and written
    book-keeping     4 transfers of each parameter: gradient written and read, the sum read and written; beside them a layer's Gram
                     matrices S^2 (I + O), or its gradients kept for all patients of the pass (6 transfers: fresh memory costs twice)
    both             a fixed cost for each layer and pass, twice as high for a tapped layer, shared by P patients

S are a patient's rows in a layer, I and O its widths. The constants are rounded from a least-squares fit to measured steps of
`tests/benchmarks/private_step.py` with the exact sum, ViT-Ti and ViT-S on one CPU: docs/benchmarks/2026-11-30-private-step.md has the
steps and how far the fit is off. Patients in one pass: as many as keep the tiles within `TILES_IN_A_PASS` and the memory within its limit;
where no limit is known, within the memory of the serial engine or `FRUGAL` times that of the step without privacy, whichever is larger.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from pathfed_client.training.compute import Compute
from pathfed_client.training.engines.book import gram_is_cheaper
from pathfed_client.training.engines.book_keeping import BookKeepingEngine
from pathfed_client.training.engines.engine import Engine, EngineUnfitError, trainable
from pathfed_client.training.engines.serial import SerialEngine
from pathfed_client.training.engines.taps import tapped
from pathfed_common.objectives.objective import Objective
from pathfed_common.privacy.randomness import KeyedRandom

#: Largest number of tiles in one pass of the book-keeping engine.
TILES_IN_A_PASS = 16
#: Where nothing is known of the memory, a pass over several patients may make the step take this much more of it.
FRUGAL = 1.15
#: Rows at which a matrix product runs at half its speed, multiply-adds that one number's transfer is worth, and those of a layer's calls.
_HALF_SPEED_ROWS = 24.0
_TRANSFER = 12.0
_CALL = 8e6
#: Transfers of a parameter's number in the serial engine and in the book-keeping one, and of one in a gradient that is kept for a pass.
_SERIAL, _BOOK, _KEPT = 5, 4, 6
#: Calls of a tapped layer beside those of an ordinary one.
_TAPPED = 2.0


@dataclass(frozen=True)
class LayerUse:
    """A linear layer in the pass of one tile.

    Attributes:
        rows: of its input, for one tile.
        inputs: width of its input.
        outputs: width of its output.
    """

    rows: float
    inputs: int
    outputs: int


@dataclass(frozen=True)
class Shapes:
    """What costs follow from.

    Attributes:
        layers: the linear layers, patch projections among them.
        parameters: trainable numbers.
        activations: numbers kept for the backward pass of one tile.
    """

    layers: tuple[LayerUse, ...]
    parameters: int
    activations: int


def decide(objective: nn.Module, compute: Compute, *, tiles_per_patient: int, tile_px: int) -> Compute:
    """The same computing with the engine and the patients of a pass decided. Tries one blank tile to see the layers' shapes.

    Args:
        objective: what will be trained, on its device.
        compute: what the plan asks for.
        tiles_per_patient: k.
        tile_px: side of a tile, pixels.

    Raises:
        EngineUnfitError: the plan asks for book-keeping, and a parameter's owner has no rule.
    """
    if compute.decided:
        return compute
    try:
        tapped(objective, trainable(objective))
    except EngineUnfitError:
        if compute.engine == "book_keeping":
            raise
        return replace(compute, engine="serial", patients_at_once=None)
    shapes = shapes_of(objective, tile_px)
    patients = patients_at_once(shapes, tiles_per_patient, compute.memory_bytes)
    cheaper = book_keeping_cost(shapes, tiles_per_patient, patients) < serial_cost(shapes, tiles_per_patient)
    if compute.engine == "book_keeping" or (patients > 1 and cheaper):
        return replace(compute, engine="book_keeping", patients_at_once=patients)
    return replace(compute, engine="serial", patients_at_once=None)


def make_engine(
    objective: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    compute: Compute,
    *,
    tiles_per_patient: int,
    tile_px: int,
    tiles_at_once: int | None = None,
) -> Engine:
    """The engine that `compute` names, or `decide` names for it.

    Args:
        objective: what is trained.
        parameters: its trainable parameters by name.
        compute: how.
        tiles_per_patient: k.
        tile_px: side of a tile, pixels.
        tiles_at_once: tiles of a patient in one pass of the serial engine, where k do not fit.

    Raises:
        EngineUnfitError: see `decide`.
    """
    decided = decide(objective, compute, tiles_per_patient=tiles_per_patient, tile_px=tile_px)
    if decided.engine == "serial":
        k = tiles_per_patient
        return SerialEngine(objective, parameters, decided, tiles_per_patient=k, tiles_at_once=tiles_at_once)
    patients = decided.patients_at_once or 1
    return BookKeepingEngine(objective, parameters, decided, patients=patients, tiles_per_patient=tiles_per_patient)


def serial_cost(shapes: Shapes, k: int) -> float:
    """Cost of a patient with k tiles in the serial engine, in multiply-adds."""
    return _products(shapes, k, 1) + _SERIAL * _TRANSFER * shapes.parameters + _CALL * len(shapes.layers)


def book_keeping_cost(shapes: Shapes, k: int, patients: int) -> float:
    """Cost of a patient with k tiles in a pass over that many patients of the book-keeping engine, in multiply-adds."""
    cost = _products(shapes, k, patients) + _BOOK * _TRANSFER * shapes.parameters + _TAPPED * _CALL * len(shapes.layers) / patients
    for layer in shapes.layers:
        rows = layer.rows * k
        if gram_is_cheaper(int(rows), layer.inputs, layer.outputs):
            cost += rows * rows * (layer.inputs + layer.outputs)
        else:
            cost += _KEPT * _TRANSFER * layer.inputs * layer.outputs
    return cost


def patients_at_once(shapes: Shapes, k: int, memory_bytes: int | None) -> int:
    """How many patients share a pass, at least 1: the largest power of two within the tiles of a pass and the memory.

    Where no memory is stated, weights and sum (float32) and the activations of one patient's tiles are what the step takes anyhow.
    """
    if memory_bytes is None:
        weights, pass_alone = 8 * shapes.parameters, 4 * shapes.activations * k
        serial = 4 * shapes.parameters + pass_alone
        memory_bytes = max(serial, int(FRUGAL * (weights + pass_alone)) - weights)
    patients = 1
    while 2 * patients * k <= TILES_IN_A_PASS and pass_bytes(shapes, k, 2 * patients) <= memory_bytes:
        patients *= 2
    return patients


def pass_bytes(shapes: Shapes, k: int, patients: int) -> int:
    """Memory of a pass beside parameters and sum: activations, and what the book keeps of each layer until the factors are known.

    Half of the latter: inputs are kept for the backward pass anyhow, and activations are freed while it goes on.
    """
    kept = 0.0
    for layer in shapes.layers:
        rows = layer.rows * k
        kept += min(rows * (layer.inputs + layer.outputs), layer.inputs * layer.outputs)
    return int(4 * patients * (shapes.activations * k + kept / 2))


def _products(shapes: Shapes, k: int, patients: int) -> float:
    total = 0.0
    for layer in shapes.layers:
        rows = layer.rows * k
        total += 3 * rows * layer.inputs * layer.outputs * (1 + _HALF_SPEED_ROWS / (rows * patients))
    return total


def shapes_of(objective: nn.Module, tile_px: int) -> Shapes:
    """Shapes of the layers in the pass of one blank tile, with weights as they are. Draws come from a public source of their own."""
    device = next(objective.parameters()).device
    tiles = torch.zeros(1, 3, tile_px, tile_px, device=device)
    drawn = cast(Objective, objective).draw(1, KeyedRandom(bytes(32), {"purpose": "shapes"}))
    layers: list[LayerUse] = []
    activations = 0

    def seen(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        nonlocal activations
        if isinstance(output, Tensor):
            activations += output.numel()
        weight = getattr(module, "weight", None)
        if isinstance(module, (nn.Linear, nn.Conv2d)) and isinstance(weight, Tensor) and weight.requires_grad:
            outputs, width = weight.shape[0], weight[0].numel()
            layers.append(LayerUse(output.numel() / outputs, width, outputs))

    handles = [module.register_forward_hook(seen) for module in objective.modules()]
    try:
        with torch.no_grad():
            cast(Objective, objective).loss(tiles, {name: tensor.to(device) for name, tensor in drawn.items()})
    finally:
        for handle in handles:
            handle.remove()
    parameters = sum(parameter.numel() for parameter in objective.parameters() if parameter.requires_grad)
    return Shapes(tuple(layers), parameters, activations)
