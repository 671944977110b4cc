"""Centring, Sinkhorn-Knopp and the spread terms: the published formulas, and what they do with few or equal rows."""

import math

import pytest
import torch
from torch import Tensor

from pathfed_common.objectives.across import ALONE
from pathfed_common.objectives.spread import KAPPA, SPREADS, kde, koleo
from pathfed_common.objectives.teacher_targets import CENTRINGS, centred, cross_entropy, plain, sinkhorn, targets


def rows(count: int, width: int, seed: int = 1) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def textbook_sinkhorn(logits: Tensor, temperature: float, rounds: int) -> Tensor:
    """Algorithm 1 of Caron et al. (2020), appendix A, as published."""
    q = torch.exp(logits / temperature).T
    q = q / q.sum()
    prototypes, samples = q.shape
    for _ in range(rounds):
        q = q / q.sum(1, keepdim=True) / prototypes
        q = q / q.sum(0, keepdim=True) / samples
    return (q * samples).T


def test_centring_takes_the_rows_mean_off() -> None:
    logits = rows(6, 5)
    torch.testing.assert_close(centred(logits, 0.5), ((logits - logits.mean(0)) / 0.5).softmax(-1))
    torch.testing.assert_close(centred(logits + rows(1, 5, 2), 0.5), centred(logits, 0.5))


def test_sinkhorn_ends_where_the_published_algorithm_ends() -> None:
    # Rows of one mass, where beginning with their softmax changes nothing at all; then any rows, in the limit.
    logits = rows(8, 5)
    level = logits - torch.logsumexp(logits / 0.5, -1, keepdim=True) * 0.5
    torch.testing.assert_close(sinkhorn(level, 0.5), textbook_sinkhorn(level, 0.5, 3))
    torch.testing.assert_close(sinkhorn(logits, 0.5, rounds=300), textbook_sinkhorn(logits, 0.5, 300), rtol=1e-6, atol=0)


def test_sinkhorn_gives_rows_mass_one_and_prototypes_nearly_equal_mass() -> None:
    made = sinkhorn(rows(40, 5), 0.5)
    torch.testing.assert_close(made.sum(-1), torch.ones(40, dtype=torch.float64))
    torch.testing.assert_close(made.sum(0), torch.full((5,), 8.0, dtype=torch.float64), rtol=0.05, atol=0)


@pytest.mark.parametrize("name", CENTRINGS)
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_and_extreme_rows_give_probabilities(name: str, scale: float, count: int) -> None:
    made = CENTRINGS[name]((rows(count, 300) * scale).float(), 0.07, ALONE)
    assert torch.isfinite(made).all()
    torch.testing.assert_close(made.sum(-1), torch.ones(count), rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", CENTRINGS)
def test_a_single_row_has_nothing_to_be_held_against(name: str) -> None:
    logits = rows(1, 5)
    assert torch.equal(CENTRINGS[name](logits, 0.5, ALONE), plain(logits, 0.5))


def test_targets_take_all_leading_axes_as_rows_and_carry_no_gradient() -> None:
    logits = rows(12, 5).view(3, 4, 5).requires_grad_()
    made = targets(centred, logits, 0.5, ALONE)
    assert not made.requires_grad
    torch.testing.assert_close(made.flatten(0, 1), centred(logits.detach().flatten(0, 1), 0.5))
    torch.testing.assert_close(targets(centred, logits, 0.5, ALONE, alone=True), (logits.detach() / 0.5).softmax(-1))


def test_cross_entropy_is_torchs() -> None:
    logits, taught = rows(4, 6), rows(4, 6, 2).softmax(-1)
    expected = torch.nn.functional.cross_entropy(logits / 0.1, taught, reduction="none")
    torch.testing.assert_close(cross_entropy(taught, logits, 0.1), expected)


def test_kde_is_the_mean_log_density_at_each_tile() -> None:
    features = rows(5, 7)
    unit = features / features.norm(dim=-1, keepdim=True)
    expected = 0.0
    for i in range(5):
        others = [math.exp(KAPPA * float(unit[i] @ unit[j])) for j in range(5) if j != i]
        expected += math.log(sum(others) / 4) / 5
    assert float(kde(features)) == pytest.approx(expected)


def test_koleo_is_minus_the_mean_log_distance_to_the_nearest() -> None:
    features = rows(5, 7)
    unit = features / features.norm(dim=-1, keepdim=True)
    nearest = [min(float((unit[i] - unit[j]).norm()) for j in range(5) if j != i) for i in range(5)]
    assert float(koleo(features)) == pytest.approx(-sum(map(math.log, nearest)) / 5, rel=1e-6)


@pytest.mark.parametrize("name", SPREADS)
def test_one_tile_has_no_spread_and_equal_ones_the_most_of_it(name: str) -> None:
    spread = SPREADS[name]
    assert float(spread(rows(1, 7), ALONE)) == 0.0
    together = rows(1, 7).float().repeat(3, 1).requires_grad_()
    worst = spread(together, ALONE)
    torch.autograd.backward(worst)
    assert together.grad is not None
    assert torch.isfinite(together.grad).all()
    assert float(worst.detach()) == pytest.approx(KAPPA, abs=1e-5) if name == "kde" else 15 < float(worst.detach()) < 19
    assert float(spread(rows(3, 7), ALONE)) < float(worst.detach())


@pytest.mark.parametrize("name", SPREADS)
def test_going_down_the_slope_moves_tiles_apart(name: str) -> None:
    features = (rows(1, 7) + 0.1 * rows(4, 7, 2)).requires_grad_()
    (slope,) = torch.autograd.grad(SPREADS[name](features, ALONE), features)
    with torch.no_grad():
        unit, moved = (torch.nn.functional.normalize(each, dim=-1) for each in (features, features - 0.1 * slope))
    assert torch.pdist(moved).mean() > torch.pdist(unit).mean()
