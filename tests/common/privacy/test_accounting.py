"""Accounting: published values, agreement of three accountants, and the laws of composition."""

import math

import numpy as np
import pytest
from dp_accounting import NeighboringRelation
from dp_accounting.dp_event import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.pld import PLDAccountant

from pathfed_common.errors import ErrorCode, PrivacyError
from pathfed_common.privacy import accounting
from pathfed_common.privacy.accounting import (
    PrivacyEvent,
    check_accountants,
    check_bounds,
    composed_epsilon,
    epsilon,
    lower_bound,
    multi_site_epsilon,
    prv_estimate,
    rdp_epsilon,
)

# Published values: rate, sigma, steps, delta, Renyi epsilon, PLD epsilon (None: not published).
PUBLISHED = [
    (150 / 60000, 1.3, 6000, 1e-5, 0.7242, 0.6401),
    (1e-3, 1.0, 30000, 1e-7, 1.4155, 1.0982),
    (0.01, 0.7, 120, 1e-5, 3.2392, 2.4612),
    (0.04, 1.5, 2250, 1e-5, 7.3291, 6.7688),
    (1 / 60, 4.0, 3840, 9e-6, 1.083, None),
    (1 / 60, 2.0, 324, 1e-11, 1.169, None),
    (0.01, 4.0, 10000, 1e-5, 1.035, None),
    (0.01, 4.0, 40000, 1e-5, 2.210, None),
    (16384 / 50000, 21.1, 250, 1e-5, 0.9976, 0.9121),
    (1.0, 100.0, 10000, 1e-5, None, 4.3772),
]


def event(rate: float = 0.02, sigma: float = 1.0, steps: int = 100) -> PrivacyEvent:
    return PrivacyEvent(sampling_rate=rate, noise_multiplier=sigma, steps=steps)


def as_published(value: float) -> float:
    """Half a unit of the last published digit."""
    return 6e-4 if round(value, 3) == value else 6e-5


@pytest.mark.parametrize(("rate", "sigma", "steps", "delta", "renyi", "pld"), PUBLISHED)
def test_published_values_are_reproduced(
    rate: float, sigma: float, steps: int, delta: float, renyi: float | None, pld: float | None
) -> None:
    if renyi is not None:
        assert rdp_epsilon([event(rate, sigma, steps)], delta) == pytest.approx(renyi, abs=as_published(renyi))
    if pld is not None:
        assert epsilon(sampling_rate=rate, noise_multiplier=sigma, steps=steps, delta=delta) == pytest.approx(pld, abs=as_published(pld))


@pytest.mark.parametrize(("rate", "sigma", "steps", "delta"), [row[:4] for row in PUBLISHED])
def test_accountants_agree_within_a_thousandth_or_the_bounds(rate: float, sigma: float, steps: int, delta: float) -> None:
    events = [event(rate, sigma, steps)]
    ours = check_accountants(events, delta)
    assert ours <= rdp_epsilon(events, delta) + 1e-6
    bracket = prv_estimate(events, delta)
    assert bracket is not None
    assert ours == pytest.approx(bracket[1], abs=1e-3)
    assert bracket[0] < ours < bracket[2] or rate == 1.0  # at rate 1 the three are one exact value


@pytest.mark.parametrize(("sites", "expected"), [(1, 6.32), (2, 9.20), (3, 11.58)])
def test_a_patient_at_several_sites_composes_over_them(sites: int, expected: float) -> None:
    assert multi_site_epsilon(event(0.02, 1.0, 2000), sites=sites, delta=1e-6) == pytest.approx(expected, abs=0.005)


def test_grouping_and_order_of_events_do_not_change_epsilon() -> None:
    a, b = event(0.02, 1.0, 10), event(0.05, 2.0, 4)
    parts = [event(0.05, 2.0, 1), event(0.02, 1.0, 6), event(0.05, 2.0, 3), event(0.02, 1.0, 4)]
    assert composed_epsilon([a, b], 1e-6) == composed_epsilon(parts, 1e-6)


def test_different_mechanisms_compose_to_more_than_each() -> None:
    a, b = event(0.02, 1.0, 100), event(0.05, 2.0, 100)
    together = check_accountants([a, b], 1e-6)
    assert max(composed_epsilon([a], 1e-6), composed_epsilon([b], 1e-6)) < together
    assert together < composed_epsilon([a], 5e-7) + composed_epsilon([b], 5e-7)


