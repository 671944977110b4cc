"""The cohort: the patients a site contributes, each with the tiles of all that patient's slides.

A cohort is a frozen value made from the site database. It holds no path and no patient identifier: slides are numbered, patients are
pseudonyms (keyed HMACs whose key never leaves the site). Its digest names it in the keyed randomness; the digest itself stays at the site.
"""

from dataclasses import dataclass
from typing import NewType

import numpy as np
from numpy.typing import NDArray

from pathfed_common import digest

#: 32 hex digits: a keyed HMAC of the hospital's patient identifier.
Pseudonym = NewType("Pseudonym", str)
#: Number of a slide in the site database.
SlideId = NewType("SlideId", int)


@dataclass(frozen=True)
class TileRef:
    """One tile: its slide, and its top-left corner (x, y) in level-0 pixels."""

    slide: SlideId
    x: int
    y: int


@dataclass(frozen=True, eq=False)
class SlideTiles:
    """The usable tiles of one slide.

    Attributes:
        slide: number of the slide in the site database.
        corners: int32 (n, 2), top-left (x, y) of each tile in level-0 pixels.
        weight: with which each of its tiles is drawn within the patient, above 0; from the plan's public `cohort.tile_weights`.
    """

    slide: SlideId
    corners: NDArray[np.int32]
    weight: float = 1.0


@dataclass(frozen=True, eq=False)
class Patient:
    """One patient: the privacy unit."""

    pseudonym: Pseudonym
    slides: tuple[SlideTiles, ...]

    @property
    def tile_count(self) -> int:
        """Usable tiles over all slides."""
        return sum(len(slide.corners) for slide in self.slides)

    def tile(self, index: int) -> TileRef:
        """The index-th tile, counting through the slides in order; 0 <= index < tile_count."""
        for slide in self.slides:
            if index < len(slide.corners):
                x, y = slide.corners[index]
                return TileRef(slide.slide, int(x), int(y))
            index -= len(slide.corners)
        raise IndexError(f"the patient has {self.tile_count} tiles")


@dataclass(frozen=True, eq=False)
class Cohort:
    """All patients of a site that a plan may train on, in order of their pseudonyms."""

    patients: tuple[Patient, ...]

    def __post_init__(self) -> None:
        names = [patient.pseudonym for patient in self.patients]
        if names != sorted(set(names)):
            raise ValueError("a cohort's patients are sorted by pseudonym, each once")

    @property
    def digest(self) -> digest.Digest:
        """Names patients, slides, weights and tile corners. Depends on patients: it never leaves the site."""
        return digest.of_chunks(
            part
            for patient in self.patients
            for slide in patient.slides
            for part in (
                patient.pseudonym.encode(),
                f"|{slide.slide}|{slide.weight!r}|{len(slide.corners)}|".encode(),
                np.ascontiguousarray(slide.corners, "<i4").tobytes(),
            )
        )
