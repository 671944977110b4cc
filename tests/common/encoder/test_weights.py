"""Tensors as bytes: one byte string for one set of tensors, readable by the safetensors library, strict on the way in."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from pathfed_common.encoder import weights


def _tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "b.weight": torch.randn(3, 5, generator=generator),
        "a": torch.randn(7, generator=generator).to(torch.bfloat16),
        "scalar": torch.tensor(4.0, dtype=torch.float64),
        "empty": torch.zeros(0, 3),
        "count": torch.tensor([2**60, -1]),
    }


def _with_header(raw: dict[str, object], data: bytes) -> bytes:
    text = json.dumps(raw, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data


def test_order_of_names_and_metadata_does_not_matter() -> None:
    tensors = _tensors()
    data = weights.dump(tensors, {"x": "1", "y": "2"})
    assert weights.dump(dict(reversed(tensors.items())), {"y": "2", "x": "1"}) == data
    assert weights.dump({**tensors, "b.weight": tensors["b.weight"].t().contiguous().t()}, {"x": "1", "y": "2"}) == data
    assert list(weights.load(data)) == sorted(tensors)


def test_round_trip_keeps_every_bit() -> None:
    tensors = _tensors()
    for name, tensor in weights.load(weights.dump(tensors, {})).items():
        assert tensor.dtype == tensors[name].dtype
        assert tensor.shape == tensors[name].shape
        assert tensor.equal(tensors[name])


def test_safetensors_library_reads_the_same() -> None:
    tensors = _tensors()
    loaded = safetensors.torch.load(weights.dump(tensors, {"format": "pt"}))
    assert set(loaded) == set(tensors)
    assert all(loaded[name].equal(tensor) and loaded[name].dtype == tensor.dtype for name, tensor in tensors.items())


def test_nans_and_signed_zeros_survive() -> None:
    odd = torch.tensor([float("nan"), -0.0, float("inf"), 1e-45])
    assert weights.load(weights.dump({"odd": odd}, {}))["odd"].view(torch.int32).equal(odd.view(torch.int32))


def metadata(path: Path) -> dict[str, str]:
    """As safetensors itself reads it."""
    with safetensors.safe_open(path, "pt") as file:
        return dict(file.metadata() or {})


def test_header_metadata_and_single_tensors_are_read_from_a_file(tmp_path: Path) -> None:
    tensors, path = _tensors(), tmp_path / "state.safetensors"
    path.write_bytes(weights.dump(tensors, {"kind": "base state"}))
    assert weights.header(path) == {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    assert metadata(path) == {"kind": "base state"}
    for name, tensor in tensors.items():
        read = weights.read_tensor(path, name)
        assert read.equal(tensor)
        assert read.dtype == tensor.dtype
        read.add_(1)  # the tensor owns its memory
    assert weights.read_tensor(path, "b.weight").equal(tensors["b.weight"])
    with pytest.raises(ValueError, match="no tensor 'missing'"):
        weights.read_tensor(path, "missing")


def test_chunks_ask_for_one_tensor_at_a_time_and_join_to_the_same_bytes() -> None:
    tensors, asked = _tensors(), []

    def give(name: str) -> Tensor:
        asked.append(name)
        return tensors[name]

    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    pieces = weights.chunks(layout, give, {"a": "b"})
    first = next(pieces)
    assert asked == []
    second = next(pieces)
    assert asked == ["a"]
    assert first + second + b"".join(pieces) == weights.dump(tensors, {"a": "b"})
    with pytest.raises(ValueError, match="its layout says"):
        list(weights.chunks({"a": (torch.float32, (2,))}, lambda _: torch.zeros(3), {}))


@pytest.mark.parametrize(
    "tensor", [torch.zeros(2, dtype=torch.float16), torch.zeros(2, dtype=torch.bool), torch.zeros(2, dtype=torch.cfloat)]
)
def test_other_dtypes_are_not_written(tensor: Tensor) -> None:
    with pytest.raises(ValueError, match="has dtype"):
        weights.dump({"x": tensor}, {})


def test_library_file_with_another_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown dtype 'F16'"):
        weights.load(safetensors.torch.save({"x": torch.zeros(2, dtype=torch.float16)}))


_ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00" * 7,
        (2**62).to_bytes(8, "little") + b"{}",
        _with_header({"a": _ENTRY}, b"\x00" * 7),
        _with_header({"a": _ENTRY}, b"\x00" * 9),
        _with_header({"a": {**_ENTRY, "shape": [3]}}, b"\x00" * 8),
        _with_header({"a": {**_ENTRY, "shape": [-2]}}, b"\x00" * 8),
        _with_header({"a": {**_ENTRY, "shape": [2.0]}}, b"\x00" * 8),
        _with_header({"a": {**_ENTRY, "shape": [True, 2]}}, b"\x00" * 8),
        _with_header({"a": {**_ENTRY, "note": 1}}, b"\x00" * 8),
        _with_header({"a": {**_ENTRY, "data_offsets": [4, 12]}}, b"\x00" * 12),
        _with_header({"a": _ENTRY, "b": _ENTRY}, b"\x00" * 8),
        _with_header({"a": {**_ENTRY, "data_offsets": [8, 16]}, "b": _ENTRY}, b"\x00" * 16),
        _with_header({"__metadata__": {"n": 1}, "a": _ENTRY}, b"\x00" * 8),
        _with_header({"a": 3}, b""),
        _with_header({"": _ENTRY}, b"\x00" * 8),
        (2).to_bytes(8, "little") + b"[]",
        (16).to_bytes(8, "little") + b"[" * 16,
    ],
)
def test_files_of_another_form_are_refused(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"safetensors|canonical|header"):
        weights.load(data)
    with pytest.raises(ValueError, match=r"safetensors|canonical|header"):
        weights.header(path)


def test_every_accepted_file_is_the_dump_of_what_it_holds(tmp_path: Path) -> None:
    # One byte string for one content: so a change of any bit is refused, or changes what is loaded.
    path = tmp_path / "x.safetensors"
    original = weights.dump({"a": torch.arange(3.0), "b": torch.ones(2, 2)}, {"k": "v"})
    accepted = 0
    for place in range(len(original)):
        for bit in range(8):
            data = bytearray(original)
            data[place] ^= 1 << bit
            path.write_bytes(data)
            try:
                loaded = weights.load(bytes(data))
            except ValueError:
                continue
            accepted += 1
            assert weights.dump(loaded, metadata(path)) == data
    assert accepted >= 8 * 28  # every bit of the numbers themselves
