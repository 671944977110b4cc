"""The serial engine: one patient's tiles are one microbatch, so that `.grad` after a plain backward pass *is* the patient's gradient.

No hooks and no per-sample machinery: any layer works, and memory is that of one gradient and one accumulator.

Guarantees:
    - A patient adds a vector of norm at most C to the sum, whatever the objective computes; if adding stops half-way, what was added is
      that vector with some coordinates left out, whose norm is no larger.
    - A trainable parameter that got no gradient counts as zero.
    - What would couple patients is refused before the first one (`check_objective`): layers with statistics over a batch (BatchNorm,
      InstanceNorm with running statistics), layers that draw from torch's global generator (dropout), parameters that are tied or not
      the objective's own. A buffer that changes during a patient's forward pass is put back and the patient contributes zero; so does one
      during whose pass a parameter changes. `local_round.try_base_state` finds both on synthetic tiles, before anything is charged.
    - Norms are taken in fp32, over pieces of 65,536 numbers, the pieces joined in fp64: torch's own norm of a large fp32 tensor on the CPU
      comes out up to 4e-3 too small at 5e7 numbers, which would let a patient contribute more than C.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from pathfed_common.privacy.mechanism import PatientMechanism
from pathfed_common.privacy.randomness import KeyedRandom

_NORM_PIECE = 1 << 16


class Objective(Protocol):
    """A self-supervised objective. It MUST NOT mix tiles of different patients; it only ever sees those of one."""

    def draw(self, tiles: int, random: KeyedRandom, /) -> Tensor:
        """The random masks for that many tiles."""
        ...

    def loss(self, tiles_NCHW: Tensor, masks: Tensor, /) -> Tensor:
        """Scalar: the mean over the tiles of each tile's own loss."""
        ...


@dataclass(frozen=True, eq=False)
class PatientTiles:
    """One patient's tiles as the objective takes them.

    Attributes:
        tiles: float32 (N, 3, H, W), N >= 1.
        masks: what the objective drew for these N tiles.
    """

    tiles: Tensor
    masks: Tensor


class NotContributed(Exception):  # noqa: N818  an outcome, not a fault
    """This patient contributes zero; the text says why and never leaves the site."""


class JointSum:
    """The sum over patients of their whole vectors, before noise. Sensitive: it never leaves the private step.

    Attributes:
        gradients: name to the fp32 sum of clipped gradients.
        loss_shares: sum of the clamped losses, each as a share of loss_bound.
        patients: patients who contributed.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Start at zero."""
        self.gradients = {name: torch.zeros(p.shape, dtype=torch.float32, device=p.device) for name, p in sorted(parameters.items())}
        self.loss_shares = 0.0
        self.patients = 0

    def __repr__(self) -> str:
        return "JointSum(<sensitive>)"


def trainable(objective: nn.Module) -> dict[str, nn.Parameter]:
    """The objective's trainable parameters by name, in order of their names."""
    return {name: parameter for name, parameter in sorted(objective.named_parameters()) if parameter.requires_grad}


