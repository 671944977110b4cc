"""Tensor files block by block: a few of a tensor's numbers in memory at a time, so that no tensor's size sets the memory.

A block is the numbers [start, stop) of one tensor, flattened in row-major order. Where blocks begin and end must change no number: what is
computed of a block is computed number by number, or in runs that are counted from the tensor's first number (`norms`).

Files are read by plain reads, not through a memory map, whose pages would count as the process's memory. A reader holds no file open
between two reads, so that hundreds of files may be read in turn.
"""

from collections.abc import Callable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from pathfed_common.encoder import weights
from pathfed_common.encoder.weights import Shape, Slot

#: Numbers in a block: 1 MiB as float32, which a processor's cache holds with what is computed of it.
BLOCK = 2**18

_READABLE = (torch.float32, torch.bfloat16)


class BlockReader(Protocol):
    """The numbers of a set of named tensors, whatever the form in which a file holds them."""

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """Shape of each tensor, by name."""
        ...

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """The numbers [start, stop) of a tensor: float32, one-dimensional, in memory of their own. None depends on `start` or `stop`.

        Raises:
            ValueError: no such tensor, or no such numbers in it.
            OSError: the file cannot be read.
        """
        ...


class FileBlocks:
    """Implements `BlockReader` on a file of float32 or bfloat16 tensors. The file must not change while it is read."""

    def __init__(self, path: Path) -> None:
        """Read the file's header.

        Raises:
            ValueError: not a file as `weights.dump` writes it, or with a tensor of another dtype.
            OSError: the file cannot be read.
        """
        self._path, self._slots = path, weights.slots(path)
        self._shapes = {name: slot.shape for name, slot in self._slots.items()}
        for name, slot in self._slots.items():
            if slot.dtype not in _READABLE:
                raise ValueError(f"tensor {name!r} is {slot.dtype}, blocks are read of {_READABLE}")

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """See `BlockReader.shapes`."""
        return self._shapes

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """See `BlockReader.read`."""
        return read_numbers(self._path, self._slots, name, start, stop).to(torch.float32)


def read_numbers(path: Path, slots: Mapping[str, Slot], name: str, start: int, stop: int) -> Tensor:
    """The numbers [start, stop) of a tensor as they lie in a file: its dtype, one-dimensional, in memory of their own.

    Args:
        path: the file.
        slots: where its tensors lie (`weights.slots`).
        name: the tensor.
        start: place of the first number in the flattened tensor.
        stop: place behind the last.

    Raises:
        ValueError: no such tensor, or no such numbers in it.
        OSError: the file cannot be read.
    """
    if name not in slots:
        raise ValueError(f"no tensor {name!r} in the file")
    slot = slots[name]
    if not 0 <= start <= stop <= prod(slot.shape):
        raise ValueError(f"tensor {name!r} has {prod(slot.shape)} numbers, not [{start}, {stop})")
    values = torch.empty(stop - start, dtype=slot.dtype)
    room = values.view(torch.uint8).numpy().data
    with path.open("rb", buffering=0) as file:
        file.seek(slot.start + start * slot.dtype.itemsize)
        if file.readinto(room) != len(room):
            raise ValueError(f"the file ends before number {stop} of {name!r}")
    return values


def spans(count: int, size: int = BLOCK) -> Iterator[tuple[int, int]]:
    """(start, stop) of the blocks of a tensor of so many numbers, in order."""
    return ((start, min(start + size, count)) for start in range(0, count, size))


def block_chunks(
    layout: Mapping[str, tuple[torch.dtype, Shape]],
    block: Callable[[str, int, int], Tensor],
    metadata: Mapping[str, str],
    *,
    size: int = BLOCK,
) -> Iterator[bytes]:
    """A file's bytes in pieces, one block in memory at a time: those of `weights.dump`, for `files.write_atomic`.

    Args:
        layout: dtype and shape of every tensor.
        block: gives the numbers [start, stop) of a tensor by its name, one-dimensional; asked in the order of the file.
        metadata: texts stored in the header.
        size: numbers in a block; the bytes do not depend on it.

    Raises:
        ValueError: as `weights.dump`, or `block` gives another dtype or shape than `layout` says.
    """
    yield weights.header_bytes(layout, metadata)
    for name in sorted(layout):
        dtype, shape = layout[name]
        for start, stop in spans(prod(shape), size):
            values = block(name, start, stop)
            if (values.dtype, tuple(values.shape)) != (dtype, (stop - start,)):
                raise ValueError(f"block [{start}, {stop}) of {name!r} is {values.dtype} {tuple(values.shape)}, its layout says {dtype}")
            yield values.contiguous().view(torch.uint8).numpy().tobytes()
