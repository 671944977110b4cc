"""The mechanism's arithmetic: the joint vector fits its ball, and its constants are the ones that the accounting assumes."""

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pathfed_common.privacy.accounting import PrivacyEvent
from pathfed_common.privacy.mechanism import PatientMechanism

VALUES = {
    "sampling_rate": 0.1,
    "noise_multiplier": 2.0,
    "clip_norm": 1.5,
    "expected_patients": 8.0,
    "figure_share": 0.3,
    "loss_bound": 2.0,
}
MECHANISM = PatientMechanism(**VALUES)

losses = st.floats(-1e6, 1e6)
norms = st.floats(0, 1e30)


@given(norm=norms, loss=losses, share=st.floats(0.001, 0.999), clip=st.floats(1e-3, 1e3))
def test_a_patients_whole_vector_has_norm_at_most_the_clip_norm(norm: float, loss: float, share: float, clip: float) -> None:
    mechanism = dataclasses.replace(MECHANISM, figure_share=share, clip_norm=clip)
    gradient = norm * mechanism.clip_factor(norm)
    figures = (mechanism.loss_share(loss) * mechanism.figure_scale, mechanism.figure_scale)
    assert math.hypot(gradient, *figures) <= clip * (1 + 1e-12)


def test_the_largest_vector_uses_nearly_the_whole_ball() -> None:
    gradient = 100 * MECHANISM.clip_factor(100)
    assert math.hypot(gradient, MECHANISM.figure_scale, MECHANISM.figure_scale) == pytest.approx(MECHANISM.clip_norm, rel=2e-5)


def test_a_gradient_within_the_bound_is_left_alone() -> None:
    assert MECHANISM.clip_factor(MECHANISM.gradient_bound * 0.999) == 1.0
    assert MECHANISM.clip_factor(0.0) == 1.0


@pytest.mark.parametrize(("loss", "share"), [(-3.0, 0.0), (0.0, 0.0), (1.0, 0.5), (2.0, 1.0), (99.0, 1.0)])
def test_losses_are_clamped_to_their_bounds(loss: float, share: float) -> None:
    assert MECHANISM.loss_share(loss) == share


def test_stated_stds_follow_from_sigma_and_the_scales() -> None:
    assert MECHANISM.noise_std == pytest.approx(3.0)
    assert MECHANISM.gradient_std == pytest.approx(3.0 / 8)
    assert MECHANISM.figure_scale == pytest.approx(0.3 * 1.5 / math.sqrt(2))
    assert MECHANISM.patients_std == pytest.approx(2.0 * math.sqrt(2) / 0.3)
    assert MECHANISM.loss_sum_std == pytest.approx(2.0 * MECHANISM.patients_std)


def test_the_event_carries_rate_noise_and_steps() -> None:
    assert MECHANISM.event(5) == PrivacyEvent(sampling_rate=0.1, noise_multiplier=2.0, steps=5)


@pytest.mark.parametrize("name", list(VALUES))
@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan, "1", True, None])
def test_values_out_of_bounds_are_refused_by_name_and_value(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{name} must be finite and above 0, got {value!r}"):
        PatientMechanism(**{**VALUES, name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "value", "message"), [("sampling_rate", 1.01, "at most 1"), ("figure_share", 1.0, "below 1")])
def test_shares_above_their_bound_are_refused(name: str, value: float, message: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be {message}, got {value}"):
        PatientMechanism(**{**VALUES, name: value})


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
def test_what_is_not_finite_is_never_clipped_into_the_ball(value: float) -> None:
    with pytest.raises(ValueError, match="must be finite"):
        MECHANISM.clip_factor(value)
    if value != -1.0:
        with pytest.raises(ValueError, match="must be finite"):
            MECHANISM.loss_share(value)


def test_it_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        MECHANISM.clip_norm = 2.0  # type: ignore[misc]
