"""Which numbers of a parameter a rank holds.

FSDP2 cuts a parameter along its first axis into R pieces of ceil(n / R) rows, the last ones shorter or empty, so that a piece is a run of
the flattened parameter. Noise is one stream for each parameter, keyed by its name: the number at place i gets normal i of that stream,
whoever holds it (`joint_sum.release`). Pieces of one parameter therefore get independent noise, all of them together the noise that a
single process would add, and R has no part in it.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from pathfed_common.encoder.vit import Block


@dataclass(frozen=True, eq=False)
class Piece:
    """What a rank holds of one parameter.

    Attributes:
        values: the numbers, in the parameter's own memory; of any shape.
        start: place of the first of them in the flattened parameter.
        whole: this rank, like every other, holds all of it.
    """

    values: Tensor
    start: int
    whole: bool

    @property
    def stop(self) -> int:
        """Place behind the last of them."""
        return self.start + self.values.numel()


def piece(parameter: Tensor, rank: int, ranks: int) -> Piece:
    """What this rank holds of a parameter, sharded by FSDP2 or not.

    Raises:
        ValueError: sharded in another way than along the first axis.
    """
    if not isinstance(parameter, DTensor):
        return Piece(parameter.detach(), 0, whole=True)
    if len(parameter.placements) != 1 or not parameter.placements[0].is_shard(0):
        raise ValueError(f"a parameter must be sharded along its first axis alone, got {parameter.placements}")
    rows = parameter.shape[0]
    start = min(rows, rank * -(-rows // ranks)) * (parameter.numel() // rows if rows else 0)
    local: Tensor = parameter.to_local()
    return Piece(local.detach(), start, whole=False)


def even_run(numbers: int, rank: int, ranks: int) -> tuple[int, int]:
    """Start and stop of this rank's share of so many numbers: runs of ceil(numbers / ranks), the last ones shorter or empty."""
    length = -(-numbers // ranks)
    return min(numbers, rank * length), min(numbers, (rank + 1) * length)


def shard(objective: nn.Module) -> None:
    """Shard an objective over the default process group's ranks, in place: each transformer block by itself, the rest together.

    Parameters are gathered, and gradients summed over the ranks, in fp32; autocast computes in its type, as in a single process.
    Gradients are not divided by the number of ranks: the ranks' losses are weighted
    so that the sum is the patient's gradient. Frozen parameters (a teacher's) are sharded too; those without an axis are kept whole.
    """
    mesh = torch.distributed.device_mesh.init_device_mesh(_device_type(objective), (torch.distributed.get_world_size(),))
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    scalars = {parameter for parameter in objective.parameters() if parameter.ndim == 0}
    for module in [module for module in objective.modules() if isinstance(module, Block)] + [objective]:
        sharded = fully_shard(module, mesh=mesh, mp_policy=policy, ignored_params=scalars)
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)
    register_fsdp_forward_method(objective, "loss")


def load_pieces(objective: nn.Module, state: Mapping[str, Tensor], rank: int, ranks: int) -> None:
    """Copy a whole state, held by every rank, into the pieces this one holds.

    Raises:
        ValueError: the state's names or sizes are not the objective's.
    """
    own = objective.state_dict()
    if set(own) != set(state):
        raise ValueError(f"the state's names differ from the objective's in {sorted(set(own) ^ set(state))[:5]}")
    with torch.no_grad():
        for name, tensor in own.items():
            if tensor.shape != state[name].shape:
                raise ValueError(f"tensor {name!r} must have shape {tuple(tensor.shape)}, got {tuple(state[name].shape)}")
            held = piece(tensor, rank, ranks)
            held.values.view(-1).copy_(state[name].reshape(-1)[held.start : held.stop])


def _device_type(objective: nn.Module) -> str:
    return next(objective.parameters()).device.type
