"""Tensors as bytes: safetensors with one byte string for one set of named tensors.

The library's own writer orders tensors by alignment and leaves the order of metadata open. Here names and metadata are sorted, tensors lie
back to back in the order of their names, and the header is canonical JSON padded with spaces to 8 bytes. Reading accepts that form alone,
so equal tensors have equal digests and a file holds nothing that is not a tensor. Every safetensors reader reads these files.

Format: https://github.com/huggingface/safetensors (8 bytes little-endian header length, header, data).
"""

import mmap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from json import loads
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pathfed_common import digest

Shape = tuple[int, ...]

_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float64: "F64", torch.int64: "I64", torch.int8: "I8"}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
_METADATA = "__metadata__"
#: A header of the largest encoders has some 1,000 tensors and 150 kB.
_LARGEST_HEADER = 16 * 2**20


@dataclass(frozen=True)
class Slot:
    """Where one tensor lies in a file: its type, its shape, and its first and last-plus-one byte."""

    dtype: torch.dtype
    shape: Shape
    start: int
    end: int


def dump(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The file's bytes. Equal tensors and metadata give equal bytes, whatever the order of either.

    Raises:
        ValueError: a dtype other than float32, bfloat16, float64, int64 or int8, or a name that cannot be used.
    """
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    return b"".join(chunks(layout, tensors.__getitem__, metadata))


def chunks(
    layout: Mapping[str, tuple[torch.dtype, Shape]], tensor: Callable[[str], Tensor], metadata: Mapping[str, str]
) -> Iterator[bytes]:
    """The same bytes in pieces, one tensor in memory at a time: for `files.write_atomic`.

    Args:
        layout: dtype and shape of every tensor.
        tensor: gives the tensor of a name; called once a name, in the order of the names.
        metadata: texts stored in the header.

    Raises:
        ValueError: as `dump`, or `tensor` gives another dtype or shape than `layout` says.
    """
    yield header_bytes(layout, metadata)
    for name in sorted(layout):
        value = tensor(name)
        if (value.dtype, tuple(value.shape)) != layout[name]:
            raise ValueError(f"tensor {name!r} is {value.dtype} {tuple(value.shape)}, its layout says {layout[name]}")
        yield value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def encoder_chunks(shapes: Mapping[str, Shape], tensor: Callable[[str], Tensor]) -> Iterator[bytes]:
    """The one file of an encoder alone, in pieces: float32 tensors by timm's names, as imports store it and releases hold it.

    Its digest is what a plan's `encoder.init_from` names. Metadata "format" is what timm and others look for.

    Args:
        shapes: of the encoder's tensors.
        tensor: gives the tensor of a name; called once a name, in the order of the names.

    Raises:
        ValueError: as `chunks`.
    """
    return chunks({name: (torch.float32, shape) for name, shape in shapes.items()}, tensor, {"format": "pt"})


def load(data: bytes) -> dict[str, Tensor]:
    """Every tensor of a file, in the order of the names. The tensors own their memory.

    Raises:
        ValueError: not a file as `dump` writes it.
    """
    return {name: _tensor(data, slot) for name, slot in _slots(data[: 8 + _LARGEST_HEADER], len(data)).items()}


def header(path: Path) -> dict[str, tuple[torch.dtype, Shape]]:
    """Dtype and shape of every tensor of a file, by name, reading its header alone.

    Raises:
        ValueError: not a file as `dump` writes it, or of another length than its header says.
        OSError: the file cannot be read.
    """
    return {name: (slot.dtype, slot.shape) for name, slot in slots(path).items()}


def read_tensor(path: Path, name: str) -> Tensor:
    """One tensor of a file, through a memory map: nothing else of the file is read. The tensor owns its memory.

    To read several, use `reader`, which parses the header once.

    Raises:
        ValueError: not a file as `dump` writes it, or no tensor of that name.
        OSError: the file cannot be read.
    """
    return reader(path)(name)


def reader(path: Path) -> Callable[[str], Tensor]:
    """A function that reads one tensor by name, as `read_tensor` does. The file must not change while it is used.

    Raises:
        ValueError: not a file as `dump` writes it; when called, no tensor of that name.
        OSError: the file cannot be read.
    """
    found = slots(path)

    def read(name: str) -> Tensor:
        if name not in found:
            raise ValueError(f"no tensor {name!r} in the file")
        slot = found[name]
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _tensor(data[slot.start : slot.end], Slot(slot.dtype, slot.shape, 0, slot.end - slot.start))

    return read


def slots(path: Path) -> dict[str, Slot]:
    """Where every tensor of a file lies, in the order of the names, reading its header alone.

    Raises:
        ValueError: not a file as `dump` writes it, or of another length than its header says.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        start += file.read(min(length, _LARGEST_HEADER))
        return _slots(start, path.stat().st_size)


def header_bytes(layout: Mapping[str, tuple[torch.dtype, Shape]], metadata: Mapping[str, str]) -> bytes:
    """What a file begins with: the header's length and the header.

    Raises:
        ValueError: as `dump`.
    """
    entries: dict[str, object] = {}
    if metadata:
        if not all(isinstance(text, str) for pair in metadata.items() for text in pair):
            raise ValueError("metadata are texts")
        entries[_METADATA] = dict(metadata)
    place = 0
    for name in sorted(layout):
        dtype, shape = layout[name]
        if dtype not in _NAMES:
            raise ValueError(f"tensor {name!r} has dtype {dtype}, known are {sorted(_DTYPES)}")
        if not name or name == _METADATA:
            raise ValueError(f"a tensor cannot be named {name!r}")
        end = place + dtype.itemsize * prod(shape)
        entries[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [place, end]}
        place = end
    text = digest.canonical(entries)
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class FileTensors(Mapping[str, Tensor]):
    """A file's tensors by name, each read when it is asked for: of many, one is in memory. The file must not change while it is used."""

    def __init__(self, path: Path) -> None:
        """Read the header.

        Raises:
            ValueError: not a file as `dump` writes it.
            OSError: the file cannot be read.
        """
        self._shapes = header(path)
        self._read = reader(path)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._shapes:
            raise KeyError(name)
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def _tensor(data: bytes, slot: Slot) -> Tensor:
    if slot.start == slot.end:
        return torch.empty(slot.shape, dtype=slot.dtype)
    # A bytearray, because torch warns of memory that cannot be written; it is the tensor's own copy.
    raw = torch.frombuffer(bytearray(data[slot.start : slot.end]), dtype=torch.uint8)
    return raw.view(slot.dtype).reshape(slot.shape)


def _slots(start: bytes, size: int) -> dict[str, Slot]:
    """Parse and check a header; `start` holds at least the header, `size` is the file's whole length in bytes."""
    length = int.from_bytes(start[:8], "little")
    if len(start) < 8 or length > _LARGEST_HEADER or len(start) < 8 + length:
        raise ValueError("not a safetensors file: the header is cut short or too long")
    try:
        entries = loads(start[8 : 8 + length])
        metadata = entries.pop(_METADATA, {})
        layout = {name: _entry(entry) for name, entry in entries.items()}
        canonical = header_bytes(layout, metadata)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"not a safetensors file: {error}") from None
    if canonical != start[: 8 + length]:
        raise ValueError("the header is not in pathfed's canonical form (names sorted, tensors back to back)")
    slots, place = {}, 8 + length
    for name in sorted(layout):
        dtype, shape = layout[name]
        slots[name] = Slot(dtype, shape, place, place + dtype.itemsize * prod(shape))
        place = slots[name].end
    if place != size:
        raise ValueError(f"the header describes {place} bytes, the file has {size}")
    return slots


def _entry(entry: Any) -> tuple[torch.dtype, Shape]:
    shape = entry["shape"]
    if not isinstance(shape, list) or not all(type(side) is int and 0 <= side < 2**40 for side in shape):
        raise ValueError(f"shape {str(shape)[:80]} is not a list of whole numbers")
    if entry["dtype"] not in _DTYPES:
        raise ValueError(f"unknown dtype {str(entry['dtype'])[:20]!r}, known are {sorted(_DTYPES)}")
    return _DTYPES[entry["dtype"]], tuple(shape)
