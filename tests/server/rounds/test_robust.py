"""Robust rules: their formulas, the bound on what one hostile site can do, and the same bits whatever the blocks."""

import math
import tracemalloc
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.server.rounds.test_aggregation import Tensors, some, write
from torch import Tensor

from pathfed_common.encoder import weights as tensor_files
from pathfed_common.encoder.blocks import FileBlocks
from pathfed_common.ids import SiteName
from pathfed_common.plan import AggregationPlan
from pathfed_common.privacy.mechanism import PatientMechanism
from pathfed_server.rounds.aggregation import aggregate
from pathfed_server.rounds.norm_bounds import norm_bounds
from pathfed_server.rounds.norms import l2_norm
from pathfed_server.rounds.robust import norm_factors, trimmed_mean

NUMBER = st.floats(-1e6, 1e6, width=32)


def combined(
    folder: Path, rule: AggregationPlan, updates: dict[str, Tensors], weights: dict[str, float] | None = None, **more: Any
) -> Tensors:
    public = {SiteName(name): (weights or {}).get(name, 1.0) for name in updates}
    aggregate(rule, write(folder, updates), public, folder / "combined", **more)
    return tensor_files.load((folder / "combined").read_bytes())


# The trimmed mean.


@settings(max_examples=60)
@given(values=st.lists(NUMBER, min_size=3, max_size=9), trim=st.integers(1, 4), data=st.data())
@example([0.0, -0.0, 0.0, 1.0], 1, None)
def test_the_trimmed_mean_is_that_of_what_is_left(values: list[float], trim: int, data: Any) -> None:
    sites = len(values)
    weights = [1.0] * sites if data is None else data.draw(st.lists(st.floats(0.1, 10), min_size=sites, max_size=sites))
    column = torch.tensor(values)[:, None]
    if 2 * trim >= sites:
        with pytest.raises(ValueError, match="cannot be left out"):
            trimmed_mean(column, weights, trim)
        return
    order = sorted(range(sites), key=lambda site: values[site])[trim : sites - trim]
    added = total = 0.0
    for site in order:
        added += values[site] * weights[site]
        total += weights[site]
    assert trimmed_mean(column, weights, trim).tolist() == torch.tensor([added / total], dtype=torch.float64).float().tolist()


@settings(max_examples=60)
@given(
    honest=st.lists(NUMBER, min_size=4, max_size=8), hostile=st.lists(st.floats(-(2.0**127), 2.0**127, width=32), min_size=2, max_size=2)
)
def test_as_many_hostile_values_as_are_trimmed_leave_the_honest_range(honest: list[float], hostile: list[float]) -> None:
    found = trimmed_mean(torch.tensor([*honest, *hostile])[:, None], [1.0] * (len(honest) + 2), 2).item()
    assert min(honest) <= found <= max(honest)


def test_one_hostile_site_within_the_admitted_norm_moves_the_trimmed_mean_by_the_stated_bound_and_the_mean_by_more(tmp_path: Path) -> None:
    """Five sites; the hostile one puts the largest admitted norm into a single number, up or down."""
    dimension, attacked, sites = 4096, 77, 5
    mechanism = PatientMechanism(
        sampling_rate=0.1, noise_multiplier=1.0, clip_norm=1.0, expected_patients=8.0, figure_share=0.3, loss_bound=2.0
    )
    bounds = norm_bounds(mechanism, steps=1, dimension=dimension, wire="float32")
    random = torch.Generator().manual_seed(3)
    honest = {f"site-{index}": {"w": torch.randn(dimension, generator=random) * mechanism.gradient_std} for index in range(sites - 1)}
    moved = {}
    for rule in (AggregationPlan(rule="trimmed_mean"), AggregationPlan()):
        ends = []
        for sign in (1, -1):
            update = torch.zeros(dimension)
            update[attacked] = sign * bounds.most * (1 - 1e-6)
            updates = honest | {"site-4": {"w": update}}
            assert bounds.least <= l2_norm(FileBlocks(write(tmp_path, updates)[SiteName("site-4")])) <= bounds.most
            ends.append(float(combined(tmp_path, rule, updates)["w"][attacked]))
        moved[rule.rule] = ends[0] - ends[1]
    values = sorted(float(update["w"][attacked]) for update in honest.values())
    bound = (values[sites - 1 - 1] - values[1 - 1]) / (sites - 2)
    assert 0 < moved["trimmed_mean"] <= bound * (1 + 1e-6)
    assert moved["mean"] == pytest.approx(2 * bounds.most / sites, rel=1e-4)
    assert moved["mean"] > 10 * moved["trimmed_mean"]


