"""The serial engine: one patient's tiles are one microbatch, so that `.grad` after a plain backward pass *is* the patient's gradient.

No hooks and no per-sample machinery: any layer works, and memory is that of one gradient and one accumulator.

Guarantees, beside those of every engine (`engines.engine`):
    - A trainable parameter that got no gradient counts as zero.
    - A buffer that changes during a patient's pass is put back and the patient contributes zero; so does one during whose pass a
      parameter changes, frozen ones included (`engines.guard`). `local_round.try_base_state` finds both on synthetic tiles, before
      anything is charged.
    - Norms do not come out too small (`engines.norms`).
    - **A microbatch that does not fit**: the tiles are taken in halves, quarters and so on, their gradients added up before the one clip,
      where the objective is separable; then with checkpointed blocks; then the patient contributes zero.

    | objective | tiles | what is tried |
    | --- | --- | --- |
    | separable | 4 | 4 at once; 2 and 2; 1, 1, 1, 1; the same with checkpointed blocks |
    | not separable | 4 | 4 at once; 4 at once with checkpointed blocks |

The parts' gradients are those of the whole up to rounding. So the bits of a sum depend on whether memory ran out, and on nothing else
about a patient but the number of tiles. That is no second release: the noise is the same, and of a round computed twice only one result
is ever sealed.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from pathfed_client.training.compute import Compute
from pathfed_client.training.engines.engine import NotContributed, PatientTiles, contributes, why_not
from pathfed_client.training.engines.guard import StateGuard, unchanged_buffers
from pathfed_client.training.engines.norms import joint_norm
from pathfed_client.training.engines.passes import Passes, can_checkpoint
from pathfed_client.training.joint_sum import JointSum

__all__ = ["PatientGradients", "SerialEngine", "add_patient", "clear_gradients", "gradient_norm", "patient_gradient", "unchanged_buffers"]

_log = logging.getLogger(__name__)


class PatientGradients:
    """Computes one patient's gradient after the other into the parameters' own `.grad`."""

    def __init__(
        self,
        objective: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        compute: Compute | None = None,
        *,
        tiles_per_patient: int | None = None,
        tiles_at_once: int | None = None,
    ) -> None:
        """See `SerialEngine`."""
        separable = bool(getattr(objective, "separable", False))
        if tiles_at_once is not None and (tiles_at_once < 1 or not separable):
            raise ValueError(f"tiles_at_once must be at least 1, and None for an objective that is not separable, got {tiles_at_once}")
        self._objective, self._parameters, self._separable = objective, parameters, separable
        self._tiles_at_once = tiles_at_once
        self._guard = StateGuard(objective)
        full = tiles_per_patient if tiles_at_once is None or tiles_per_patient is None else min(tiles_at_once, tiles_per_patient)
        self._passes = Passes(objective, Compute() if compute is None else compute, tiles=full)

    def __call__(self, patient: PatientTiles) -> tuple[float, float, dict[str, Tensor]]:
        """One patient's loss, the norm of the gradient, and the gradient by name, without the parameters that got none.

        The gradients are the parameters' own `.grad`: good until the next patient.

        Raises:
            NotContributed: the loss or the gradient is not finite, or a buffer or parameter changed.
            MemoryError: it does not fit, however small the parts; or torch's own error.
        """
        attempts = list(self._attempts(len(patient.tiles)))
        for part, checkpointing in attempts[:-1]:
            try:
                return self._attempt(patient, part, checkpointing)
            except Exception as error:
                if not out_of_memory(error):
                    raise
                _log.info("a microbatch did not fit; it is taken in smaller parts")
            self._give_memory_back()
        return self._attempt(patient, *attempts[-1])

    def _attempts(self, tiles: int) -> Iterator[tuple[int, bool]]:
        """Tiles at once and whether blocks are checkpointed, in the order in which they are tried."""
        largest = min(tiles, self._tiles_at_once or tiles)
        for checkpointing in (False, True) if can_checkpoint(self._objective) else (False,):
            part = largest
            yield part, checkpointing
            while self._separable and part > 1:
                part = -(-part // 2)
                yield part, checkpointing

    def _attempt(self, patient: PatientTiles, part: int, checkpointing: bool) -> tuple[float, float, dict[str, Tensor]]:
        clear_gradients(self._parameters)
        with self._guard.unchanged():
            loss = self._backward(patient, part, checkpointing)
        gradients = {name: parameter.grad for name, parameter in self._parameters.items() if parameter.grad is not None}
        # One wait for the device: the loss and the norm travel together.
        value, norm = torch.stack([loss.double(), joint_norm(gradients.values()).to(loss.device)]).tolist()
        if not contributes(value, norm):
            raise NotContributed("loss or gradient is not finite")
        return value, norm, gradients

    def _backward(self, patient: PatientTiles, part: int, checkpointing: bool) -> Tensor:
        """The mean loss, its gradient added to `.grad`."""
        count = len(patient.tiles)
        if part >= count:
            loss = self._passes.loss(patient.tiles, patient.draws, checkpointing=checkpointing)
            torch.autograd.backward(loss)
            return loss.detach()
        shares: list[Tensor] = []
        for start in range(0, count, part):
            piece = patient.part(start, min(start + part, count))
            share = self._passes.loss(piece.tiles, piece.draws, checkpointing=checkpointing) * (len(piece.tiles) / count)
            torch.autograd.backward(share)
            shares.append(share.detach())
        return torch.stack(shares).sum()

    def _give_memory_back(self) -> None:
        clear_gradients(self._parameters)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class SerialEngine:
    """One patient after the other."""

    patients = 1

    def __init__(
        self,
        objective: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        compute: Compute | None = None,
        *,
        tiles_per_patient: int | None = None,
        tiles_at_once: int | None = None,
    ) -> None:
        """Make an engine.

        Args:
            objective: what is trained.
            parameters: its trainable parameters by name.
            compute: number type, checkpointing, compiling; default: plain float32.
            tiles_per_patient: k: microbatches of this size are compiled, where `compute` asks for it.
            tiles_at_once: tiles of a patient in one pass, where k do not fit; only for a separable objective.

        Raises:
            ValueError: `tiles_at_once` is out of bounds, or the objective is not separable.
        """
        self._objective, self._parameters = objective, parameters
        self._gradients = PatientGradients(objective, parameters, compute, tiles_per_patient=tiles_per_patient, tiles_at_once=tiles_at_once)

    def add(self, patients: Sequence[PatientTiles], total: JointSum, /) -> list[str | None]:
        """See `engines.engine.Engine`."""
        return [self._add(patient, total) for patient in patients]

    def rehearse(self, patients: Sequence[PatientTiles], /) -> None:
        """See `engines.engine.Engine`."""
        try:
            for patient in patients:
                self._gradients(patient)
        finally:
            clear_gradients(self._parameters)

    def norm(self, patient: PatientTiles, /) -> float:
        """The norm of a patient's gradient. Sensitive; raises as `PatientGradients` does."""
        try:
            return self._gradients(patient)[1]
        finally:
            clear_gradients(self._parameters)

    def _add(self, patient: PatientTiles, total: JointSum) -> str | None:
        try:
            add_patient(self._objective, self._parameters, patient, total, gradients_of=self._gradients)
        except Exception as error:  # aborts are releases
            return why_not(error)
        finally:
            clear_gradients(self._parameters)
        return None


