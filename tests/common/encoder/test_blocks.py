"""Blocks of a tensor file: the file's own numbers whatever the block, a few of them in memory, no file left open."""

import os
import tracemalloc
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pathfed_common.encoder import blocks, weights
from pathfed_common.encoder.blocks import FileBlocks, block_chunks, spans
from pathfed_common.files import write_atomic

Tensors = dict[str, Tensor]


def some(dtype: torch.dtype = torch.float32) -> Tensors:
    random = torch.Generator().manual_seed(4)
    shapes = {"b": (7, 3), "a": (5,), "scalar": (), "none": (0, 4)}
    return {name: torch.randn(shape, generator=random).to(dtype) for name, shape in shapes.items()}


def written(path: Path, tensors: Tensors) -> FileBlocks:
    write_atomic(path, weights.dump(tensors, {"kind": "test"}))
    return FileBlocks(path)


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_block_is_the_tensors_own_numbers(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = some(dtype)
    reader = written(tmp_path / "file", tensors)
    assert reader.shapes == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        flat = tensor.reshape(-1).float()
        for start in range(len(flat) + 1):
            for stop in range(start, len(flat) + 1):
                found = reader.read(name, start, stop)
                assert found.dtype is torch.float32
                assert torch.equal(found, flat[start:stop])


@settings(max_examples=50, deadline=None)
@given(count=st.integers(0, 60), size=st.integers(1, 70))
def test_spans_are_every_number_once_in_order(count: int, size: int) -> None:
    found = list(spans(count, size))
    assert [number for start, stop in found for number in range(start, stop)] == list(range(count))
    assert all(0 < stop - start <= size for start, stop in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 4, 21, 10_000])
def test_written_by_blocks_a_file_has_the_bytes_of_dump(size: int, dtype: torch.dtype) -> None:
    tensors = some(dtype)
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    made = block_chunks(layout, lambda name, start, stop: tensors[name].reshape(-1)[start:stop], {"kind": "test"}, size=size)
    assert b"".join(made) == weights.dump(tensors, {"kind": "test"})


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    reader = written(tmp_path / "file", some())
    with pytest.raises(ValueError, match="no tensor 'c'"):
        reader.read("c", 0, 1)
    for start, stop in ((-1, 2), (3, 2), (0, 6)):
        with pytest.raises(ValueError, match="has 5 numbers"):
            reader.read("a", start, stop)
    with pytest.raises(ValueError, match=r"torch\.int64"):
        written(tmp_path / "whole", {"n": torch.arange(3)})


def test_a_file_that_was_cut_short_meanwhile_is_refused(tmp_path: Path) -> None:
    reader = written(tmp_path / "file", some())
    os.truncate(tmp_path / "file", (tmp_path / "file").stat().st_size - 4)
    reader.read("a", 0, 5)
    with pytest.raises(ValueError, match="ends before number 1 of 'scalar'"):
        reader.read("scalar", 0, 1)


@pytest.mark.parametrize("wrong", [torch.zeros(5, dtype=torch.float64), torch.zeros(4), torch.zeros(5, 1)])
def test_a_block_that_does_not_fit_its_layout_is_refused(wrong: Tensor) -> None:
    with pytest.raises(ValueError, match="its layout says"):
        b"".join(block_chunks({"a": (torch.float32, (5,))}, lambda *_: wrong, {}))


def test_hundreds_of_readers_hold_no_file_open(tmp_path: Path) -> None:
    written(tmp_path / "file", some())
    before = open_files()
    readers = [FileBlocks(tmp_path / "file") for _ in range(300)]
    assert all(reader.read("a", 0, 5).shape == (5,) for reader in readers)
    assert open_files() == before


def test_memory_is_that_of_blocks_not_of_the_tensor(tmp_path: Path) -> None:
    big = 16 * blocks.BLOCK
    reader = written(tmp_path / "file", {"big": torch.ones(big)})
    tracemalloc.start()  # sees the byte strings; a tensor of a block is as large
    write_atomic(tmp_path / "copy", block_chunks({"big": (torch.float32, (big,))}, reader.read, {}))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * 4 * blocks.BLOCK
    assert (tmp_path / "copy").stat().st_size > 4 * big
