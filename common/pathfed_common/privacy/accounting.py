"""What releases cost a patient: privacy events to epsilon, by one accountant, with two independent opinions beside it.

The figure that counts is dp_accounting's, from privacy loss distributions (PLD; Koskela et al. 2020, Doroshenko et al. 2022), composed as
its PLDAccountant does and pessimistic through its discretisation (1e-4 in the privacy loss). Relation: add or remove one patient. The
other opinions are opacus':

    - `rdp_epsilon`, Renyi accounting (Mironov et al. 2019): an upper bound by another method. PLD above it would be a fault.
    - `prv_estimate`, privacy random variables (Gopi et al. 2021): bounds on both sides. PLD below the lower one would be a fault, and the
      dangerous one.

`check_accountants` raises when they contradict each other; the ledger asks it before every charge.

Events compose by adding up: equal mechanisms are merged, so the order and grouping of charges cannot change an epsilon. Results are
cached by their whole input. The libraries are imported inside the functions: they are slow to load and not on every host.
"""

import math
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, reduce
from typing import Any

from pathfed_common.errors import ErrorCode, PrivacyError

#: PLD may exceed the Renyi bound by this much before the accountants are said to disagree.
RDP_TOLERANCE = 1e-6
#: PLD may leave the PRV interval by this much.
PRV_TOLERANCE = 1e-3
_PLD_INTERVAL = 1e-4
_PRV_EPSILON_ERROR = 0.01
_PRV_DELTA_SHARE = 1e-3
#: Renyi orders: opacus' own, and larger ones for small epsilons.
_ORDERS = (*(1 + tenth / 10 for tenth in range(1, 100)), *range(12, 64), 72, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448, 512)

_Merged = tuple[tuple[float, float, int], ...]


@dataclass(frozen=True, kw_only=True)
class PrivacyEvent:
    """So many steps of one Poisson-subsampled Gaussian mechanism.

    Attributes:
        sampling_rate: q, in (0, 1].
        noise_multiplier: sigma, above 0.
        steps: at least 1.
    """

    sampling_rate: float
    noise_multiplier: float
    steps: int

    def __post_init__(self) -> None:
        if not 0 < self.sampling_rate <= 1:
            raise ValueError(f"sampling_rate must be within (0, 1], got {self.sampling_rate}")
        if not 0 < self.noise_multiplier < math.inf:
            raise ValueError(f"noise_multiplier must be finite and above 0, got {self.noise_multiplier}")
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(f"steps must be a whole number of at least 1, got {self.steps!r}")


def epsilon(*, sampling_rate: float, noise_multiplier: float, steps: int, delta: float) -> float:
    """Epsilon at `delta` of so many steps (PLD), for one patient.

    Raises:
        ValueError: an argument is out of bounds.
    """
    return composed_epsilon([PrivacyEvent(sampling_rate=sampling_rate, noise_multiplier=noise_multiplier, steps=steps)], delta)


def composed_epsilon(events: Sequence[PrivacyEvent], delta: float) -> float:
    """Epsilon at `delta` of all events together (PLD), for a patient who was in the cohort of each; no event costs 0.

    Raises:
        ValueError: delta is not within (0, 1).
    """
    _check_delta(delta)
    return _pld(_merged(events), delta)


def rdp_epsilon(events: Sequence[PrivacyEvent], delta: float) -> float:
    """An upper bound on epsilon by Renyi accounting (opacus); no event costs 0.

    Raises:
        ValueError: delta is not within (0, 1).
    """
    _check_delta(delta)
    return _rdp(_merged(events), delta)


def prv_estimate(events: Sequence[PrivacyEvent], delta: float) -> tuple[float, float, float] | None:
    """Lower bound, estimate and upper bound of epsilon by privacy random variables (opacus); no event gives zeros.

    The bounds hold up to 0.01 in epsilon and delta / 1000 in delta. Where every event has rate 1 the three are the exact value of the
    Gaussian mechanism (Balle and Wang 2018). None where opacus' accountant has no answer: a delta too small for its
    floating-point sums, or rates of 1 mixed with others.

    Raises:
        ValueError: delta is not within (0, 1).
    """
    _check_delta(delta)
    return _prv(_merged(events), delta)


def multi_site_epsilon(event: PrivacyEvent, *, sites: int, delta: float) -> float:
    """Epsilon (PLD) of a patient who is in the cohorts of that many sites, each releasing `event`.

    Raises:
        ValueError: sites is below 1, or delta is not within (0, 1).
    """
    if sites < 1:
        raise ValueError(f"sites must be at least 1, got {sites}")
    return composed_epsilon([event] * sites, delta)


def check_accountants(events: Sequence[PrivacyEvent], delta: float) -> float:
    """Epsilon (PLD), once the other accountants have been asked and do not contradict it.

    Raises:
        PrivacyError: PF305, PLD is above the Renyi bound or outside the PRV bounds, beyond the tolerances stated above.
        ValueError: delta is not within (0, 1).
    """
    ours = composed_epsilon(events, delta)
    bound = rdp_epsilon(events, delta)
    bracket = prv_estimate(events, delta)
    if not ours <= bound + RDP_TOLERANCE:
        raise _disagreement(f"PLD says {ours:.6g}, above the Renyi bound {bound:.6g}", delta)
    if bracket is not None and not bracket[0] - PRV_TOLERANCE <= ours <= bracket[2] + PRV_TOLERANCE:
        raise _disagreement(f"PLD says {ours:.6g}, outside the PRV bounds {bracket[0]:.6g} to {bracket[2]:.6g}", delta)
    return ours


