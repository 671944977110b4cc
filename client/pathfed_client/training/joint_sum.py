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
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from pathfed_common.privacy.mechanism import PatientMechanism
from pathfed_common.privacy.randomness import KeyedRandom

#: The lattice constant as a share of C.
UNIT_SHARE = 2.0**-21
#: 1.5 * 2^23: adding it to a float32 x of less than 2^22 rounds x to a whole number, which then lies in the last bits of the result.
_MAGIC = 1.5 * 2.0**23
#: Numbers handled at once by each thread: gradient, memory and sum stay in its cache meanwhile; a GPU wants fewer, larger calls.
_PIECE_CPU, _PIECE_GPU = 1 << 18, 1 << 26
#: More threads than that get no larger memory.
_MOST_THREADS = 16
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
        self._largest = {device: _piece_size(device) for device in {integers.device for integers in self.integers.values()}}
        self._pieces = {name: self._in_pieces(integers.view(-1)) for name, integers in self.integers.items()}
        self._rounders: dict[torch.device, _Rounder] = {}

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
        with torch.no_grad():
            for sums, values in self._batches(gradients):
                whole = self._rounder(values[0].device).rounded(values, scale)
                if len(sums) == 1:
                    sums[0].add_(whole)
                else:
                    torch._foreach_add_(sums, torch.split_with_sizes(whole, [part.numel() for part in values]))
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

    def _batches(self, gradients: Iterable[tuple[str, Tensor]]) -> Iterator["_Batch"]:
        """Large tensors in their pieces, and small ones put together, for calls cost time too."""
        small, room = _Batch([], []), 0
        for name, gradient in gradients:
            pieces, values = self._pieces[name], gradient.reshape(-1).float()
            numbers, largest = values.numel(), self._largest[values.device]
            if len(pieces) > 1:
                yield from (_Batch([piece], [part]) for piece, part in zip(pieces, values.split(len(pieces[0])), strict=True))
            elif numbers > largest // _SMALL:
                yield _Batch([pieces[0]], [values])
            else:
                if numbers > room:
                    if small.sums:
                        yield small
                    small, room = _Batch([], []), largest
                small.sums.append(pieces[0])
                small.values.append(values)
                room -= numbers
        if small.sums:
            yield small

    def _in_pieces(self, flat: Tensor) -> tuple[Tensor, ...]:
        """As few as can be, all of one size but the last, which may be smaller."""
        numbers, largest = flat.numel(), self._largest[flat.device]
        return (flat,) if numbers <= largest else flat.split(-(-numbers // -(-numbers // largest)))

    def _rounder(self, device: torch.device) -> "_Rounder":
        if device not in self._rounders:
            numbers = min(self._largest[device], sum(integers.numel() for integers in self.integers.values()))
            self._rounders[device] = _Rounder(numbers, device)
        return self._rounders[device]


class _Batch(NamedTuple):
    """Whole numbers and what is to be rounded and added to them, flat; all on one device, a piece's numbers at most."""

    sums: list[Tensor]
    values: list[Tensor]


class _Rounder:
    """Rounds in a memory that is used again and again: fresh memory for every piece would cost more than the arithmetic."""

    def __init__(self, numbers: int, device: torch.device) -> None:
        """For batches of that many numbers at most."""
        self._magic = torch.tensor(_MAGIC, device=device)
        self._magic_bits = self._magic.view(torch.int32)
        self._memory = torch.empty(numbers, dtype=torch.float32, device=device)
        # A view costs as much as a thousand additions.
        self._views: dict[int, tuple[Tensor, Tensor]] = {}

    def rounded(self, values: list[Tensor], scale: float) -> Tensor:
        """scale * values, one after the other, rounded to whole numbers, which are below 2^22: int32, good until the next call."""
        rounded, whole = self._view(sum(part.numel() for part in values))
        joined = values[0] if len(values) == 1 else torch.cat(values, out=rounded)
        torch.add(self._magic, joined, alpha=scale, out=rounded)
        return whole.sub_(self._magic_bits)

    def _view(self, numbers: int) -> tuple[Tensor, Tensor]:
        """The first numbers of the memory, as float32 and as int32."""
        if numbers not in self._views:
            first = self._memory[:numbers]
            self._views[numbers] = first, first.view(torch.int32)
        return self._views[numbers]


def _piece_size(device: torch.device) -> int:
    """Numbers handled at once."""
    return _PIECE_CPU * min(torch.get_num_threads(), _MOST_THREADS) if device.type == "cpu" else _PIECE_GPU


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
