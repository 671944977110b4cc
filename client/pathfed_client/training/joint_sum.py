"""The sum over patients of their clipped vectors: whole numbers on a public lattice, so that it is exact.

A floating-point sum rounds at every addition, by more the larger it has grown, so that one patient's leaving can move it by more than that
patient's vector: by up to n^2 * 2^-24 * C for n patients (Casacuberta et al., CCS 2022). Here every patient's clipped vector is rounded
to the lattice of multiples of `unit` = C * 2^-21 before it is added, and the sum is kept in integers.

Guarantees:
    - **Sensitivity is exact.** The sum with a patient differs from the sum without by exactly that patient's own lattice vector, whose
      L2 norm is at most C (`PatientMechanism.gradient_bound` for the gradient), whatever the number and order of the others. That an
      engine makes this vector of that patient alone is the engine's to promise (`engines.engine`).
    - **Rounding is inside the bound.** Rounding d coordinates to the nearest multiple moves a vector by at most sqrt(d) * unit / 2, and the
      clip aims lower by as much: 0.6% of C for 630 million parameters, 1% for 1.9 billion.
    - **The noised sum lies on a coarse public grid** of whole lattice units (`release`): what is released is a post-processing of the
      continuous Gaussian mechanism on an exact sum, and which numbers can come out does not depend on the sum. The attack on
      floating-point Gaussians (Mironov, CCS 2012), which reads the sum off the gaps between them, has no gaps to read.
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
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from pathfed_common.privacy.mechanism import PatientMechanism
from pathfed_common.privacy.randomness import KeyedRandom

#: The lattice constant as a share of C.
UNIT_SHARE = 2.0**-21
#: 1.5 * 2^23: adding it to a float32 x of less than 2^22 rounds x to a whole number, which then lies in the last bits of the result.
_MAGIC = 1.5 * 2.0**23
_MAGIC_BITS = int(torch.tensor(_MAGIC, dtype=torch.float32).view(torch.int32))
#: Numbers handled at once: two buffers of this size stay in a processor's cache; a GPU wants fewer, larger calls.
_PIECE_CPU, _PIECE_GPU = 1 << 18, 1 << 26
#: Tensors smaller than a piece by this factor are put together.
_SMALL = 32
#: The largest share of the bound that rounding may take; beyond it the lattice is too coarse for so many parameters.
_LARGEST_ROUNDING = 0.1


class JointSum:
    """The sum of the patients' whole vectors before noise. Sensitive: it never leaves the private step.

    Attributes:
        integers: name to int32 tensor, in multiples of `unit`; the same bits whatever the order in which the patients came.
        loss_units: sum of the clamped losses, in multiples of `unit`.
        patients: patients who contributed.
        unit: the lattice constant.
        target: the largest norm of a gradient before it is rounded.
    """

    def __init__(self, parameters: Mapping[str, Tensor], mechanism: PatientMechanism, *, dimension: int | None = None) -> None:
        """Start at zero.

        Args:
            parameters: the trainable parameters by name; their shapes and devices count.
            mechanism: the public constants.
            dimension: d, where `parameters` are only a part of all trained numbers (a shard); default: their number.

        Raises:
            ValueError: so many parameters that rounding to the lattice would take more than a tenth of the bound.
        """
        self.unit = unit_of(mechanism)
        self._mechanism = mechanism
        count = sum(parameter.numel() for parameter in parameters.values()) if dimension is None else dimension
        rounding = math.sqrt(count) * self.unit / 2
        if rounding > _LARGEST_ROUNDING * mechanism.gradient_bound:
            raise ValueError(f"{count} parameters are too many for a lattice of {UNIT_SHARE:g} C")
        self.target = mechanism.clip_target - rounding
        self.integers = {name: torch.zeros(p.shape, dtype=torch.int32, device=p.device) for name, p in sorted(parameters.items())}
        self.loss_units = 0
        self.patients = 0
        self._rooms: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def __repr__(self) -> str:
        return "JointSum(<sensitive>)"

    def clip_factor(self, norm: float) -> float:
        """The factor, at most 1, that brings a gradient of this norm within `target`.

        Raises:
            ValueError: the norm is negative or not finite; such a patient contributes zero and is never clipped.
        """
        # The mechanism clips to its own target; a norm larger by as much as ours is lower gets our factor.
        return self._mechanism.clip_factor(norm * (self._mechanism.clip_target / self.target))

    def add(self, gradients: Iterable[tuple[str, Tensor]], *, norm: float, loss: float) -> None:
        """Add one patient.

        Args:
            gradients: pairs of a name and the gradient of that parameter or shard, each name once at most; one that is missing counts
                as zero. They are asked for one after the other, so that all need not be in memory.
            norm: L2 norm of the patient's whole gradient.
            loss: the patient's loss.

        Raises:
            ValueError: norm or loss is not finite. Nothing was added.
        """
        scale, share = self.clip_factor(norm) / self.unit, self._mechanism.loss_share(loss)
        for batch in _batches((self.integers[name], gradient) for name, gradient in gradients):
            self._add_rounded(batch, scale)
        # Rounded down, as a whole figure is: neither is larger than the mechanism's.
        self.loss_units += math.floor(share * self._figure_units)
        self.patients += 1

    def gradient(self, name: str) -> Tensor:
        """The sum of one parameter's clipped gradients, float64, without noise; for tests."""
        return self.integers[name].double().mul_(self.unit)

    def release_figures(self, random: KeyedRandom) -> tuple[float, float]:
        """Noised sum of the clamped losses, and noised number of patients.

        Args:
            random: a source for this alone.
        """
        figures = torch.tensor([self.loss_units, self.patients * self._figure_units], dtype=torch.float64)
        random.add_normals(figures, self._mechanism.noise_std / self.unit)
        loss_units, patient_units = figures.round_().tolist()
        one = self._mechanism.figure_scale / self.unit
        return loss_units / one * self._mechanism.loss_bound, patient_units / one

    @property
    def _figure_units(self) -> int:
        return math.floor(self._mechanism.figure_scale / self.unit)

    def _add_rounded(self, batch: Sequence[tuple[Tensor, Tensor]], scale: float) -> None:
        """To whole numbers add scale * values, rounded, which are below 2^22; all on one device, a buffer's size at most."""
        values = batch[0][1] if len(batch) == 1 else torch.cat([part for _, part in batch])
        magic, room = self._room(values.device)
        rounded = room[: values.numel()]
        torch.add(magic, values, alpha=scale, out=rounded)
        whole = rounded.view(torch.int32).sub_(_MAGIC_BITS)
        if len(batch) == 1:
            batch[0][0].add_(whole)
        else:
            torch._foreach_add_([piece for piece, _ in batch], torch.split_with_sizes(whole, [part.numel() for _, part in batch]))

    def _room(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """1.5 * 2^23, and a buffer, used again and again: fresh memory for every piece would cost more than the arithmetic."""
        if device not in self._rooms:
            numbers = min(_piece_size(device), sum(integers.numel() for integers in self.integers.values()))
            self._rooms[device] = torch.tensor(_MAGIC, device=device), torch.empty(numbers, dtype=torch.float32, device=device)
        return self._rooms[device]


def _batches(pairs: Iterable[tuple[Tensor, Tensor]]) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Whole numbers and what is added to them, flat: large tensors cut to pieces, and small ones put together, for calls cost time too."""
    small: list[tuple[Tensor, Tensor]] = []
    held = 0
    for integers, gradient in pairs:
        flat, values = integers.view(-1), gradient.detach().reshape(-1).float()
        numbers, size = values.numel(), _piece_size(values.device)
        if numbers > size:
            yield from ([pair] for pair in zip(flat.split(size), values.split(size), strict=True))
        elif numbers > size // _SMALL:
            yield [(flat, values)]
        else:
            if held + numbers > size:
                yield small
                small, held = [], 0
            small.append((flat, values))
            held += numbers
    if small:
        yield small


def _piece_size(device: torch.device) -> int:
    return _PIECE_CPU if device.type == "cpu" else _PIECE_GPU


def unit_of(mechanism: PatientMechanism) -> float:
    """The lattice constant."""
    return mechanism.clip_norm * UNIT_SHARE


def release(integers: Tensor, mechanism: PatientMechanism, random: KeyedRandom, *, start: int = 0) -> Tensor:
    """Noised sum divided by the public B, float32, in the memory of the sum, which is gone afterwards.

    Noise of std sigma * C is added in float64, the sum is rounded to a whole number of public cells, the power of two of lattice units from
    std / 256 up to std / 128 but one unit at least, modulo 2^32 (`KeyedRandom.add_normals`), and then once to float32.

    Args:
        integers: a parameter's sum, or a contiguous shard of it, in multiples of the lattice constant.
        mechanism: the public constants.
        random: the parameter's own source.
        start: place of the shard's first number in the flattened parameter: shards together get the noise of the whole.
    """
    flat = integers.view(-1)
    random.add_normals(flat, mechanism.noise_std / unit_of(mechanism), start=start)
    released = flat.view(torch.float32)
    for noised, out in zip(flat.split(_PIECE_CPU), released.split(_PIECE_CPU), strict=True):
        out.copy_(noised.double().mul_(unit_of(mechanism) / mechanism.expected_patients))
    return released.view(integers.shape)
