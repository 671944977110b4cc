"""Noise by index is independent standard normal noise, to five standard deviations: checks, and faults planted to show that each can fail.

The checks look at numbers only. The faults are planted in the real code path.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats

from pathfed_common.privacy import gaussian
from pathfed_common.privacy.gaussian import BoxMuller, GaussianStream
from pathfed_common.privacy.keystream import Keystream
from pathfed_common.privacy.randomness import KeyedRandom

#: Draws for moments, tails and pairs, and for the shape; each check's false alarms are below 1e-5.
MANY, SOME = 1 << 26, 1 << 20
PIECE = 1 << 17
Draw = Callable[[int, int], NDArray[np.float64]]


def random(**context: str | int) -> KeyedRandom:
    return KeyedRandom(bytes(range(32)), {"purpose": "statistics", **context})


def draw(start: int, stop: int) -> NDArray[np.float64]:
    return torch.cat(list(random().normal_range(start, stop))).numpy()


def noise(start: int, stop: int) -> NDArray[np.float64]:
    """What `add_normals` adds to zeros at std 1, rounded to its grid."""
    values = torch.zeros(stop - start, dtype=torch.float64)
    random().add_normals(values, 1.0, start=start)
    return values.numpy()


def std(sample: Draw) -> bool:
    return abs(float(sample(0, SOME).std()) - 1) < 0.01


def mean(sample: Draw) -> bool:
    return abs(float(sample(0, SOME).mean())) < 4.5 / math.sqrt(SOME)


def kolmogorov_smirnov(sample: Draw) -> bool:
    return bool(stats.kstest(sample(0, SOME), "norm").pvalue > 1e-5)


def anderson_darling(sample: Draw) -> bool:
    """A^2 with nothing estimated (Anderson and Darling, 1954): heavy on the tails; above 10 with probability below 1e-5."""
    values = np.sort(sample(0, SOME))
    weights = 2 * np.arange(1, SOME + 1) - 1
    logs = stats.norm.logcdf(values) + stats.norm.logsf(values[::-1])
    return bool(-SOME - np.mean(weights * logs) < 10)


def tails(sample: Draw) -> bool:
    """Counts below and above 3, 4 and 5 standard deviations against Poisson bounds."""
    counts: dict[float, int] = dict.fromkeys((-5, -4, -3, 3, 4, 5), 0)
    for start in range(0, MANY, SOME):
        values = sample(start, start + SOME)
        for bound in counts:
            counts[bound] += int(np.count_nonzero(values > bound if bound > 0 else values < bound))
    return all(_poisson(counts[bound], MANY * float(stats.norm.sf(abs(bound)))) for bound in counts)


def _poisson(count: int, expected: float) -> bool:
    return bool(min(stats.poisson.cdf(count, expected), stats.poisson.sf(count - 1, expected)) > 1e-6)


def pairs(sample: Draw) -> bool:
    """Halves of a pair, and neighbours of two pairs, are uncorrelated, in their signs, values, squares and products."""
    values = sample(0, 4 * SOME)
    halves = values.reshape(-1, 2)
    return all(
        _uncorrelated(f(left), g(right))
        for left, right in [(halves[:, 0], halves[:, 1]), (halves[:-1, 1], halves[1:, 0]), (halves[:-1, 0], halves[1:, 0])]
        for f, g in [(np.positive, np.positive), (np.square, np.square), (np.square, np.positive), (np.positive, np.square)]
    )


def _uncorrelated(left: NDArray[np.float64], right: NDArray[np.float64]) -> bool:
    return abs(float(np.corrcoef(left, right)[0, 1])) < 5 / math.sqrt(len(left))


def places(sample: Draw) -> bool:
    """Ranges are parts of the whole."""
    whole = sample(0, 3 * PIECE)
    starts = [0, 1, 2, 129, 1000, PIECE - 1, PIECE, PIECE + 65, 2 * PIECE + 3]
    return all(np.array_equal(sample(start, start + 1001), whole[start : start + 1001]) for start in starts)


def repetition(sample: Draw) -> bool:
    """No number comes twice: some 2^39 pairs of draws are equal with probability near 2^-51 each, and three are nowhere to be expected."""
    values = sample(0, SOME)
    return len(np.unique(values)) > len(values) - 3


def sources(_: Draw) -> bool:
    """Other contexts, other children and other parts of a child are uncorrelated with each other, place by place."""
    own = [random(), random(round=2), random().child("noise", "a"), random().child("noise", "b"), random().child("noise", "a", 1)]
    streams = np.stack([next(source.normal_range(0, PIECE)).numpy() for source in own])
    return all(_uncorrelated(streams[i], streams[j]) for i in range(len(own)) for j in range(i))


CHECKS: dict[str, Callable[[Draw], bool]] = {
    check.__name__: check for check in (std, mean, kolmogorov_smirnov, anderson_darling, tails, pairs, places, repetition, sources)
}


@pytest.mark.parametrize("check", CHECKS)
def test_normals_by_index_pass(check: str) -> None:
    assert CHECKS[check](draw)


@pytest.mark.parametrize("check", ["std", "mean", "tails", "pairs", "places"])
def test_added_noise_passes(check: str) -> None:
    assert CHECKS[check](noise)


def halved(patch: pytest.MonkeyPatch) -> None:
    call = BoxMuller.__call__
    patch.setattr(BoxMuller, "__call__", lambda self, *words: call(self, *words).mul_(0.5))


def scaled_by_2_percent(patch: pytest.MonkeyPatch) -> None:
    call = BoxMuller.__call__
    patch.setattr(BoxMuller, "__call__", lambda self, *words: call(self, *words).mul_(1.02))


def truncated_at_4(patch: pytest.MonkeyPatch) -> None:
    call = BoxMuller.__call__
    patch.setattr(BoxMuller, "__call__", lambda self, *words: call(self, *words).clamp_(-4, 4))


def radius_of_18_bits(patch: pytest.MonkeyPatch) -> None:
    """Tails end at 5 standard deviations (those of a generator of single precision end at 5.9)."""
    call = BoxMuller.__call__
    patch.setattr(BoxMuller, "__call__", lambda self, radii, angles, extra: call(self, radii.bitwise_or_(2**45 - 1), angles, {}))


def counter_reused_in_every_piece(patch: pytest.MonkeyPatch) -> None:
    take = gaussian._Words.take

    def from_the_start(self: Any, pairs: int) -> torch.Tensor:
        self._stream = Keystream(bytes(32))
        return take(self, pairs)

    patch.setattr(gaussian._Words, "take", from_the_start)


def start_ignored(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(gaussian, "Keystream", lambda key, *, first_word: Keystream(key))


def start_off_by_a_pair(patch: pytest.MonkeyPatch) -> None:
    chunks = GaussianStream.chunks

    def later(self: GaussianStream, start: int, stop: int, **options: Any) -> Iterator[torch.Tensor]:
        shift = 2 if start else 0
        return chunks(self, start + shift, stop + shift, **options)

    patch.setattr(GaussianStream, "chunks", later)


def angle_from_the_radius(patch: pytest.MonkeyPatch) -> None:
    call = BoxMuller.__call__
    patch.setattr(BoxMuller, "__call__", lambda self, radii, angles, extra: call(self, radii, radii >> 51, extra))


def one_key_for_all(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(KeyedRandom, "_gaussian", lambda self: GaussianStream(bytes(range(96))))


def half_a_circle(patch: pytest.MonkeyPatch) -> None:
    """The table's first half only: sines are positive."""
    call = BoxMuller.__call__
    patch.setattr(BoxMuller, "__call__", lambda self, radii, angles, extra: call(self, radii, angles.bitwise_and_(~2048), extra))


