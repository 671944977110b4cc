"""What releases cost a patient: privacy events to epsilon, by one accountant, with two independent opinions beside it.

The figure that counts is dp_accounting's, from privacy loss distributions (PLD; Koskela et al. 2020, Doroshenko et al. 2022), composed as
its PLDAccountant does and pessimistic through its discretisation: 1e-4 in the privacy loss, and finer (down to 1e-6) where a single
step's loss is so small that a grid of 1e-4 would overstate it. Relation: add or remove one patient. The other opinions:

    - `rdp_epsilon`, Renyi accounting (Mironov et al. 2019; opacus): an upper bound by another method. PLD above it would be a fault.
    - `lower_bound`, the epsilon that an attacker demonstrates who looks at the sum of all steps: a lower bound by yet another method, exact
      arithmetic on normal and binomial tails. PLD below it would be a fault, and the dangerous one.
    - `prv_estimate`, privacy random variables (Gopi et al. 2021; opacus): bounds on both sides, the tightest, and the only dear ones:
      0.4 s to 9 s of a processor each, against milliseconds.

`check_bounds` asks the two cheap ones, `check_accountants` all three; both raise on a contradiction. Before every charge the ledger asks
for the bounds, and all three the first time a process meets a set of mechanisms and whenever the steps have grown `FULL_CHECK_GROWTH` times
since. That is sound because each of the two bounds holds by itself, from either side, at every charge; and because what the third guards
against, a wrong PLD of *one step* inside the gap between the bounds, does not come and go with the number of steps: the same one-step
distribution is composed every time.

Events compose by adding up: equal mechanisms are merged, so the order and grouping of charges cannot change an epsilon. Results are
cached by their whole input. The libraries are imported inside the functions: they are slow to load and not on every host.
"""

import math
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from pathfed_common.errors import ErrorCode, PrivacyError

#: PLD may exceed the Renyi bound by this much before the accountants are said to disagree: rounding.
RDP_TOLERANCE = 1e-6
#: PLD may fall below the lower bound by this much: rounding, of log-gammas of the number of steps.
LOWER_TOLERANCE = 1e-5
_DRAWS_KEPT = 512
#: PLD may leave the PRV interval by this much.
PRV_TOLERANCE = 1e-3
#: The ledger asks all accountants again once the steps have grown so many times.
FULL_CHECK_GROWTH = 10
#: Grids of the privacy loss; the first that is a quarter of a step's loss (root mean square) or less is taken, else the last. A grid of
#: width h adds at most h^2 / 4 to a step's variance where the loss is wider than h, but in proportion to h where it is narrower.
_PLD_INTERVALS = (1e-4, 1e-5, 1e-6)
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

    Infinite where it is beyond floating point (some 700): true as an upper bound, and over every limit.

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


def lower_bound(events: Sequence[PrivacyEvent], delta: float) -> float:
    """A lower bound on epsilon, from an attack; no event costs 0.

    Of the releases with one mechanism, an attacker adds up the coordinate along which the patient differs most: without the patient the
    sum is normal, with it the mean moves by one for each step that drew the patient, a binomial number. Every threshold test on it
    shows epsilon >= log((power - delta) / false alarms). The largest over thresholds and mechanisms is given. It reaches PLD to within some
    percent for sigma of 2 and more, and three quarters of it at sigma 1.

    Raises:
        ValueError: delta is not within (0, 1).
    """
    _check_delta(delta)
    return max((_lower_bound(rate, noise, count, delta) for rate, noise, count in _merged(events)), default=0.0)


def check_bounds(events: Sequence[PrivacyEvent], delta: float) -> float:
    """Epsilon (PLD), once the Renyi bound and the lower bound were found on either side of it.

    Raises:
        PrivacyError: PF305, PLD is above the Renyi bound or below the lower bound, beyond the tolerances stated above.
        ValueError: delta is not within (0, 1).
    """
    ours = composed_epsilon(events, delta)
    above, below = rdp_epsilon(events, delta), lower_bound(events, delta)
    if not (ours <= above + RDP_TOLERANCE or ours == math.inf):
        raise _disagreement(f"PLD says {ours:.6g}, above the Renyi bound {above:.6g}", delta)
    if not ours >= below - LOWER_TOLERANCE:
        raise _disagreement(f"PLD says {ours:.6g}, while a test shows at least {below:.6g}", delta)
    return ours


def check_stated(stated: float, events: Sequence[PrivacyEvent], delta: float) -> float:
    """The same figure, once `lower_bound` was found not to be above it: a check of an epsilon computed before, without slow libraries.

    Raises:
        PrivacyError: PF305, a test of these events shows more than what is stated, beyond the tolerance stated above.
        ValueError: delta is not within (0, 1).
    """
    below = lower_bound(events, delta)
    if not stated >= below - LOWER_TOLERANCE:
        raise _disagreement(f"epsilon is stated to be {stated:.6g}, while a test shows at least {below:.6g}", delta)
    return stated


