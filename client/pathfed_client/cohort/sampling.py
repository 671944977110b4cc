"""Who takes part in a step, and with which tiles.

Patients are drawn by Poisson sampling: each independently with the public rate q, so the number drawn is itself random, may be 0, and
leaves the site only as a noised figure. Tiles are drawn across all slides of a drawn patient, none twice; nothing is ever padded.
"""

from pathfed_client.cohort.cohort import Cohort, Patient, TileRef
from pathfed_common.privacy.randomness import KeyedRandom


def draw_patients(cohort: Cohort, sampling_rate: float, random: KeyedRandom) -> tuple[Patient, ...]:
    """The patients of one step: each is drawn with probability `sampling_rate`, independently of all others.

    Raises:
        ValueError: the rate is not within 0 to 1.
    """
    drawn = random.bernoulli(len(cohort.patients), sampling_rate)
    return tuple(patient for patient, is_drawn in zip(cohort.patients, drawn.tolist(), strict=True) if is_drawn)


def draw_tiles(patient: Patient, tiles: int, random: KeyedRandom) -> tuple[TileRef, ...]:
    """That many distinct tiles across all the patient's slides, every choice equally likely; all of them where there are fewer.

    Raises:
        ValueError: `tiles` is below 1.
    """
    if tiles < 1:
        raise ValueError(f"tiles must be at least 1, got {tiles}")
    count = patient.tile_count
    return tuple(patient.tile(int(index)) for index in random.choose(count, min(tiles, count)))
