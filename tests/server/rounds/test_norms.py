"""The norm: right, and in the same bits whatever the blocks and the threads."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pathfed_common.encoder import weights
from pathfed_common.encoder.blocks import FileBlocks
from pathfed_common.files import write_atomic
from pathfed_server.rounds.norms import l2_norm


def reader(folder: Path, tensors: dict[str, Tensor]) -> FileBlocks:
    write_atomic(folder / "file", weights.dump(tensors, {}))
    return FileBlocks(folder / "file")


def some(*counts: int) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(7)
    return {f"t{index}": torch.randn(count, generator=random) * 10.0 ** (index - 3) for index, count in enumerate(counts)}


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(counts=st.lists(st.integers(0, 9000), min_size=1, max_size=4))
def test_norm_is_the_root_of_the_sum_of_squares(tmp_path: Path, counts: list[int]) -> None:
    tensors = some(*counts)
    exact = math.sqrt(math.fsum(float(value) ** 2 for tensor in tensors.values() for value in tensor.tolist()))
    assert l2_norm(reader(tmp_path, tensors)) == pytest.approx(exact, rel=1e-14)


def test_neither_blocks_nor_threads_change_a_bit(tmp_path: Path) -> None:
    held = reader(tmp_path, some(100_003, 4096, 8191))
    before, found = torch.get_num_threads(), set()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found |= {l2_norm(held, block=block).hex() for block in (4096, 3 * 4096, 2**18)}
    torch.set_num_threads(before)
    assert len(found) == 1


def test_runs_are_halved_until_one_number_is_left(tmp_path: Path) -> None:
    """The order is written down here once more, in Python's own numbers, so that no change of it goes unseen."""
    values = some(5000)["t0"]
    squares = [float(value) ** 2 for value in values.tolist()]
    sums = []
    for run in (squares[:4096], squares[4096:] + [0.0] * (2 * 4096 - 5000)):
        while len(run) > 1:
            half = len(run) // 2
            run = [left + right for left, right in zip(run[:half], run[half:], strict=True)]
        sums += run
    assert l2_norm(reader(tmp_path, {"t": values})) == math.sqrt(math.fsum(sums))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_leaves_no_finite_norm(tmp_path: Path, bad: float) -> None:
    tensors = some(5000, 10)
    tensors["t0"][4999] = bad
    assert l2_norm(reader(tmp_path, tensors)) == math.inf
    assert math.isfinite(l2_norm(reader(tmp_path, tensors), only=lambda name: name == "t1"))


def test_the_largest_numbers_do_not_overflow(tmp_path: Path) -> None:
    assert l2_norm(reader(tmp_path, {"t": torch.full((2**14,), 3e38)})) == pytest.approx(3e38 * 2**7, rel=1e-6)


@pytest.mark.parametrize("block", [0, 1000, 4097])
def test_blocks_of_broken_runs_are_refused(tmp_path: Path, block: int) -> None:
    with pytest.raises(ValueError, match="multiple of 4096"):
        l2_norm(reader(tmp_path, some(3)), block=block)
