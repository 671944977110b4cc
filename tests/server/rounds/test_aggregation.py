"""The weighted mean: exact where it can be, independent of order and of blocks, one block at a time."""

import tracemalloc
from collections.abc import Mapping
from itertools import permutations
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pathfed_common.encoder import weights as tensor_files
from pathfed_common.files import write_atomic
from pathfed_common.ids import SiteName
from pathfed_common.plan import AggregationPlan
from pathfed_server.rounds.aggregation import aggregate, shares

Tensors = dict[str, Tensor]
MEAN = AggregationPlan()


def write(folder: Path, updates: Mapping[str, Tensors]) -> dict[SiteName, Path]:
    paths = {}
    for name, tensors in updates.items():
        paths[SiteName(name)] = folder / f"{name}.safetensors"
        write_atomic(folder / f"{name}.safetensors", tensor_files.dump(tensors, {}))
    return paths


def mean(folder: Path, updates: Mapping[str, Tensors], weights: Mapping[str, float]) -> Tensors:
    aggregate(MEAN, write(folder, updates), {SiteName(name): weight for name, weight in weights.items()}, folder / "mean")
    return tensor_files.load((folder / "mean").read_bytes())


def some(count: int, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensors]:
    random = torch.Generator().manual_seed(seed)
    return {
        f"site-{index}": {"b": torch.randn(7, 3, generator=random).to(dtype), "a": torch.randn(5, generator=random).to(dtype)}
        for index in range(count)
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mean_is_that_of_float64_rounded_once(tmp_path: Path, dtype: torch.dtype) -> None:
    updates, weights = some(3, dtype=dtype), {"site-0": 0.5, "site-1": 3.0, "site-2": 1.25}
    found = mean(tmp_path, updates, weights)
    for name in ("a", "b"):
        exact = sum((updates[site][name].double() * weight for site, weight in weights.items()), torch.zeros(())) / 4.75
        assert found[name].dtype is torch.float32
        assert torch.equal(found[name], exact.float())


def test_order_of_the_mappings_changes_no_bit(tmp_path: Path) -> None:
    updates, weights = some(4), {"site-0": 1.0, "site-1": 1.0, "site-2": 3.3, "site-3": 1e-3}
    # Numbers that cancel: added in another order their float64 sum differs by far more than float32 rounds away.
    for site, value in (("site-0", 1e30), ("site-1", -1e30)):
        updates[site]["a"][:] = value
    seen = set()
    for order in permutations(updates):
        paths = write(tmp_path, {name: updates[name] for name in order})
        aggregate(MEAN, paths, {SiteName(name): weights[name] for name in reversed(order)}, tmp_path / "mean")
        seen.add((tmp_path / "mean").read_bytes())
    assert len(seen) == 1


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sites=st.integers(1, 7), seed=st.integers(0, 99))
def test_mean_of_equal_updates_is_the_update_itself(tmp_path: Path, sites: int, seed: int) -> None:
    update = some(1, seed=seed)["site-0"]
    names = [f"site-{index}" for index in range(sites)]
    found = mean(tmp_path, dict.fromkeys(names, update), dict.fromkeys(names, 1.0))
    assert all(torch.equal(found[name], update[name]) for name in update)


def test_mean_does_not_change_when_all_weights_double(tmp_path: Path) -> None:
    updates = some(3)
    once = mean(tmp_path, updates, dict.fromkeys(updates, 0.7))
    twice = mean(tmp_path, updates, dict.fromkeys(updates, 1.4))
    assert all(torch.equal(once[name], twice[name]) for name in once)


def test_large_numbers_that_cancel_do_not_overflow(tmp_path: Path) -> None:
    big = {"x": torch.full((3,), 3e38)}
    assert torch.equal(mean(tmp_path, {"p": big, "q": big}, {"p": 1.0, "q": 1.0})["x"], big["x"])


@pytest.mark.parametrize("block", [1, 5, 8, 10_000])
def test_size_of_blocks_changes_no_bit(tmp_path: Path, block: int) -> None:
    updates, weights = some(3), {"site-0": 0.5, "site-1": 3.0, "site-2": 1.25}
    whole = mean(tmp_path, updates, weights)
    paths = {SiteName(name): tmp_path / f"{name}.safetensors" for name in updates}
    aggregate(MEAN, paths, {SiteName(name): weight for name, weight in weights.items()}, tmp_path / "blocks", block=block)
    assert (tmp_path / "blocks").read_bytes() == tensor_files.dump(whole, {})


def test_memory_is_a_few_blocks_however_many_the_sites_and_large_the_tensors(tmp_path: Path) -> None:
    numbers, block = 400_000, 10_000
    paths = write(tmp_path, {"site-0": {"t": torch.ones(numbers)}})
    for sites in (2, 40):
        updates = {SiteName(f"site-{index}"): paths[SiteName("site-0")] for index in range(sites)}
        tracemalloc.start()  # sees the byte strings; the tensors made of them are as many
        aggregate(MEAN, updates, dict.fromkeys(updates, 1.0), tmp_path / "mean", block=block)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 10 * 4 * block


@pytest.mark.parametrize("weights", [{}, {"site-0": 1.0}, {"site-0": 1.0, "site-1": 0.0}, {"site-0": 1.0, "site-1": float("nan")}])
def test_weights_that_do_not_fit_are_refused(tmp_path: Path, weights: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="weight"):
        mean(tmp_path, some(2), weights)
    assert not (tmp_path / "mean").exists()


def test_updates_of_other_shapes_are_refused(tmp_path: Path) -> None:
    updates = some(2)
    updates["site-1"]["a"] = torch.zeros(1, 5)
    with pytest.raises(ValueError, match="site-1 has other tensors"):
        mean(tmp_path, updates, dict.fromkeys(updates, 1.0))


def test_shares_add_up_to_one_in_site_order() -> None:
    found = shares({SiteName("b"): 3.0, SiteName("a"): 1.0})
    assert list(found.items()) == [("a", 0.25), ("b", 0.75)]
    with pytest.raises(ValueError, match="at least one site"):
        shares({})
