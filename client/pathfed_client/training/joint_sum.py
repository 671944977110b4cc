"""The sum over patients of their clipped vectors: whole numbers on a public lattice, so that it is exact.

A floating-point sum rounds at every addition, by more the larger it has grown, so that one patient's leaving can move it by more than that
patient's vector: by up to n^2 * 2^-24 * C for n patients (Casacuberta et al., CCS 2022). Here every patient's clipped vector is rounded
to the lattice of multiples of `unit` = C * 2^-21 before it is added, and the sum is kept in integers.

Guarantees:
    - **Sensitivity is exact.** The sum with a patient differs from the sum without by exactly that patient's own lattice vector, whose
      L2 norm is at most C (`PatientMechanism.gradient_bound` for the gradient), whatever the number, order and grouping of the others.
    - **Rounding is inside the bound.** Rounding d coordinates to the nearest multiple moves a vector by at most sqrt(d) * unit / 2, and the
      clip aims lower by as much: 0.6% of C for 630 million parameters, 1% for 1.9 billion.
    - **The noised sum lies on the same lattice.** With S on the lattice, rounding S + Z to it gives S + round(Z): what is released is a
      post-processing of the continuous Gaussian mechanism, and which lattice points can come out does not depend on S. The attack on
      floating-point Gaussians (Mironov, CCS 2012), which reads S off the gaps between the numbers that can come out, has no gaps to read.
    - **Overflow is harmless.** Integers wrap around modulo 2^32 (a coordinate beyond 1024 C): the release is then the noised sum modulo a
      public number, which is post-processing again.
    - Memory: one 32-bit number a parameter, as for a float32 sum.

    | patient | adds |
    | --- | --- |
    | gradient norm within the target | the gradient, rounded to the lattice |
    | gradient norm above it | the gradient scaled down to the target, rounded to the lattice |
    | a parameter without a gradient | zero there |
    | norm or loss not finite | refused; nothing was added |
    | adding stops half-way | its vector with some coordinates left out, whose norm is no larger |

Legend: d is the number of trained parameters, unit the lattice constant, both public.
"""

import math
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from pathfed_common.privacy.mechanism import PatientMechanism

#: The lattice constant as a share of C.
UNIT_SHARE = 2.0**-21
#: 1.5 * 2^23: adding it to a float32 x of less than 2^22 rounds x to a whole number, which then lies in the last bits of the result.
_MAGIC = 1.5 * 2.0**23
_MAGIC_BITS = int(torch.tensor(_MAGIC, dtype=torch.float32).view(torch.int32))
#: Numbers handled at once: two buffers of this size stay in a processor's cache; a GPU wants fewer, larger calls.
_PIECE_CPU, _PIECE_GPU = 1 << 18, 1 << 26
#: The largest share of the bound that rounding may take; beyond it the lattice is too coarse for so many parameters.
_LARGEST_ROUNDING = 0.1