def check_objective(objective: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
    """Refuse an objective whose patient gradients would not be the patients' own.

    Depends on the code and the plan alone, never on a patient.

    Raises:
        ValueError: a layer that couples patients or draws from a global generator, a tied parameter, or `parameters` that are not
            exactly the objective's trainable ones.
    """
    for name, module in objective.named_modules():
        norm = isinstance(module, nn.modules.batchnorm._NormBase)
        if isinstance(module, nn.modules.batchnorm._BatchNorm) or (norm and module.track_running_stats):
            raise ValueError(f"layer {name!r} ({type(module).__name__}) keeps statistics over a batch, which couples patients")
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            raise ValueError(f"layer {name!r} ({type(module).__name__}) draws from torch's global generator")
    own = {name: parameter for name, parameter in objective.named_parameters(remove_duplicate=False) if parameter.requires_grad}
    if not own or set(own) != set(parameters):
        raise ValueError(f"parameters must be the objective's trainable ones; they differ in {sorted(set(own) ^ set(parameters))[:5]}")
    seen: dict[tuple[int, int], str] = {}
    for name, parameter in parameters.items():
        if parameter is not own[name]:
            raise ValueError(f"parameter {name!r} is not the objective's own")
        if not parameter.is_floating_point():
            raise ValueError(f"parameter {name!r} must be floating point, got {parameter.dtype}")
        # Where its numbers lie names a parameter: a tied one lies in the same place under two names.
        place = (id(parameter), 0) if parameter.numel() == 0 else (parameter.data_ptr(), 1)
        if place in seen:
            raise ValueError(f"parameters {seen[place]!r} and {name!r} are tied")
        seen[place] = name


def patient_gradient(
    objective: nn.Module, parameters: Mapping[str, nn.Parameter], patient: PatientTiles
) -> tuple[float, float, dict[str, Tensor]]:
    """One patient's loss, the norm of the gradient, and the gradient by name, without the parameters that got none.

    The gradients are the parameters' own `.grad`: good until the next patient.

    Raises:
        NotContributed: the loss or the gradient is not finite, or a buffer or parameter changed.
    """
    clear_gradients(parameters)
    versions = [parameter._version for parameter in parameters.values()]
    with unchanged_buffers(objective):
        loss = cast(Objective, objective).loss(patient.tiles, patient.masks)
        torch.autograd.backward(loss)
    if versions != [parameter._version for parameter in parameters.values()]:
        raise NotContributed("a parameter changed during the forward pass, which would couple patients")
    value = float(loss.detach())
    gradients = {name: parameter.grad for name, parameter in parameters.items() if parameter.grad is not None}
    norm = gradient_norm(gradients)
    if not (math.isfinite(value) and math.isfinite(norm)):
        raise NotContributed("loss or gradient is not finite")
    return value, norm, gradients


def add_patient(
    objective: nn.Module, parameters: Mapping[str, nn.Parameter], patient: PatientTiles, mechanism: PatientMechanism, total: JointSum
) -> None:
    """Add one patient's clipped gradient and figures to the sum.

    Raises:
        NotContributed: see `patient_gradient`; nothing was added.
    """
    value, norm, gradients = patient_gradient(objective, parameters, patient)
    factor, share = mechanism.clip_factor(norm), mechanism.loss_share(value)
    for name, gradient in gradients.items():
        total.gradients[name].add_(gradient, alpha=factor)
    total.loss_shares += share
    total.patients += 1


def gradient_norm(gradients: Mapping[str, Tensor]) -> float:
    """L2 norm of all gradients together: fp32 over pieces of 65,536 numbers, the pieces joined in fp64. Not finite if any number is not."""
    pieces = [
        torch.linalg.vector_norm(piece)
        for gradient in gradients.values()
        for piece in gradient.detach().to(torch.float32).reshape(-1).split(_NORM_PIECE)
    ]
    return float(torch.linalg.vector_norm(torch.stack(pieces).double())) if pieces else 0.0


def clear_gradients(parameters: Mapping[str, nn.Parameter]) -> None:
    """Drop every gradient, so that no patient's is left for the next one."""
    for parameter in parameters.values():
        parameter.grad = None


@contextmanager
def unchanged_buffers(objective: nn.Module) -> Iterator[None]:
    """Put back buffers that change inside the block, and then refuse.

    Raises:
        NotContributed: a buffer was written to or replaced.
    """
    before = {name: (buffer, buffer._version, buffer.detach().clone()) for name, buffer in objective.named_buffers()}
    changed = False
    try:
        yield
    finally:
        after = dict(objective.named_buffers())
        for name, (buffer, version, copy) in before.items():
            if after.get(name) is not buffer or buffer._version != version:
                changed = True
                with torch.no_grad():
                    buffer.copy_(copy)
                owner, _, last = name.rpartition(".")
                objective.get_submodule(owner)._buffers[last] = buffer
    if changed:
        raise NotContributed("a buffer changed during the forward pass, which would couple patients")