# Weights by norm.


def test_a_longer_update_counts_as_if_it_were_as_long_as_the_median() -> None:
    norms = {SiteName(name): value for name, value in (("d", 8.0), ("a", 1.0), ("c", 4.0), ("b", 2.0))}
    assert norm_factors(norms) == {"a": 1.0, "b": 1.0, "c": 0.5, "d": 0.25}
    assert norm_factors({SiteName("a"): 3.0}) == {"a": 1.0}
    assert norm_factors({SiteName("a"): 0.0, SiteName("b"): 0.0, SiteName("c"): 5.0}) == {"a": 1.0, "b": 1.0, "c": 0.0}


def test_factors_multiply_public_weights_and_are_told(tmp_path: Path) -> None:
    updates = {name: {"w": torch.full((4,), value)} for name, value in (("a", 1.0), ("b", -2.0), ("c", 4.0))}
    public = {"a": 2.0, "b": 1.0, "c": 3.0}
    found = combined(tmp_path, AggregationPlan(rule="norm_weighted"), updates, public)
    assert found["w"].tolist() == pytest.approx([(2 * 1 - 2 + 1.5 * 4) / (2 + 1 + 1.5)] * 4, rel=1e-7)
    paths = write(tmp_path, updates)
    told = aggregate(AggregationPlan(rule="norm_weighted"), paths, {SiteName(n): w for n, w in public.items()}, tmp_path / "again")
    assert told == {"a": 1.0, "b": 1.0, "c": 0.5}
    assert aggregate(AggregationPlan(), paths, {SiteName(n): w for n, w in public.items()}, tmp_path / "again") == {}


def test_one_hostile_update_weighs_no_more_than_the_median_one(tmp_path: Path) -> None:
    updates = some(5)
    updates["site-4"] = {name: tensor * 1e6 for name, tensor in updates["site-4"].items()}
    found = combined(tmp_path, AggregationPlan(rule="norm_weighted"), updates)
    norms = sorted(_norm(update) for update in updates.values())
    # Each update counts with at most the median's norm, and at least three of five with their whole weight.
    assert _norm(found) <= 5 * norms[2] / 3


def _norm(tensors: Tensors) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors.values()))


# Both.

RULES = [AggregationPlan(rule="trimmed_mean"), AggregationPlan(rule="norm_weighted")]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.rule)
def test_neither_order_nor_blocks_change_a_bit(rule: AggregationPlan, tmp_path: Path) -> None:
    updates, weights = some(4), {"site-1": 2.0, "site-2": 3.3}
    updates["site-3"]["a"] = updates["site-0"]["a"]  # ties
    seen = set()
    for order in permutations(updates):
        for block in (4, 21, 10_000):
            found = combined(tmp_path, rule, {name: updates[name] for name in order}, weights, block=block)
            seen.add(tensor_files.dump(found, {}))
    assert len(seen) == 1


def test_the_trimmed_means_memory_does_not_grow_with_the_sites(tmp_path: Path) -> None:
    numbers = 2**21
    path = write(tmp_path, {"site-0": {"t": torch.ones(numbers)}})[SiteName("site-0")]
    peaks = []
    for sites in (4, 16):
        updates = {SiteName(f"site-{index:02d}"): path for index in range(sites)}
        tracemalloc.start()  # sees numpy's arrays, the largest of them
        aggregate(AggregationPlan(rule="trimmed_mean"), updates, dict.fromkeys(updates, 1.0), tmp_path / "combined")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0] < 4 * numbers * 4


def test_equal_updates_give_themselves(tmp_path: Path) -> None:
    update: dict[str, Tensor] = some(1)["site-0"]
    for rule in RULES:
        found = combined(tmp_path, rule, {f"site-{index}": update for index in range(3)})
        assert all(torch.equal(found[name], update[name]) for name in update)


def test_fewer_updates_than_trimming_needs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="of 2 values 1 at each end"):
        combined(tmp_path, RULES[0], some(2))
    assert not (tmp_path / "combined").exists()
