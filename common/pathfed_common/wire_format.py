"""How an update's numbers travel: the formats, their exact size, and how far they round.

    float32     as computed
    bfloat16    rounded to the nearest
    int8        blocks of 256 numbers, counted from a tensor's first: a scale s in float32 and whole numbers q of -127 to 127, read as q * s

Guarantees:
    - **Rounding comes after the noise**: what travels is made of the released numbers, and for int8 of coins that depend on nothing else.
      It costs no privacy.
    - **The size is public**: it follows from format and shapes alone, to the byte (`file_bytes`).
    - int8 is unbiased: x / s lies between two whole numbers, and a coin decides with the odds of its place between them, to 2^-33. Coins
      come from the site's keyed source, by the tensor's name: a round computed again has the same bytes.
    - s is the block's largest magnitude over 127, rounded up, so that |x / s| <= 127 exactly. A block of zeros has the scale 0, and one
      with a number that is not finite a NaN for scale and zeros, which admission refuses as it does the number itself.
    - Reading is one float32 product a number: the same bits on every machine.
    - How far the rounding moved an update is bounded by what came (`rounding`): nobody has to be believed.

In a file an int8 tensor `name` has its shape, and `name.scale` is beside it, a scale for each block, the last of which may be shorter.

Stochastic rounding for sent gradients: Alistarh et al. 2017 (QSGD), arXiv:1610.02132.
"""

import math
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Final, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pathfed_common.encoder import weights
from pathfed_common.encoder.blocks import read_numbers, spans
from pathfed_common.encoder.weights import Shape
from pathfed_common.privacy.randomness import KeyedRandom

WireType = Literal["float32", "bfloat16", "int8"]
WIRE_TYPES: Final[tuple[WireType, ...]] = get_args(WireType)

#: Numbers that share a scale.
BLOCK: Final = 256
#: The largest whole number of a block.
LARGEST: Final = 127
#: What an honest block's largest whole number is at least: the largest magnitude is within 2^-21 of 127 scales, and is rounded by a coin.
LEAST_LARGEST: Final = 126
_SCALE = ".scale"
_METADATA = {"kind": "pathfed-update"}
#: Numbers handled at once, a multiple of a block.
_PIECE = 1 << 18
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
#: Below it a float32 has fewer digits.
_SMALLEST_NORMAL = float(np.finfo(np.float32).tiny)
_BF16_FRACTION, _BF16_EXPONENTS, _BF16_BIAS = 7, 256, 127


def layout(shapes: Mapping[str, Shape], dtype: WireType) -> dict[str, tuple[torch.dtype, Shape]]:
    """Type and shape of each tensor of an update's file.

    Args:
        shapes: of the update's tensors, by name.
        dtype: the format.

    Raises:
        ValueError: a tensor is named as another one's scales.
    """
    made = {name: (_DTYPES[dtype], shape) for name, shape in shapes.items()}
    if dtype == "int8":
        scales = {name + _SCALE: (torch.float32, (_blocks(prod(shape)),)) for name, shape in shapes.items()}
        if made.keys() & scales.keys():
            raise ValueError(f"a tensor is named as another one's scales: {sorted(made.keys() & scales.keys())[0]!r}")
        made |= scales
    return made


def file_bytes(shapes: Mapping[str, Shape], dtype: WireType) -> int:
    """Length of an update's file: every update of these shapes has it."""
    made = layout(shapes, dtype)
    return len(weights.header_bytes(made, _METADATA)) + sum(kind.itemsize * prod(shape) for kind, shape in made.values())


def chunks(update: Mapping[str, Tensor], dtype: WireType, random: KeyedRandom) -> Iterator[bytes]:
    """An update's file in pieces, one tensor in memory at a time: for `files.write_atomic`.

    Args:
        update: float32 tensors by name, after the noise.
        dtype: the format.
        random: the round's source; int8 takes its coins from children of it that serve nothing else.
    """
    made = layout({name: tuple(tensor.shape) for name, tensor in update.items()}, dtype)
    scales: dict[str, Tensor] = {}

    def tensor(name: str) -> Tensor:
        if name in scales:
            return scales.pop(name)
        if dtype != "int8":
            return update[name].to(_DTYPES[dtype])
        numbers, found = quantise(update[name].detach().reshape(-1).to(torch.float32).numpy(), random.child("wire rounding", name))
        scales[name + _SCALE] = torch.from_numpy(found)
        return torch.from_numpy(numbers).view(update[name].shape)

    return weights.chunks(made, tensor, _METADATA)


def quantise(values: NDArray[np.float32], random: KeyedRandom) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Whole numbers (n,) and scales (blocks of 256,) of a flat tensor.

    Args:
        values: float32, shape (n,).
        random: the tensor's own source; number i gets coin i.
    """
    numbers, scales = np.empty(len(values), np.int8), np.empty(_blocks(len(values)), np.float32)
    for start in range(0, len(values), _PIECE):
        part = values[start : start + _PIECE]
        first, count = start // BLOCK, _blocks(len(part))
        blocks = np.zeros((count, BLOCK), np.float64)
        blocks.reshape(-1)[: len(part)] = part
        scales[first : first + count] = _scales(np.abs(blocks).max(axis=1))
        coins = random.words(count * BLOCK // 2).astype("<u8", copy=False).view("<u4").reshape(count, BLOCK)
        rounded = _rounded(blocks, scales[first : first + count].astype(np.float64), coins)
        numbers[start : start + len(part)] = rounded.reshape(-1)[: len(part)]
    return numbers, scales


def _scales(largest: NDArray[np.float64]) -> NDArray[np.float32]:
    """A scale for each block's largest magnitude: at least a 127th of it."""
    scales = (largest / LARGEST).astype(np.float32)
    scales = np.where(scales.astype(np.float64) * LARGEST < largest, np.nextafter(scales, np.float32(np.inf)), scales)
    return np.where(np.isfinite(largest), scales, np.float32(np.nan)).astype(np.float32)


