"""The cohort: the patients a site contributes, each with the tiles of all that patient's slides.

A cohort is a frozen value made from the site database. It holds no path and no patient identifier: slides are numbered, patients are
pseudonyms (keyed HMACs whose key never leaves the site). Its digest names it in the keyed randomness; the digest itself stays at the site.

It is kept in columns, some 70 bytes a slide, so that a million slides are 70 MB; patients are made from them when asked for.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, NewType, overload

import numpy as np
from numpy.typing import NDArray

from pathfed_common import digest

#: 32 hex digits: a keyed HMAC of the hospital's patient identifier.
Pseudonym = NewType("Pseudonym", str)
#: Number of a slide in the site database.
SlideId = NewType("SlideId", int)

_CHECK_BYTES = 16


class TileRef(NamedTuple):
    """One tile as drawn: number `tile` of its slide, at that share of the play it has inside its source (0 <= across, down < 1)."""

    slide: SlideId
    tile: int
    across: float = 0.0
    down: float = 0.0


class SlideTiles(NamedTuple):
    """The usable tiles of one slide.

    Attributes:
        slide: number of the slide in the site database.
        tiles: how many.
        check: checksum of the slide's tile map, hex: names which tiles they are.
        weight: with which each of its tiles is drawn within the patient, above 0; from the plan's public `cohort.tile_weights`.
    """

    slide: SlideId
    tiles: int
    check: str
    weight: float = 1.0


@dataclass(frozen=True)
class Patient:
    """One patient: the privacy unit."""

    pseudonym: Pseudonym
    slides: tuple[SlideTiles, ...]

    @property
    def tile_count(self) -> int:
        """Usable tiles over all slides."""
        return sum(slide.tiles for slide in self.slides)

    def tile(self, index: int, across: float = 0.0, down: float = 0.0) -> TileRef:
        """The index-th tile, counting through the slides in order; 0 <= index < tile_count."""
        for slide in self.slides:
            if index < slide.tiles:
                return TileRef(slide.slide, index, across, down)
            index -= slide.tiles
        raise IndexError(f"the patient has {self.tile_count} tiles")


class Patients(Sequence[Patient]):
    """The patients of a cohort, made on demand."""

    def __init__(self, cohort: "Cohort") -> None:
        self._cohort = cohort

    def __len__(self) -> int:
        return len(self._cohort.pseudonyms)

    @overload
    def __getitem__(self, index: int) -> Patient: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Patient, ...]: ...
    def __getitem__(self, index: int | slice) -> Patient | tuple[Patient, ...]:
        if isinstance(index, slice):
            return tuple(self[place] for place in range(*index.indices(len(self))))
        place = range(len(self))[index]
        cohort = self._cohort
        start, end = int(cohort.first[place]), int(cohort.first[place + 1])
        slides = tuple(
            SlideTiles(
                SlideId(int(cohort.slides[at])), int(cohort.counts[at]), cohort.checks[at].tobytes().hex(), float(cohort.weights[at])
            )
            for at in range(start, end)
        )
        return Patient(Pseudonym(cohort.pseudonyms[place].tobytes().hex()), slides)

    def __iter__(self) -> Iterator[Patient]:
        return (self[place] for place in range(len(self)))


@dataclass(frozen=True, eq=False)
class Cohort:
    """All patients of a site that a plan may train on, in order of their pseudonyms.

    Attributes:
        pseudonyms: uint8 (patients, 16).
        first: int64 (patients + 1,), where each patient's slides begin.
        slides: int64 (slides,), numbers in the site database.
        counts: int64 (slides,), tiles of each.
        checks: uint8 (slides, 16), checksum of each slide's tile map.
        weights: float64 (slides,), with which each of a slide's tiles is drawn within its patient, above 0.
    """

    pseudonyms: NDArray[np.uint8]
    first: NDArray[np.int64]
    slides: NDArray[np.int64]
    counts: NDArray[np.int64]
    checks: NDArray[np.uint8]
    weights: NDArray[np.float64]

    def __post_init__(self) -> None:
        names = [row.tobytes() for row in self.pseudonyms]
        if any(one >= other for one, other in pairwise(names)):
            raise ValueError("a cohort's patients are sorted by pseudonym, each once")
        if len(self.first) != len(names) + 1 or not int(self.first[-1]) == len(self.slides) == len(self.weights):
            raise ValueError("a cohort's columns do not fit each other")
        if not (np.isfinite(self.weights) & (self.weights > 0)).all():
            raise ValueError("the weights of tiles are above 0 and finite")

    @classmethod
    def of(cls, patients: Iterable[Patient]) -> "Cohort":
        """A cohort of these patients.

        Raises:
            ValueError: they are not sorted by pseudonym, each once.
        """
        return cls.of_rows((patient.pseudonym, *slide) for patient in patients for slide in patient.slides)

    @classmethod
    def of_rows(cls, rows: Iterable[tuple[str, int, int, str, float]]) -> "Cohort":
        """A cohort of rows (pseudonym, slide, tiles, checksum, weight), those of a patient side by side, patients sorted.

        Raises:
            ValueError: they are not.
        """
        names: list[str] = []
        first, slides, counts, weights = [0], [], [], []
        checks = bytearray()
        for name, slide, count, check, weight in rows:
            if not names or names[-1] != name:
                names.append(name)
                first.append(first[-1])
            first[-1] += 1
            slides.append(slide)
            counts.append(count)
            weights.append(weight)
            checks += bytes.fromhex(check)
        return cls(
            np.frombuffer(bytes.fromhex("".join(names)), np.uint8).reshape(len(names), _CHECK_BYTES),
            np.array(first, np.int64),
            np.array(slides, np.int64),
            np.array(counts, np.int64),
            np.frombuffer(bytes(checks), np.uint8).reshape(len(slides), _CHECK_BYTES),
            np.array(weights, np.float64),
        )

    @property
    def patients(self) -> Patients:
        """The patients, in order of their pseudonyms."""
        return Patients(self)

    @property
    def digest(self) -> digest.Digest:
        """Names patients, slides, their tiles and weights. Depends on patients: it never leaves the site."""
        columns = (self.pseudonyms, self.first, self.slides, self.counts, self.checks, self.weights)
        return digest.of_chunks(part for column in columns for part in (f"|{column.size}|".encode(), _little_endian(column)))


def _little_endian(column: NDArray[np.uint8] | NDArray[np.int64] | NDArray[np.float64]) -> bytes:
    return column.astype(column.dtype.newbyteorder("<"), copy=False).tobytes()
