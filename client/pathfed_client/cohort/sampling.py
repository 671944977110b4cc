"""Who takes part in a step, and with which tiles.

Patients are drawn by Poisson sampling: each independently with the public rate q, so the number drawn is itself random, may be 0, and
leaves the site only as a noised figure. Tiles are drawn across all slides of a drawn patient, none twice; nothing is ever padded.
"""

import numpy as np

from pathfed_client.cohort.cohort import Cohort, Patient, TileRef
from pathfed_common.privacy.randomness import KeyedRandom


def draw_patients(cohort: Cohort, sampling_rate: float, random: KeyedRandom) -> tuple[Patient, ...]:
    """The patients of one step: each is drawn with probability `sampling_rate`, independently of all others.

    Raises:
        ValueError: the rate is not within 0 to 1.
    """
    drawn = random.bernoulli(len(cohort.patients), sampling_rate)
    return tuple(cohort.patients[place] for place in np.flatnonzero(drawn).tolist())


def draw_tiles(patient: Patient, tiles: int, random: KeyedRandom) -> tuple[TileRef, ...]:
    """That many distinct tiles across all the patient's slides, every choice equally likely; all of them where there are fewer.

    Each is cut at a place inside its source that is drawn too.

    Raises:
        ValueError: `tiles` is below 1.
    """
    if tiles < 1:
        raise ValueError(f"tiles must be at least 1, got {tiles}")
    count = patient.tile_count
    chosen = random.choose(count, min(tiles, count))
    places = random.child("places").uniforms(2 * len(chosen)).reshape(-1, 2)
    return tuple(patient.tile(int(index), float(u), float(v)) for index, (u, v) in zip(chosen, places, strict=True))
