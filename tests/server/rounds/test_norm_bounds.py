"""The norm bounds: honest updates of every kind pass, missing noise, doubled noise and oversized patients do not."""

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from pathfed_common.privacy.mechanism import PatientMechanism
from pathfed_server.rounds.norm_bounds import NormBounds, norm_bounds


def mechanism(*, noise: float = 1.0, clip: float = 1.0, expected: float = 8.0) -> PatientMechanism:
    return PatientMechanism(
        sampling_rate=0.1, noise_multiplier=noise, clip_norm=clip, expected_patients=expected, figure_share=0.3, loss_bound=2.0
    )


def norms(
    random: np.random.Generator, made: PatientMechanism, *, steps: int, dimension: int, count: int, noise: float = 1.0, cohort: float = 1.0
) -> NDArray[np.float64]:
    """Norms of simulated updates whose patients all pull in one direction, the longest a clipped sum can be."""
    drawn = random.poisson(made.expected_patients * cohort * steps, size=count) * made.gradient_bound
    # The noise's part along that direction is normal, the square of the rest chi-square with d - 1 degrees of freedom.
    spread = made.noise_std * noise * math.sqrt(steps)
    along = drawn + spread * random.standard_normal(count)
    across = spread**2 * random.chisquare(dimension - 1, size=count)
    return np.sqrt(along**2 + across) / (steps * made.expected_patients)


def inside(bounds: NormBounds, found: NDArray[np.float64]) -> NDArray[np.bool_]:
    return (bounds.least <= found) & (found <= bounds.most)


@pytest.mark.parametrize("cohort", [1.0, 4.0])
@pytest.mark.parametrize("steps", [1, 7])
@pytest.mark.parametrize(("dimension", "noise"), [(10, 1.0), (1000, 0.3), (1_000_000, 1.0), (100_000_000, 4.0)])
def test_honest_updates_pass(dimension: int, noise: float, steps: int, cohort: float) -> None:
    made = mechanism(noise=noise)
    found = norms(np.random.default_rng(1), made, steps=steps, dimension=dimension, count=20_000, cohort=cohort)
    assert inside(norm_bounds(made, steps=steps, dimension=dimension, bfloat16=False), found).all()


@pytest.mark.parametrize("factor", [0.0, 0.5, 2 / 3, 1.5, 2.0])
def test_wrong_noise_is_refused_where_the_encoder_is_large(factor: float) -> None:
    made = mechanism()
    found = norms(np.random.default_rng(2), made, steps=1, dimension=6_000_000, count=1000, noise=factor)
    assert not inside(norm_bounds(made, steps=1, dimension=6_000_000, bfloat16=True), found).any()


def test_one_step_sent_for_several_is_refused() -> None:
    made = mechanism()
    found = norms(np.random.default_rng(3), made, steps=1, dimension=6_000_000, count=1000)
    assert not inside(norm_bounds(made, steps=4, dimension=6_000_000, bfloat16=False), found).any()


def test_bounds_are_tight_to_a_percent_for_a_large_encoder() -> None:
    bounds = norm_bounds(mechanism(expected=64.0), steps=1, dimension=86_000_000, bfloat16=False)
    typical = mechanism(expected=64.0).gradient_std * math.sqrt(86_000_000)
    assert 0.95 * typical < bounds.least < typical < bounds.most < 1.05 * typical


def test_tails_are_as_rare_as_stated() -> None:
    """With a false-refusal probability of 0.3 in place of 1e-9, honest updates are refused less often than that, but some are."""
    made = mechanism(noise=3.0, expected=1.0)
    bounds = norm_bounds(made, steps=1, dimension=50_000, bfloat16=False, false_refusal=0.3, headroom=1.0)
    wide = norm_bounds(made, steps=1, dimension=50_000, bfloat16=False, headroom=1.0)
    found = norms(np.random.default_rng(4), made, steps=1, dimension=50_000, count=100_000)
    assert (~inside(bounds, found)).mean() < 0.3
    assert wide.least < bounds.least
    assert bounds.most < wide.most


def test_chi_square_bound_holds_at_its_probability() -> None:
    scipy_stats = pytest.importorskip("scipy.stats")
    for dimension in (1, 10, 1000, 10**7):
        for x in (1.0, 5.0, math.log(3e9)):
            assert scipy_stats.chi2.sf(dimension + 2 * math.sqrt(dimension * x) + 2 * x, dimension) <= math.exp(-x)
            assert scipy_stats.chi2.cdf(dimension - 2 * math.sqrt(dimension * x), dimension) <= math.exp(-x)


def test_patient_count_bound_holds_at_its_probability() -> None:
    scipy_stats = pytest.importorskip("scipy.stats")
    for mean in (1.0, 8.0, 300.0, 40_000.0):
        for x in (1.0, 5.0, math.log(3e9)):
            bound = mean + x / 3 + math.sqrt(x * x / 9 + 2 * mean * x)
            assert scipy_stats.poisson.sf(math.ceil(bound) - 1, mean) <= math.exp(-x)
            assert scipy_stats.binom.sf(math.ceil(bound) - 1, round(mean) * 10, 0.1) <= math.exp(-x)


def test_rounding_of_long_local_training_is_allowed_for() -> None:
    """With a tiny local step size the difference of two fp32 states is mostly rounding; an honest site is not refused for it."""
    random = np.random.default_rng(5)
    made, steps, rate, dimension = mechanism(noise=0.5), 5, 1e-6, 10_000
    start = random.standard_normal(dimension).astype(np.float32)
    state, scale = start.copy(), made.gradient_std
    for _ in range(steps):
        state = (state - np.float32(rate) * (scale * random.standard_normal(dimension)).astype(np.float32)).astype(np.float32)
    update = (start - state) / np.float32(rate * steps)
    norm = float(np.linalg.norm(update.astype(np.float64)))
    base_norm = float(np.linalg.norm(start.astype(np.float64)))
    without = norm_bounds(made, steps=steps, dimension=dimension, bfloat16=False)
    bounds = norm_bounds(made, steps=steps, dimension=dimension, bfloat16=False, base_norm=base_norm, local_learning_rate=rate)
    assert bounds.least <= norm <= bounds.most
    assert bounds.most > without.most


@pytest.mark.parametrize(
    "wrong", [{"steps": 0}, {"dimension": 0}, {"false_refusal": 0.0}, {"headroom": 0.5}, {"base_norm": -1.0}, {"local_learning_rate": 0.0}]
)
def test_impossible_arguments_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        norm_bounds(mechanism(), **{"steps": 1, "dimension": 10, "bfloat16": False, **wrong})  # type: ignore[arg-type]