def test_epsilon_grows_with_rate_and_steps_and_falls_with_noise_and_delta() -> None:
    base = composed_epsilon([event()], 1e-6)
    assert composed_epsilon([event(rate=0.03)], 1e-6) > base
    assert composed_epsilon([event(steps=150)], 1e-6) > base
    assert composed_epsilon([event(sigma=1.2)], 1e-6) < base
    assert composed_epsilon([event()], 1e-5) < base


def test_no_event_costs_nothing() -> None:
    assert composed_epsilon([], 1e-6) == rdp_epsilon([], 1e-6) == lower_bound([], 1e-6) == check_accountants([], 1e-6) == 0.0


def test_full_batches_cost_the_exact_epsilon_of_the_gaussian_mechanism() -> None:
    # Balle and Wang (2018), figure 1's setting: sigma = 1, sensitivity 1, delta 1e-5 gives 4.3772 as do 10000 steps at sigma 100.
    exact = prv_estimate([event(1.0, 1.0, 1)], 1e-5)
    assert exact is not None
    assert exact[1] == pytest.approx(4.3772, abs=6e-5)
    assert composed_epsilon([event(1.0, 2.0, 3), event(1.0, 5.0, 7)], 1e-6) == pytest.approx(
        accounting._gaussian_epsilon(math.sqrt(3 / 4 + 7 / 25), 1e-6), abs=1e-3
    )
    assert accounting._gaussian_epsilon(1e-7, 1e-5) == 0.0


MIXED = [event(0.02, 1.0, 20), event(1.0, 30.0, 5), event(0.1, 3.0, 9)]


@pytest.mark.parametrize("events", [[event(0.04, 1.5, 50)], [event(1.0, 20.0, 7)], MIXED])
def test_epsilon_is_that_of_dp_accountings_own_accountant(events: list[PrivacyEvent]) -> None:
    accountant = PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE)
    for e in events:
        accountant.compose(SelfComposedDpEvent(PoissonSampledDpEvent(e.sampling_rate, GaussianDpEvent(e.noise_multiplier)), e.steps))
    assert composed_epsilon(events, 1e-6) == pytest.approx(accountant.get_epsilon(1e-6), abs=1e-8)


def test_prv_gives_no_answer_for_rates_of_one_mixed_with_others() -> None:
    assert prv_estimate([event(1.0, 20.0, 1), event(0.1, 2.0, 1)], 1e-6) is None
    assert check_accountants([event(1.0, 20.0, 1), event(0.1, 2.0, 1)], 1e-6) > 0


def test_prv_gives_no_answer_beyond_its_precision() -> None:
    assert prv_estimate([event()], 1e-18) is None


