"""A base state that is sound on every public tile and gives no finite number on tissue: a server's try at an oracle."""

import torch
from torch import Tensor

from pathfed_client.training.local_round import load_state, synthetic_patients
from pathfed_common.model import build_model, initial_state
from pathfed_common.objectives.objective import Draws, ObjectiveModule
from pathfed_common.plan import Plan
from pathfed_common.privacy.randomness import KeyedRandom

_BLOCK = "encoder.blocks.0.mlp"
#: Far below zero GELU and its slope are nothing, even times `_LARGE`; above it, the product overflows.
_QUIET, _LOUD = -30.0, 10.0
_LARGE = 1e38
#: Public patients that an engine tries at most.
_AT_ONCE = 32


def breaking_state(plan: Plan, tissue_NCHW: Tensor) -> dict[str, Tensor]:
    """The plan's first state, with one unit of the first block that fires on this tissue alone and overflows what follows.

    Args:
        plan: the plan.
        tissue_NCHW: some of the tissue, as the encoder takes it.

    Raises:
        ValueError: no direction tells this tissue from the public tiles.
    """
    model = build_model(plan)
    state = {name: tensor.clone() for name, tensor in initial_state(plan).items()}
    load_state(model, state)
    px, k = plan.cohort.tile_px, plan.cohort.tiles_per_patient
    public = list(synthetic_patients(model, px, k, multiple_of=_AT_ONCE))
    quiet = torch.cat([_seen(model, one.tiles, one.draws) for one in public])
    loud = _seen(model, tissue_NCHW, model.draw(len(tissue_NCHW), KeyedRandom(bytes(32), {"purpose": "tissue"})))
    direction, offset = _separator(quiet, loud)
    state[f"{_BLOCK}.fc1.weight"][0] = direction
    state[f"{_BLOCK}.fc1.bias"][0] = offset
    state[f"{_BLOCK}.fc2.weight"][0, 0] = _LARGE
    return state


def _seen(model: ObjectiveModule, tiles_NCHW: Tensor, draws: Draws) -> Tensor:
    """What enters the first block's MLP, a row for each visible token of each tile."""
    rows: list[Tensor] = []
    layer = model.get_submodule(f"{_BLOCK}.fc1")
    hook = layer.register_forward_pre_hook(lambda _, given: rows.append(given[0].detach().flatten(0, -2)))
    with torch.no_grad():
        model.loss(tiles_NCHW, draws)
    hook.remove()
    return torch.cat(rows)


def _separator(quiet: Tensor, loud: Tensor) -> tuple[Tensor, float]:
    """A direction and an offset that put every quiet row below `_QUIET`, and half of the others above `_LOUD`: least squares."""
    rows = torch.cat([quiet, loud]).double()
    wanted = torch.cat([torch.full((len(quiet),), -1.0), torch.full((len(loud),), 1.0)]).double()
    centred = rows - rows.mean(0)
    ridge = 1e-3 * torch.eye(rows.shape[1], dtype=torch.float64) * len(rows)
    direction = torch.linalg.solve(centred.T @ centred + ridge, centred.T @ wanted).float()
    top, middle = float((quiet @ direction).max()), float((loud @ direction).median())
    if middle <= top:
        raise ValueError("no direction tells this tissue from the public tiles")
    scale = (_LOUD - _QUIET) / (middle - top)
    return direction * scale, _QUIET - scale * top
