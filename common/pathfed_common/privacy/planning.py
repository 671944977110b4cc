"""What a plan costs round by round, and what it would need to cost no more than a target.

All by the accountant that counts (PLD, `pathfed_common.privacy.accounting`), for one patient who is in the cohort of `sites` sites, each of
which takes part in every round. Each question changes one of four numbers and leaves the others as they are: sigma, B, rounds, or N.

**Rounding.** Answers are on a grid: sigma has four significant digits, B, rounds and N are whole. The answer given was itself computed to
meet the target, and its neighbour on the grid, towards the other side, was computed not to. That is a bracketing search in whole numbers
(bisection, its next place guessed by interpolation), sound because epsilon grows with B and rounds and falls with sigma and N.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from pathfed_common.errors import ErrorCode, PrivacyError
from pathfed_common.privacy.accounting import PrivacyEvent, composed_epsilon, lower_bound
from pathfed_common.privacy.mechanism import MOST_NOISE

_DIGITS = 1000  # four significant digits: 1000 to 9999 in each decade
_DECADE = 9 * _DIGITS
#: Bounds of what is searched: rounds and the largest sigma are a plan's. With less noise or a smaller rate than these, one step's
#: privacy loss spreads over so many cells of the grid that PLD takes minutes.
NOISE_BOUNDS = (0.4, MOST_NOISE)
MOST_ROUNDS = 1_000_000
MOST_PATIENTS = 10_000_000


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What decides the epsilon of a run.

    Attributes:
        expected_patients: B.
        patients: N, as declared by the site; at least B.
        noise_multiplier: sigma.
        rounds: how many.
        steps: private steps in a round.
        sites: whose cohorts the patient is in.
        delta: where epsilon is stated.
    """

    expected_patients: float
    patients: int
    noise_multiplier: float
    rounds: int
    steps: int
    sites: int
    delta: float

    @property
    def event(self) -> PrivacyEvent:
        """All releases of the run that hold the patient."""
        return PrivacyEvent(
            sampling_rate=self.expected_patients / self.patients,
            noise_multiplier=self.noise_multiplier,
            steps=self.rounds * self.steps * self.sites,
        )

    @property
    def epsilon(self) -> float:
        """Epsilon (PLD) at `delta`."""
        return composed_epsilon([self.event], self.delta)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A number that meets the target, and the epsilon it really gives."""

    value: float
    epsilon: float


def epsilon_by_round(cost: Cost, rounds: Iterable[int]) -> list[float]:
    """Epsilon after each of these rounds.

    Raises:
        ValueError: a round is below 1.
    """
    return [replace(cost, rounds=index).epsilon for index in rounds]


def least_noise(cost: Cost, target: float) -> Answer:
    """The least sigma that meets the target, rounded up to four significant digits.

    Raises:
        PrivacyError: PF311, the largest of `NOISE_BOUNDS` does not.
        ValueError: the target is not finite and above 0.
    """
    low, high = (_noise_index(noise) for noise in NOISE_BOUNDS)
    first = min(max(_noise_index(cost.noise_multiplier), low), high)
    found = _largest(
        lambda index: replace(cost, noise_multiplier=_noise(-index)), target, first=-first, least=-high, most=-low, stride=_DIGITS // 4
    )
    if found is None:
        raise _out_of_reach("noise multiplier", f"at most {NOISE_BOUNDS[1]:g}", target)
    return _answer(replace(cost, noise_multiplier=_noise(-found)), _noise(-found))


def most_expected_patients(cost: Cost, target: float) -> Answer:
    """The largest whole B, at most N, that meets the target.

    Raises:
        PrivacyError: PF311, not even one expected patient a step does.
        ValueError: the target is not finite and above 0.
    """
    first = max(1, int(cost.expected_patients))
    found = _largest(
        lambda index: replace(cost, expected_patients=index), target, first=first, least=1, most=cost.patients, stride=first // 4 + 1
    )
    if found is None:
        raise _out_of_reach("number of expected patients a step", "at least 1", target)
    return _answer(replace(cost, expected_patients=found), found)


def most_rounds(cost: Cost, target: float) -> Answer:
    """The largest number of rounds that meets the target.

    Raises:
        PrivacyError: PF311, not even one round does.
        ValueError: the target is not finite and above 0.
    """
    found = _largest(
        lambda index: replace(cost, rounds=index), target, first=cost.rounds, least=1, most=MOST_ROUNDS, stride=cost.rounds // 4 + 1
    )
    if found is None:
        raise _out_of_reach("number of rounds", "at least 1", target)
    return _answer(replace(cost, rounds=found), found)


def fewest_patients(cost: Cost, target: float) -> Answer:
    """The smallest declared number of patients N, at least B, that meets the target.

    Raises:
        PrivacyError: PF311, not even `MOST_PATIENTS` do.
        ValueError: the target is not finite and above 0.
    """
    least = math.ceil(cost.expected_patients)
    found = _largest(
        lambda index: replace(cost, patients=-index),
        target,
        first=-cost.patients,
        least=-MOST_PATIENTS,
        most=-least,
        stride=cost.patients // 4 + 1,
    )
    if found is None:
        raise _out_of_reach("number of patients", f"at most {MOST_PATIENTS:,}", target)
    return _answer(replace(cost, patients=-found), -found)


def _answer(cost: Cost, value: float) -> Answer:
    return Answer(value=value, epsilon=cost.epsilon)


def _noise(index: int) -> float:
    """The sigma of a place on the grid of four significant digits; 0 is 1.000."""
    decade, step = divmod(index, _DECADE)
    return float(f"{_DIGITS + step}e{decade - 3}")


def _noise_index(noise: float) -> int:
    """The place of the least sigma on the grid that is not below this one."""
    decade = math.floor(math.log10(noise))
    index = decade * _DECADE + math.floor(noise / 10.0**decade * _DIGITS) - _DIGITS - 1
    while _noise(index) < noise:
        index += 1
    return index


def _largest(cost: Callable[[int], Cost], target: float, *, first: int, least: int, most: int, stride: int) -> int | None:
    """The largest whole number in [least, most] whose epsilon is at most the target; None where there is none.

    Args:
        cost: of a number; its epsilon does not fall as the number grows.
        target: finite, above 0.
        first: where to begin, within the bounds.
        least: the lower bound.
        most: the upper bound.
        stride: how far to look at first.
    """
    if not 0 < target < math.inf:
        raise ValueError(f"target must be finite and above 0, got {target}")
    known: dict[int, float] = {}

    def meets(index: int) -> bool:
        found = cost(index)
        # The lower bound is cheap, and where it is above the target already, PLD need not be asked.
        known[index] = math.inf if lower_bound([found.event], found.delta) > target else found.epsilon
        return known[index] <= target

    good = bad = first
    if meets(first):
        while meets(bad := min(most, good + stride)):
            if bad == most:
                return most
            good, stride = bad, 2 * stride
    else:
        while not meets(good := max(least, bad - stride)):
            if good == least:
                return None
            bad, stride = good, 2 * stride
    while bad - good > 1:
        middle = _between(good, bad, known, target)
        good, bad = (middle, bad) if meets(middle) else (good, middle)
    return good


def _between(good: int, bad: int, known: dict[int, float], target: float) -> int:
    """Where to look next, strictly between: by interpolation of log epsilon, and every third time in the middle, as in bisection."""
    middle = (good + bad) // 2
    low, high = known[good], known[bad]
    if len(known) % 3 == 0 or not 0 < low < high < math.inf:
        return middle
    share = (math.log(target) - math.log(low)) / (math.log(high) - math.log(low))
    return min(max(good + round(share * (bad - good)), good + 1), bad - 1)


def _out_of_reach(what: str, bound: str, target: float) -> PrivacyError:
    return PrivacyError(
        ErrorCode.TARGET_OUT_OF_REACH,
        f"no {what} within bounds meets the target",
        value=f"epsilon {target:g}, with {bound}",
        remedy="raise the target, or change what is held fixed",
    )