class JointSum:
    """The sum of the patients' whole vectors before noise. Sensitive: it never leaves the private step.

    Attributes:
        integers: name to int32 tensor, in multiples of `unit`; the same bits whatever the order in which the patients came.
        unit: the lattice constant.
        patients: patients who contributed.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], mechanism: PatientMechanism, *, dimension: int | None = None) -> None:
        """Start at zero.

        Args:
            parameters: the trainable parameters by name; their shapes and devices count.
            mechanism: the public constants.
            dimension: d, where `parameters` are only a part of all trained numbers (a shard); default: their number.

        Raises:
            ValueError: so many parameters that rounding to the lattice would take more than a tenth of the bound.
        """
        self.unit = mechanism.clip_norm * UNIT_SHARE
        self._mechanism = mechanism
        count = sum(parameter.numel() for parameter in parameters.values()) if dimension is None else dimension
        rounding = math.sqrt(count) * self.unit / 2
        if rounding > _LARGEST_ROUNDING * mechanism.gradient_bound:
            raise ValueError(f"{count} parameters are too many for a lattice of {UNIT_SHARE:g} C")
        #: The largest norm of a gradient before it is rounded.
        self.target = mechanism.clip_target - rounding
        self.integers = {name: torch.zeros(p.shape, dtype=torch.int32, device=p.device) for name, p in sorted(parameters.items())}
        self.patients = 0
        self._loss_units = 0
        self._room: dict[torch.device, Tensor] = {}

    def __repr__(self) -> str:
        return "JointSum(<sensitive>)"

    def clip_factor(self, norm: float) -> float:
        """The factor, at most 1, that brings a gradient of this norm within `target`.

        Raises:
            ValueError: the norm is negative or not finite; such a patient contributes zero and is never clipped.
        """
        if not 0 <= norm < math.inf:
            raise ValueError(f"gradient norm must be finite and not negative, got {norm}")
        return 1.0 if norm <= self.target else self.target / norm

    def add(self, gradients: Mapping[str, Tensor], *, norm: float, loss: float) -> None:
        """Add one patient.

        Args:
            gradients: name to float32 gradient; a name that is missing counts as zero.
            norm: L2 norm of the patient's whole gradient.
            loss: the patient's loss.

        Raises:
            ValueError: norm or loss is not finite. Nothing was added.
        """
        scale, share = self.clip_factor(norm) / self.unit, self._mechanism.loss_share(loss)
        for name, gradient in gradients.items():
            for piece, values in _pieces(self.integers[name], gradient):
                room = self._room_for(values)
                torch.add(_magic(values.device), values, alpha=scale, out=room)
                piece.add_(room.view(torch.int32).sub_(_MAGIC_BITS))
        self._count(share)

    def release(self, name: str, normals: Iterable[Tensor]) -> Tensor:
        """One parameter's noised sum divided by the public B, float32, in the memory of the sum, which is gone afterwards.

        The noise is rounded to the lattice, sum and noise are added as integers modulo 2^32, and the result is rounded once to float32.

        Args:
            name: the parameter.
            normals: as many independent standard normal numbers as the parameter has, float64, in pieces, in order.
        """
        shape = self.integers[name].shape
        integers = self.integers.pop(name).view(-1)
        released = integers.view(torch.float32)
        start = 0
        for chunk in normals:
            part = slice(start, start + len(chunk))
            noise = chunk.to(integers.device).mul(self._mechanism.noise_std / self.unit).round_().to(torch.int64)
            noised = noise.add_(integers[part]).to(torch.int32)
            released[part] = noised.double().mul_(self.unit).div_(self._mechanism.expected_patients)
            start += len(chunk)
        if start != len(integers):
            raise ValueError(f"parameter {name!r} has {len(integers)} numbers, noise was given for {start}")
        return released.view(shape)

    def gradient(self, name: str) -> Tensor:
        """The sum of one parameter's clipped gradients, float64, without noise; for tests."""
        return self.integers[name].double().mul_(self.unit)

    def release_figures(self, normals: tuple[float, float]) -> tuple[float, float]:
        """Noised sum of the clamped losses, and noised number of patients, by two independent standard normal numbers."""
        mechanism = self._mechanism
        noise = [round(normal * mechanism.noise_std / self.unit) for normal in normals]
        loss_units, patient_units = self._loss_units + noise[0], self.patients * self._figure_units + noise[1]
        one = mechanism.figure_scale / self.unit
        return loss_units / one * mechanism.loss_bound, patient_units / one

    @property
    def _figure_units(self) -> int:
        # Rounded down: a whole figure is then no larger than the mechanism's.
        return math.floor(self._mechanism.figure_scale / self.unit)

    def _room_for(self, values: Tensor) -> Tensor:
        """A buffer like `values`, used again and again: fresh memory for every piece would cost more than the arithmetic."""
        room = self._room.get(values.device)
        if room is None or len(room) < len(values):
            room = self._room[values.device] = torch.empty_like(values)
        return room[: len(values)]

    def _count(self, share: float) -> None:
        self._loss_units += math.floor(share * self._figure_units)
        self.patients += 1


def _pieces(integers: Tensor, gradient: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    size = _PIECE_CPU if integers.device.type == "cpu" else _PIECE_GPU
    values = gradient.detach().to(torch.float32).reshape(-1)
    return zip(integers.view(-1).split(size), values.split(size), strict=True)


def _magic(device: torch.device) -> Tensor:
    return torch.tensor(_MAGIC, dtype=torch.float32, device=device)