@pytest.mark.parametrize("factor", [0.9, 1.5], ids=["too small, the dangerous side", "too large"])
def test_accountants_that_contradict_each_other_are_refused(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    events = [event(0.04, 1.5, 2250)]
    true = composed_epsilon(events, 1e-5)
    monkeypatch.setattr(accounting, "_pld", lambda merged, delta: true * factor)
    with pytest.raises(PrivacyError, match="contradict each other") as caught:
        check_accountants(events, 1e-5)
    assert caught.value.code is ErrorCode.ACCOUNTANTS_DISAGREE


# Cases in which PLD once lay above the Renyi bound through its grid alone, or in which that bound was negative, and the cases between.
SMALL = [
    (1e-3, 10.0, 10_000, 1e-7),
    (0.01, 100.0, 1, 1e-3),
    (1e-3, 10.0, 1_000_000, 1e-7),
    (1e-4, 10.0, 10_000, 1e-7),
    (1e-4, 2.0, 100_000, 1e-6),
    (1.0, 1000.0, 10, 1e-6),
]
SWEEP = [
    (rate, sigma, steps, delta)
    for rate in (1e-3, 0.02, 0.5, 1.0)
    for sigma in (0.6, 1.5, 20.0)
    for steps in (1, 10, 500)
    for delta in (1e-3, 1e-7)
    if steps * rate / sigma < 100
]


@pytest.mark.parametrize(("rate", "sigma", "steps", "delta"), SMALL)
def test_small_epsilons_are_not_overstated_by_the_grid(rate: float, sigma: float, steps: int, delta: float) -> None:
    events = [event(rate, sigma, steps)]
    ours = check_accountants(events, delta)
    assert lower_bound(events, delta) <= ours <= rdp_epsilon(events, delta) + 1e-9
    bracket = prv_estimate(events, delta)
    assert bracket is not None
    assert ours == pytest.approx(bracket[1], abs=2e-3)


@pytest.mark.parametrize(("rate", "sigma", "steps", "delta"), SWEEP)
def test_the_accountants_never_contradict_each_other_over_the_range_of_plans(rate: float, sigma: float, steps: int, delta: float) -> None:
    assert check_bounds([event(rate, sigma, steps)], delta) >= 0.0
    assert rdp_epsilon([event(rate, sigma, steps)], delta) >= 0.0


@pytest.mark.parametrize(("sigma", "steps", "delta"), [(1.0, 1, 1e-5), (100.0, 10_000, 1e-5), (5.0, 30, 1e-7), (0.7, 3, 1e-3)])
def test_pld_is_never_below_the_exact_epsilon_where_there_is_one(sigma: float, steps: int, delta: float) -> None:
    """At rate 1 the Gaussian mechanism's epsilon is known exactly; PLD may round it up, never down."""
    exact = accounting._gaussian_epsilon(math.sqrt(steps) / sigma, delta)
    ours = composed_epsilon([event(1.0, sigma, steps)], delta)
    assert exact - 1e-7 <= ours <= exact + 1e-3
    shown = lower_bound([event(1.0, sigma, steps)], delta)
    assert shown <= exact + 1e-9
    assert shown == pytest.approx(exact, rel=0.01)  # the sum is all that an attacker needs there


@pytest.mark.parametrize(
    ("rate", "sigma", "steps", "delta", "share"), [(0.04, 1.5, 2250, 1e-5, 0.85), (0.02, 1.0, 2000, 1e-6, 0.7), (0.1, 4.0, 500, 1e-6, 0.95)]
)
def test_what_a_test_shows_is_close_below_pld(rate: float, sigma: float, steps: int, delta: float, share: float) -> None:
    ours = composed_epsilon([event(rate, sigma, steps)], delta)
    assert share * ours < lower_bound([event(rate, sigma, steps)], delta) < ours


def test_what_a_test_shows_is_seen_in_a_simulated_attack() -> None:
    """Against the closed form: draws of the sum with and without the patient, thresholded."""
    rate, sigma, steps = 0.3, 2.0, 20
    random = np.random.default_rng(1)
    without = random.normal(0, sigma * math.sqrt(steps), 400_000)
    with_patient = random.normal(0, sigma * math.sqrt(steps), 400_000) + random.binomial(steps, rate, 400_000)
    delta = 0.01
    seen = max(math.log(((with_patient > t).mean() - delta) / (without > t).mean()) for t in np.linspace(0, 25, 26))
    assert lower_bound([event(rate, sigma, steps)], delta) == pytest.approx(seen, abs=0.03)


def test_what_tests_show_of_several_mechanisms_is_the_largest_of_each() -> None:
    a, b = event(0.04, 1.5, 300), event(0.1, 3.0, 9)
    assert lower_bound([a, b], 1e-6) == max(lower_bound([a], 1e-6), lower_bound([b], 1e-6)) > 0


@pytest.mark.parametrize("factor", [0.5, 0.8, 1.2, 2.0])
def test_the_cheap_bounds_alone_refuse_an_epsilon_that_is_too_small_or_too_large(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    events = [event(0.04, 1.5, 2250)]
    true = composed_epsilon(events, 1e-5)
    check_bounds(events, 1e-5)
    monkeypatch.setattr(accounting, "_pld", lambda merged, delta: true * factor)
    monkeypatch.setattr(accounting, "_prv", lambda merged, delta: pytest.fail("the dear accountant was asked"))
    with pytest.raises(PrivacyError, match=r"PF305.*contradict each other"):
        check_bounds(events, 1e-5)


def test_an_epsilon_that_is_no_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accounting, "_pld", lambda merged, delta: math.nan)
    with pytest.raises(PrivacyError, match="PF305"):
        check_bounds([event()], 1e-5)


def test_an_epsilon_beyond_floating_point_is_infinite_and_no_contradiction() -> None:
    events = [event(0.1, 0.5, 10_000)]
    assert check_accountants(events, 1e-3) == math.inf
    assert lower_bound(events, 1e-3) > 200


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-6, math.nan])
def test_delta_outside_0_to_1_is_refused(delta: float) -> None:
    for function in (composed_epsilon, rdp_epsilon, prv_estimate, lower_bound):
        with pytest.raises(ValueError, match="delta must be within"):
            function([event()], delta)


@pytest.mark.parametrize(
    ("changes", "name"),
    [({"rate": 0.0}, "sampling_rate"), ({"rate": 1.1}, "sampling_rate"), ({"sigma": 0.0}, "noise_multiplier"), ({"steps": 0}, "steps")],
)
def test_events_out_of_bounds_are_refused(changes: dict[str, float], name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be"):
        event(**changes)  # type: ignore[arg-type]


def test_sites_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match="sites must be at least 1"):
        multi_site_epsilon(event(), sites=0, delta=1e-6)
