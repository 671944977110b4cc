import numpy as np
import pytest

from pathfed_common.ids import site_name
from pathfed_server.report.data import RoundReport, RoundTimes, SiteFigures, SiteRound

TIMES = RoundTimes(slots_s=1, wait_s=1, transfer_s=1, aggregation_s=1, step_s=1)


def one_round(*figures: SiteFigures | None, admitted: bool = True) -> RoundReport:
    sites = tuple(SiteRound(site=site_name(f"s{place}"), admitted=admitted, figures=each) for place, each in enumerate(figures))
    return RoundReport(index=1, sites=sites, times=TIMES)


def figures(loss_sum: float, patients: float, loss_sum_std: float = 1.0, patients_std: float = 1.0) -> SiteFigures:
    return SiteFigures(loss_sum=loss_sum, loss_sum_std=loss_sum_std, patients=patients, patients_std=patients_std)


def test_loss_is_the_ratio_of_the_sums_over_sites():
    loss = one_round(figures(30, 40), figures(10, 60), None).loss
    assert loss is not None
    assert loss.value == pytest.approx(0.4)


def test_noise_band_is_the_spread_that_noise_really_gives():
    random = np.random.default_rng(1)
    true_loss, true_patients, loss_std, patients_std = 36.0, 60.0, 2.0, 3.0
    drawn = (true_loss + loss_std * random.normal(size=20_000)) / (true_patients + patients_std * random.normal(size=20_000))
    loss = one_round(figures(true_loss, true_patients, loss_std, patients_std)).loss
    assert loss is not None
    assert loss.std == pytest.approx(drawn.std(), rel=0.03)
    assert abs(loss.std - loss_std / true_patients) > 0.1 * loss.std, "the noise of the denominator must count too"


def test_loss_is_withheld_while_the_count_drowns_in_noise():
    assert one_round(figures(1.0, 2.9, patients_std=1.0)).loss is None
    assert one_round(figures(1.0, 3.1, patients_std=1.0)).loss is not None
    assert one_round(figures(1.0, -5.0)).loss is None


def test_patients_add_up_and_their_noise_adds_in_squares():
    count = one_round(figures(1, 10, patients_std=3), figures(1, 20, patients_std=4)).patients
    assert count is not None
    assert (count.value, count.std) == (30, 5)


def test_updates_that_did_not_count_do_not_count_here():
    assert one_round(figures(1, 10), admitted=False).patients is None
    assert one_round(None).loss is None
    loss = one_round(figures(0, 10)).loss
    assert loss is not None
    assert loss.value == 0