def check_accountants(events: Sequence[PrivacyEvent], delta: float) -> float:
    """Epsilon (PLD), once all other accountants have been asked and do not contradict it.

    Raises:
        PrivacyError: PF305, as `check_bounds`, or PLD is outside the PRV bounds beyond the tolerance stated above.
        ValueError: delta is not within (0, 1).
    """
    ours = check_bounds(events, delta)
    bracket = prv_estimate(events, delta) if ours < math.inf else None
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
    import numpy as np

    with np.errstate(over="ignore"):
        return float(_composed(merged, _interval(merged)).get_epsilon_for_delta(delta)) if merged else 0.0


@lru_cache(maxsize=48)
def _composed(merged: _Merged, interval: float) -> Any:
    """The privacy loss distribution of all events, for every delta.

    Composed as a balanced tree whose parts are kept: a charge changes the steps of one mechanism, so that of 20 only that one's and the
    five above it are composed again. One step's distributions are kept too. A part is some megabytes.
    """
    if len(merged) > 1:
        half = len(merged) // 2
        return _composed(merged[:half], interval).compose(_composed(merged[half:], interval))
    ((rate, noise, count),) = merged
    return _gaussian(noise, rate, interval).self_compose(count)


def _interval(merged: _Merged) -> float:
    """The grid for these events, by the root mean square of a step's privacy loss: about q * sqrt(exp(1 / sigma^2) - 1)."""
    steps = sum(count for _, _, count in merged)
    square = sum(count * rate**2 * math.expm1(min(1 / noise**2, 50.0)) for rate, noise, count in merged) / steps
    return next((interval for interval in _PLD_INTERVALS if interval <= math.sqrt(square) / 4), _PLD_INTERVALS[-1])


@lru_cache(maxsize=32)
def _gaussian(noise: float, rate: float, interval: float) -> Any:
    from dp_accounting import NeighboringRelation
    from dp_accounting.pld import privacy_loss_distribution

    return privacy_loss_distribution.from_gaussian_mechanism(
        noise, sampling_prob=rate, value_discretization_interval=interval, neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE
    )


@lru_cache(maxsize=4096)
def _lower_bound(rate: float, noise: float, steps: int, delta: float) -> float:
    """The best of some thresholds, none beyond 37 standard deviations. What is left out or rounded here can only lower the power."""
    import numpy as np

    spread = noise * math.sqrt(steps)
    drawn, weights = _draws(rate, steps)
    thresholds = np.linspace(-2.0, min(37.0, 9.0 + drawn[-1] / spread), 256)
    power = _tail(thresholds[:, None] - drawn / spread) @ weights
    shown = power > delta
    if not shown.any():
        return 0.0
    return max(0.0, float((np.log(power[shown] - delta) - np.log(_tail(thresholds[shown]))).max()))


def _draws(rate: float, steps: int) -> tuple[Any, Any]:
    """In how many of the steps a patient is drawn, ascending, and with which probability; neighbours counted as the lowest of them."""
    import numpy as np

    if rate == 1:
        return np.array([steps]), np.array([1.0])
    reach = 8 * math.sqrt(steps * rate * (1 - rate)) + 8
    numbers = range(max(0, math.floor(steps * rate - reach)), min(steps, math.ceil(steps * rate + reach)) + 1)
    constant, yes, no = math.lgamma(steps + 1), math.log(rate), math.log1p(-rate)
    logs = (constant - math.lgamma(n + 1) - math.lgamma(steps - n + 1) + n * yes + (steps - n) * no for n in numbers)
    probabilities = np.fromiter(map(math.exp, logs), float, len(numbers))
    starts = np.arange(0, len(numbers), -(-len(numbers) // _DRAWS_KEPT))
    return np.array(numbers)[starts], np.add.reduceat(probabilities, starts) / max(1.0, probabilities.sum())


def _tail(deviations: Any) -> Any:
    """The probability that a standard normal number is above each, shape kept."""
    import numpy as np

    return np.frompyfunc(lambda z: 0.5 * math.erfc(z / math.sqrt(2)), 1, 1)(deviations).astype(float)


@lru_cache(maxsize=4096)
def _rdp(merged: _Merged, delta: float) -> float:
    if not merged:
        return 0.0
    from opacus.accountants.analysis.rdp import get_privacy_spent

    with _orders_may_end():
        # Renyi divergences add up over steps.
        total = sum(count * _rdp_of_one_step(rate, noise) for rate, noise, count in merged)
        # The conversion falls below 0 where delta is large: a bound on epsilon is never negative.
        return max(0.0, float(get_privacy_spent(orders=_ORDERS, rdp=total, delta=delta)[0]))


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