def _disagreement(what: str, delta: float) -> PrivacyError:
    remedy = "do not train: install the pinned versions of dp-accounting and opacus, and report these figures"
    message = f"the privacy accountants contradict each other: {what}"
    return PrivacyError(ErrorCode.ACCOUNTANTS_DISAGREE, message, value=f"delta {delta:g}", remedy=remedy)


def _check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise ValueError(f"delta must be within (0, 1), got {delta}")


def _merged(events: Iterable[PrivacyEvent]) -> _Merged:
    steps: Counter[tuple[float, float]] = Counter()
    for event in events:
        steps[float(event.sampling_rate), float(event.noise_multiplier)] += event.steps
    return tuple((rate, noise, count) for (rate, noise), count in sorted(steps.items()))


@lru_cache(maxsize=4096)
def _pld(merged: _Merged, delta: float) -> float:
    return float(_composed(merged).get_epsilon_for_delta(delta)) if merged else 0.0


@lru_cache(maxsize=8)
def _composed(merged: _Merged) -> Any:
    """The privacy loss distribution of all events, for every delta. One step's is kept, so that the next charge only composes."""
    parts = (_gaussian(noise, rate).self_compose(count) for rate, noise, count in merged)
    return reduce(lambda left, right: left.compose(right), parts)


@lru_cache(maxsize=32)
def _gaussian(noise: float, rate: float) -> Any:
    from dp_accounting import NeighboringRelation
    from dp_accounting.pld import privacy_loss_distribution

    return privacy_loss_distribution.from_gaussian_mechanism(
        noise, sampling_prob=rate, value_discretization_interval=_PLD_INTERVAL, neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE
    )


@lru_cache(maxsize=4096)
def _rdp(merged: _Merged, delta: float) -> float:
    if not merged:
        return 0.0
    from opacus.accountants.analysis.rdp import get_privacy_spent

    with _orders_may_end():
        # Renyi divergences add up over steps.
        total = sum(count * _rdp_of_one_step(rate, noise) for rate, noise, count in merged)
        return float(get_privacy_spent(orders=_ORDERS, rdp=total, delta=delta)[0])


@lru_cache(maxsize=32)
def _rdp_of_one_step(rate: float, noise: float) -> Any:
    from opacus.accountants.analysis.rdp import compute_rdp

    return compute_rdp(q=rate, noise_multiplier=noise, steps=1, orders=_ORDERS)


@lru_cache(maxsize=4096)
def _prv(merged: _Merged, delta: float) -> tuple[float, float, float] | None:
    if not merged:
        return 0.0, 0.0, 0.0
    if all(rate == 1 for rate, _, _ in merged):
        exact = _gaussian_epsilon(math.sqrt(sum(count / noise**2 for _, noise, count in merged)), delta)
        return exact, exact, exact
    if any(rate == 1 for rate, _, _ in merged):
        return None
    from opacus.accountants import PRVAccountant

    accountant = PRVAccountant()
    accountant.history = [(noise, rate, count) for rate, noise, count in merged]
    delta_error = delta * _PRV_DELTA_SHARE
    try:
        with _orders_may_end():
            composed = accountant._get_dprv(eps_error=_PRV_EPSILON_ERROR, delta_error=delta_error)
            low, middle, high = composed.compute_epsilon(delta, delta_error, _PRV_EPSILON_ERROR)
    except (ValueError, RuntimeError, FloatingPointError, OverflowError):
        # Opacus' own words for "no answer within my precision"; the Renyi bound still stands.
        return None
    return (float(low), float(middle), float(high)) if all(map(math.isfinite, (low, middle, high))) else None


@contextmanager
def _orders_may_end() -> Iterator[None]:
    """Opacus warns where the best Renyi order is the last of the list: a looser bound, which is still a bound."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Optimal order is the (largest|smallest) alpha", category=UserWarning)
        yield


def _gaussian_epsilon(mu: float, delta: float) -> float:
    """Epsilon of the Gaussian mechanism with sensitivity / std = mu, by bisection (Balle and Wang 2018, theorem 8)."""

    def delta_at(eps: float) -> float:
        # exp(eps) * Phi(-x) through the logarithm of erfc's argument would overflow for large eps; there the first term is all that counts.
        lower = 0.5 * math.erfc((eps / mu + mu / 2) / math.sqrt(2))
        return 0.5 * math.erfc((eps / mu - mu / 2) / math.sqrt(2)) - (math.exp(eps) * lower if lower > 0 else 0.0)

    if delta_at(0.0) <= delta:
        return 0.0
    high = 1.0
    while delta_at(high) > delta:
        high *= 2
    low = 0.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if delta_at(middle) > delta else (low, middle)
    return high
