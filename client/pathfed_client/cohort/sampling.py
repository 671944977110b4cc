"""Who takes part in a step, and with which tiles.

Patients are drawn by Poisson sampling: each independently with the public rate q, so the number drawn is itself random, may be 0, and
leaves the site only as a noised figure. All patients have the same rate. Tiles are drawn across all slides of a drawn patient, none twice;
nothing is ever padded.

The law of tiles. One after the other, without putting back: the next tile is any tile not drawn yet, with probability

    weight of its slide / sum over all tiles not drawn yet of the weight of their slide

A weight belongs to each tile of a slide, so that a slide of 30 tiles with weight 1 and one of 10 tiles with weight 3 are equally likely to
give the first tile. Where all weights are equal, every sequence of distinct tiles is equally likely. The law is exact: weights are taken as
the fractions that floats are, and whole numbers are drawn. Weights change which tiles a patient shows, never how much the patient counts.
"""

from fractions import Fraction
from math import lcm

import numpy as np

from pathfed_client.cohort.cohort import Cohort, Patient, TileRef
from pathfed_common.privacy.randomness import KeyedRandom

_WORD_BITS = 64


def draw_patients(cohort: Cohort, sampling_rate: float, random: KeyedRandom) -> tuple[Patient, ...]:
    """The patients of one step: each is drawn with probability `sampling_rate`, independently of all others.

    Raises:
        ValueError: the rate is not within 0 to 1.
    """
    drawn = random.bernoulli(len(cohort.patients), sampling_rate)
    return tuple(cohort.patients[place] for place in np.flatnonzero(drawn).tolist())


def draw_tiles(patient: Patient, tiles: int, random: KeyedRandom) -> tuple[TileRef, ...]:
    """That many distinct tiles across all the patient's slides, by the law above; all of them where there are fewer.

    Each is cut at a place inside its source that is drawn too.

    Raises:
        ValueError: `tiles` is below 1.
    """
    if tiles < 1:
        raise ValueError(f"tiles must be at least 1, got {tiles}")
    count = patient.tile_count
    equal = len({slide.weight for slide in patient.slides}) <= 1
    chosen = random.choose(count, min(tiles, count)).tolist() if equal else _weighted(patient, min(tiles, count), random)
    places = random.child("places").uniforms(2 * len(chosen)).reshape(-1, 2)
    return tuple(patient.tile(index, float(u), float(v)) for index, (u, v) in zip(chosen, places, strict=True))


def _weighted(patient: Patient, tiles: int, random: KeyedRandom) -> list[int]:
    """Indices of tiles: a slide by weight times tiles left, then one of its tiles left, every one equally likely.

    Time and memory grow with the tiles drawn and the slides, not with the tiles there are.
    """
    weights = _whole([slide.weight for slide in patient.slides])
    left = [slide.tiles for slide in patient.slides]
    firsts = [sum(left[:at]) for at in range(len(left))]
    moved: list[dict[int, int]] = [{} for _ in left]
    chosen = []
    for _ in range(tiles):
        masses = [weight * tiles_left for weight, tiles_left in zip(weights, left, strict=True)]
        at, point = 0, _below(sum(masses), random)
        while point >= masses[at]:
            point -= masses[at]
            at += 1
        left[at] -= 1
        # A shuffle of the slide's tiles stopped early, from its end: the last tile left takes the drawn one's place.
        place = random.below(left[at] + 1)
        chosen.append(firsts[at] + moved[at].get(place, place))
        moved[at][place] = moved[at].get(left[at], left[at])
    return chosen


def _whole(weights: list[float]) -> list[int]:
    """Whole numbers in exactly the same proportion."""
    fractions = [Fraction(weight) for weight in weights]
    scale = lcm(*(fraction.denominator for fraction in fractions))
    return [int(fraction * scale) for fraction in fractions]


def _below(bound: int, random: KeyedRandom) -> int:
    """A whole number from 0 to bound - 1, every one equally likely, however large the bound."""
    bits = (bound - 1).bit_length()
    words = max(1, -(-bits // _WORD_BITS))
    while True:
        number = int.from_bytes(random.words(words).astype("<u8").tobytes(), "little") >> (words * _WORD_BITS - bits)
        if number < bound:
            return number
