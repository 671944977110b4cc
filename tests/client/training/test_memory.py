"""Want of memory is found out on public tiles. The errors are torch's own, raised where torch would raise them."""

from functools import partial

import pytest
import torch
from faulty_ranks import SIDE, Hungry, Insatiable, build
from training_fixtures import one_thread

from pathfed_client.training.compute import Compute
from pathfed_client.training.memory import DoesNotFit, activation_bytes, fit_microbatch, one_pass, tiles_within

__all__ = ["one_thread"]


@pytest.mark.parametrize(("tiles", "most", "found"), [(8, 8, 8), (8, 7, 4), (8, 3, 2), (7, 6, 4), (5, 1, 1), (1, 1, 1)])
def test_tiles_are_halved_until_they_fit(tiles, most, found) -> None:
    tried = []

    def attempt(at_once: int) -> None:
        tried.append(at_once)
        if at_once > most:
            raise torch.OutOfMemoryError("CUDA out of memory")

    assert fit_microbatch(attempt, tiles) == found
    assert tried[-1] == found
    assert tried == sorted(tried, reverse=True)


def test_passes_of_an_objective_that_wants_too_much_are_halved() -> None:
    assert fit_microbatch(partial(one_pass, build(Hungry)(), Compute(), SIDE), 8) == 2


def test_one_tile_that_does_not_fit_is_told() -> None:
    with pytest.raises(DoesNotFit):
        fit_microbatch(partial(one_pass, build(Insatiable)(), Compute(), SIDE), 8)


def test_other_errors_are_no_want_of_memory() -> None:
    def broken(at_once: int) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fit_microbatch(broken, 8)


def test_a_pass_leaves_no_gradient() -> None:
    objective = build()()
    one_pass(objective, Compute(), SIDE, 2)
    assert all(parameter.grad is None for parameter in objective.parameters())


def test_the_estimate_counts_weights_gradient_sum_and_each_tile() -> None:
    objective, compute = build()(), Compute()
    weights = sum(4 * parameter.numel() for parameter in objective.parameters())
    tile = activation_bytes(objective, compute, SIDE)
    assert tile > 4 * 3 * SIDE * SIDE, "more than the pixels"
    assert [tiles_within(objective, compute, SIDE, 3 * weights + part) for part in (-1, tile - 1, tile, 5 * tile)] == [0, 0, 1, 5]
    assert tiles_within(objective, compute, SIDE, 3 * weights // 2 + tile, shared_by=2) == 1
