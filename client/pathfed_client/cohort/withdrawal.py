"""What a withdrawal is kept as: names that tell nobody who was withdrawn, and are found again in later scans and lists. Pure.

A patient is kept under the pseudonym. A slide is kept twice, under its path and under its contents: a slide that is moved, or another
file that takes its place, stays out. A withdrawn patient's slides that are known at that time are withdrawn with the patient, so that a
list which later gives them another number does not bring them back.

Names are HMACs with the key of the pseudonyms, which never leaves the site.
"""

import hmac
from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum

from pathfed_client.cohort.cohort import Pseudonym

#: What a scan writes for a slide that was not read: it names no contents.
NO_CONTENTS = ""


class WithdrawnKind(StrEnum):
    """What a kept name stands for."""

    PATIENT = "patient"
    #: A slide's path.
    PATH = "path"
    #: A slide's contents.
    CONTENTS = "contents"


@dataclass(frozen=True)
class Withdrawn:
    """One kept name.

    Attributes:
        kind: what it stands for.
        name: a pseudonym, or 32 hex digits of a keyed HMAC.
    """

    kind: WithdrawnKind
    name: str


def of_slide(key: bytes, path: str, fingerprint: str | None) -> frozenset[Withdrawn]:
    """The names a slide is kept under.

    Args:
        key: 32 bytes, the key of the pseudonyms.
        path: the slide's path in the site database.
        fingerprint: of its contents, or None where it was never read.
    """
    names = {Withdrawn(WithdrawnKind.PATH, _keyed(key, WithdrawnKind.PATH, path))}
    if fingerprint is not None and fingerprint != NO_CONTENTS:
        names.add(Withdrawn(WithdrawnKind.CONTENTS, _keyed(key, WithdrawnKind.CONTENTS, fingerprint)))
    return frozenset(names)


def is_withdrawn(withdrawn: Collection[Withdrawn], key: bytes, *, patient: Pseudonym | None, path: str, fingerprint: str | None) -> bool:
    """Whether a slide is withdrawn, by its patient, its path or its contents."""
    if not withdrawn:
        return False
    by_patient = patient is not None and Withdrawn(WithdrawnKind.PATIENT, patient) in withdrawn
    return by_patient or any(name in withdrawn for name in of_slide(key, path, fingerprint))


def _keyed(key: bytes, kind: WithdrawnKind, text: str) -> str:
    return hmac.digest(key, f"pathfed withdrawn {kind}|{text}".encode(), "sha256").hex()[:32]