def patient_gradient(
    objective: nn.Module, parameters: Mapping[str, nn.Parameter], patient: PatientTiles
) -> tuple[float, float, dict[str, Tensor]]:
    """`PatientGradients` of one patient alone."""
    return PatientGradients(objective, parameters)(patient)


def add_patient(
    objective: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    patient: PatientTiles,
    total: JointSum,
    *,
    gradients_of: PatientGradients | None = None,
) -> None:
    """Add one patient's clipped gradient and figures to the sum.

    Raises:
        NotContributed: see `PatientGradients`; nothing was added.
    """
    gradients_of = PatientGradients(objective, parameters) if gradients_of is None else gradients_of
    value, norm, gradients = gradients_of(patient)
    total.add(gradients.items(), norm=norm, loss=value)


def gradient_norm(gradients: Mapping[str, Tensor]) -> float:
    """L2 norm of all gradients together (`engines.norms.joint_norm`)."""
    return float(joint_norm(gradients.values()))


def clear_gradients(parameters: Mapping[str, nn.Parameter]) -> None:
    """Drop every gradient, so that no patient's is left for the next one."""
    for parameter in parameters.values():
        parameter.grad = None


def out_of_memory(error: Exception) -> bool:
    """Whether this is how Python or torch say that memory has run out; on the CPU torch has no type of its own for it."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in ("not enough memory", "allocate memory"))
