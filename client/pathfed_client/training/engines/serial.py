"""The serial engine: one patient's tiles are one microbatch, so that `.grad` after a plain backward pass *is* the patient's gradient.

No hooks and no per-sample machinery: any layer works, and memory is that of one gradient and one accumulator.

Guarantees, beside those of every engine (`engines.engine`):
    - A trainable parameter that got no gradient counts as zero.
    - A buffer that changes during a patient's forward pass is put back and the patient contributes zero; so does one
      during whose pass a parameter changes. `local_round.try_base_state` finds both on synthetic tiles, before anything is charged.
    - Norms are taken in fp32, over pieces of 65,536 numbers, the pieces joined in fp64: torch's own norm of a large fp32 tensor on the CPU
      comes out up to 4e-3 too small at 5e7 numbers, which would let a patient contribute more than C.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from pathfed_client.training.engines.engine import JointSum, NotContributed, PatientTiles
from pathfed_common.objectives.objective import Objective
from pathfed_common.privacy.mechanism import PatientMechanism

_NORM_PIECE = 1 << 16


class SerialEngine:
    """One patient after the other."""

    patients = 1

    def __init__(self, objective: nn.Module, parameters: Mapping[str, nn.Parameter], mechanism: PatientMechanism) -> None:
        """Train `objective`, whose trainable parameters are `parameters`, under the public constants of `mechanism`."""
        self._objective, self._parameters, self._mechanism = objective, parameters, mechanism

    def add(self, patients: Sequence[PatientTiles], total: JointSum, /) -> list[str | None]:
        """See `engines.engine.Engine`."""
        return [self._add(patient, total) for patient in patients]

    def _add(self, patient: PatientTiles, total: JointSum) -> str | None:
        try:
            add_patient(self._objective, self._parameters, patient, self._mechanism, total)
        except NotContributed as reason:
            return str(reason)
        except Exception as error:
            # Aborts are releases: whether a step answers must not depend on a patient's tiles, so nothing that one patient causes may pass.
            # The type alone is kept: the text could name a slide, and the traceback would keep the patient's gradient in memory.
            return type(error).__name__
        finally:
            clear_gradients(self._parameters)
        return None


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
        loss = cast(Objective, objective).loss(patient.tiles, patient.draws)
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
