"""The norm bounds: honest updates of every kind pass, missing noise, doubled noise and oversized patients do not."""

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from pathfed_common.privacy.mechanism import PatientMechanism
from pathfed_common.privacy.randomness import KeyedRandom
from pathfed_common.wire_format import BLOCK, quantise
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
    assert inside(norm_bounds(made, steps=steps, dimension=dimension, wire="float32"), found).all()


@pytest.mark.parametrize("factor", [0.0, 0.5, 2 / 3, 1.5, 2.0])
def test_wrong_noise_is_refused_where_the_encoder_is_large(factor: float) -> None:
    made = mechanism()
    found = norms(np.random.default_rng(2), made, steps=1, dimension=6_000_000, count=1000, noise=factor)
    assert not inside(norm_bounds(made, steps=1, dimension=6_000_000, wire="bfloat16"), found).any()


def travelled(random: np.random.Generator, made: PatientMechanism, dimension: int, *, count: int, noise: float, along: str) -> list[float]:
    """Norms of int8 updates as they are read, whose patients all pull along every number, or along one."""
    found = []
    for number in range(count):
        values = made.noise_std * noise * random.standard_normal(dimension)
        drawn = random.poisson(made.expected_patients) * made.gradient_bound
        if along == "one":
            values[3] += drawn
        else:
            values += drawn / math.sqrt(dimension)
        source = KeyedRandom(bytes(32), {"number": number})
        numbers, scales = quantise((values / made.expected_patients).astype(np.float32), source)
        read = numbers.astype(np.float32) * np.repeat(scales, BLOCK)[:dimension]
        found.append(float(np.linalg.norm(read.astype(np.float64))))
    return found


@pytest.mark.parametrize(("dimension", "count"), [(300, 300), (100_000, 40), (5_500_000, 2)])
@pytest.mark.parametrize("along", ["all", "one"])
def test_honest_int8_updates_pass(dimension: int, count: int, along: str) -> None:
    made = mechanism(noise=0.7)
    found = travelled(np.random.default_rng(6), made, dimension, count=count, noise=1.0, along=along)
    assert inside(norm_bounds(made, steps=1, dimension=dimension, wire="int8"), np.array(found)).all()


@pytest.mark.parametrize("factor", [0.7, 1.3])
def test_int8_updates_with_a_third_more_or_less_noise_are_refused_for_an_encoder(factor: float) -> None:
    made = mechanism(expected=64.0)
    found = travelled(np.random.default_rng(7), made, 5_500_000, count=1, noise=factor, along="all")
    assert not inside(norm_bounds(made, steps=1, dimension=5_500_000, wire="int8"), np.array(found)).any()


def test_int8_widens_the_bounds_of_an_encoder_by_less_than_half_a_percent() -> None:
    made = mechanism(expected=64.0)
    plain, wide = (norm_bounds(made, steps=1, dimension=86_000_000, wire=wire) for wire in ("float32", "int8"))
    assert plain.least * 0.998 < wide.least < plain.least
    assert plain.most < wide.most < plain.most * 1.004


def test_int8_tails_are_as_rare_as_stated() -> None:
    """Without patients and with bounds as narrow as a false refusal of 0.9 makes them, few honest updates fall outside, and some do."""
    made = mechanism(noise=3.0, expected=1.0)
    bounds = norm_bounds(made, steps=1, dimension=2000, wire="int8", false_refusal=0.9, headroom=1.0)
    found = travelled(np.random.default_rng(8), made, 2000, count=400, noise=1.0, along="all")
    assert (~inside(bounds, np.array(found))).mean() < 0.9
    assert bounds.most < norm_bounds(made, steps=1, dimension=2000, wire="int8", headroom=1.0).most


def test_one_step_sent_for_several_is_refused() -> None:
    made = mechanism()
    found = norms(np.random.default_rng(3), made, steps=1, dimension=6_000_000, count=1000)
    assert not inside(norm_bounds(made, steps=4, dimension=6_000_000, wire="float32"), found).any()


def test_bounds_are_tight_to_a_percent_for_a_large_encoder() -> None:
    bounds = norm_bounds(mechanism(expected=64.0), steps=1, dimension=86_000_000, wire="float32")
    typical = mechanism(expected=64.0).gradient_std * math.sqrt(86_000_000)
    assert 0.95 * typical < bounds.least < typical < bounds.most < 1.05 * typical


def test_tails_are_as_rare_as_stated() -> None:
    """With a false-refusal probability of 0.3 in place of 1e-9, honest updates are refused less often than that, but some are."""
    made = mechanism(noise=3.0, expected=1.0)
    bounds = norm_bounds(made, steps=1, dimension=50_000, wire="float32", false_refusal=0.3, headroom=1.0)
    wide = norm_bounds(made, steps=1, dimension=50_000, wire="float32", headroom=1.0)
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
    without = norm_bounds(made, steps=steps, dimension=dimension, wire="float32")
    bounds = norm_bounds(made, steps=steps, dimension=dimension, wire="float32", base_norm=base_norm, local_learning_rate=rate)
    assert bounds.least <= norm <= bounds.most
    assert bounds.most > without.most


@pytest.mark.parametrize(
    "wrong", [{"steps": 0}, {"dimension": 0}, {"false_refusal": 0.0}, {"headroom": 0.5}, {"base_norm": -1.0}, {"local_learning_rate": 0.0}]
)
def test_impossible_arguments_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        norm_bounds(mechanism(), **{"steps": 1, "dimension": 10, "wire": "float32", **wrong})  # type: ignore[arg-type]