def _rounded(blocks: NDArray[np.float64], scales: NDArray[np.float64], coins: NDArray[np.uint32]) -> NDArray[np.int8]:
    whole = np.isfinite(scales)
    divisors = np.where(whole & (scales > 0), scales, 1.0)[:, None]
    places = np.where(whole[:, None], blocks, 0.0) / divisors
    below = np.floor(places)
    # In the middle of its 2^-32 cell, a coin is above as often as below.
    below += (coins + 0.5) < (places - below) * 2.0**32
    return below.astype(np.int8)


class UpdateNumbers:
    """Implements `BlockReader` on an update's file, whatever its format. The file must not change while it is read."""

    def __init__(self, path: Path) -> None:
        """Read the file's header.

        Raises:
            ValueError: not a file as `chunks` writes it.
            OSError: the file cannot be read.
        """
        self._path, self._slots = path, weights.slots(path)
        self._shapes = {name: slot.shape for name, slot in self._slots.items() if not self._is_scale(name)}
        for name in self._shapes:
            if self._slots[name].dtype not in _DTYPES.values():
                raise ValueError(f"tensor {name!r} has dtype {self._slots[name].dtype}, which no update has")

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """See `BlockReader.shapes`: the scales are none of them."""
        return self._shapes

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """See `BlockReader.read`."""
        values = self._raw(name, start, stop)
        if values.dtype != torch.int8:
            return values.to(torch.float32)
        first = start // BLOCK
        scales = self._raw(name + _SCALE, first, _blocks(stop)).repeat_interleave(BLOCK)
        return values.to(torch.float32).mul_(scales[start - first * BLOCK : stop - first * BLOCK])

    def rounding(self) -> float:
        """A bound on the L2 norm of what the format's rounding added to the update: root of the expected square, over the coins of int8.

        int8: the variance of a number's rounding is at most s^2 / 4. bfloat16: a number is moved by at most half a unit in its last place.
        float32: 0. Sums are rounded once, so that the bits do not depend on the machine.

        Raises:
            ValueError: int8 numbers or scales that rounding cannot give, or scales that are not finite.
            OSError: the file cannot be read.
        """
        squares: list[float] = []
        for name, shape in self._shapes.items():
            kind = self._slots[name].dtype
            for start, stop in spans(prod(shape), _PIECE):
                if kind == torch.int8:
                    squares.append(self._int8_squares(name, start, stop))
                elif kind == torch.bfloat16:
                    squares.append(_bf16_squares(self._raw(name, start, stop)))
        return math.sqrt(math.fsum(squares)) / 2

    def _int8_squares(self, name: str, start: int, stop: int) -> float:
        """Sum of s^2 over the numbers of whole blocks, once they are found fit."""
        numbers, scales = self._raw(name, start, stop).to(torch.int16), self._raw(name + _SCALE, start // BLOCK, _blocks(stop))
        magnitudes = torch.zeros(len(scales) * BLOCK, dtype=torch.int16)
        magnitudes[: stop - start] = numbers.abs()
        largest = magnitudes.view(-1, BLOCK).amax(dim=1)
        least = torch.where(scales >= _SMALLEST_NORMAL, LEAST_LARGEST, 1)
        reached = torch.where(scales == 0, largest == 0, (largest >= least) & (largest <= LARGEST))
        fit = reached & torch.isfinite(scales) & ~torch.signbit(scales)
        if not bool(fit.all()):
            place = int(torch.nonzero(~fit)[0])
            found = f"has the scale {float(scales[place]):g} and numbers up to {int(largest[place])}"
            raise ValueError(f"block {start // BLOCK + place} of {name[:80]!r} {found}")
        counts = torch.full((len(scales),), BLOCK)
        counts[-1] = stop - start - (len(scales) - 1) * BLOCK
        return math.fsum((scales.to(torch.float64).square() * counts).tolist())

    def _raw(self, name: str, start: int, stop: int) -> Tensor:
        """Numbers as they lie in the file."""
        return read_numbers(self._path, self._slots, name, start, stop)

    def _is_scale(self, name: str) -> bool:
        scaled = self._slots.get(name.removesuffix(_SCALE))
        return name.endswith(_SCALE) and scaled is not None and scaled.dtype == torch.int8


def open_update(path: Path) -> UpdateNumbers:
    """The numbers of an update's file, whatever its format.

    Raises:
        ValueError: not a file as `chunks` writes it.
        OSError: the file cannot be read.
    """
    return UpdateNumbers(path)


def _bf16_squares(values: Tensor) -> float:
    """Sum of squared units in the last place of finite bfloat16 numbers."""
    exponents = (values.view(torch.int16) >> _BF16_FRACTION) & (_BF16_EXPONENTS - 1)
    counts = torch.bincount(exponents.to(torch.int64), minlength=_BF16_EXPONENTS).tolist()
    return math.fsum(count * 4.0 ** (max(place, 1) - _BF16_BIAS - _BF16_FRACTION) for place, count in enumerate(counts))


def _blocks(numbers: int) -> int:
    return -(-numbers // BLOCK)