def coarse_angle(patch: pytest.MonkeyPatch) -> None:
    """Eight directions."""
    call = BoxMuller.__call__
    patch.setattr(BoxMuller, "__call__", lambda self, radii, angles, extra: call(self, radii, angles.bitwise_and_(0xE00), extra))


@dataclass(frozen=True)
class Fault:
    plant: Callable[[pytest.MonkeyPatch], None]
    caught_by: set[str]


FAULTS = [
    Fault(halved, {"std", "kolmogorov_smirnov", "anderson_darling", "tails"}),
    Fault(scaled_by_2_percent, {"std", "kolmogorov_smirnov", "anderson_darling", "tails"}),
    Fault(truncated_at_4, {"tails", "repetition"}),
    Fault(radius_of_18_bits, {"tails"}),
    Fault(counter_reused_in_every_piece, {"repetition", "places"}),
    Fault(start_ignored, {"places"}),
    Fault(start_off_by_a_pair, {"places"}),
    Fault(angle_from_the_radius, {"pairs"}),
    Fault(one_key_for_all, {"sources"}),
    Fault(half_a_circle, {"mean", "kolmogorov_smirnov", "anderson_darling"}),
    Fault(coarse_angle, {"kolmogorov_smirnov", "anderson_darling", "tails"}),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.plant.__name__)
def test_planted_fault_is_caught(fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    fault.plant(monkeypatch)
    missed = {name for name in fault.caught_by if CHECKS[name](draw)}
    assert not missed
