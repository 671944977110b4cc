"""The values that go into the site database and come out of it.

Plain and frozen, free of any database library, so that the rest of the client can name them. Everything here stays at the site: slide
paths and pseudonyms are for the hospital's own eyes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from pathfed_client.cohort.cohort import Pseudonym
from pathfed_client.io.tile_index import IndexEntry
from pathfed_common.digest import Digest
from pathfed_common.errors import ErrorCode
from pathfed_common.ids import RunName
from pathfed_common.provenance.keys import VerifyKey


class SlideStatus(StrEnum):
    """What a scan made of one slide."""

    #: Mapped to a patient and with at least one tile: part of the cohort.
    USABLE = "usable"
    #: Mapped to a patient, but not fit for training; the reason code says why.
    REFUSED = "refused"
    #: Without a certain patient (not in the list, or listed in contradiction): never trained on.
    UNMAPPED = "unmapped"
    #: Scanned before, and no longer in the folder.
    MISSING = "missing"
    #: Found and mapped to a patient, and not read yet.
    PENDING = "pending"


class ApprovalState(StrEnum):
    """A site's word on a plan."""

    #: The site trains for it.
    APPROVED = "approved"
    #: The site does not; it may approve it later.
    REJECTED = "rejected"
    #: The site did, and does no more, for good.
    REVOKED = "revoked"


@dataclass(frozen=True, kw_only=True)
class SlideRecord:
    """One slide under one set of cohort rules.

    Attributes:
        path: the slide's name, see `io.slide_files`. Never leaves the site, nor reaches a log that does.
        fingerprint: keyed digest of samples of the files' bytes (`slide_files.fingerprint`); empty as long as the slide was not read.
        size: bytes, over all files of the slide.
        mtime_ns: latest modification time of its files, nanoseconds since 1970 UTC.
        scan_key: names the cohort rules the tiles were found under.
        status: what the scan made of it.
        reason: why it is not usable, or None.
        detail: the reason in words, for the site's own eyes, or None.
        patient: the pseudonym, or None when the slide is not in the patient list.
        mpp: um/px of level 0, or None where unknown.
        width: level-0 pixels.
        height: level-0 pixels.
        tile_count: usable tiles.
        tiles: where its tile map lies in the tile index, or None when there are none.
        parts: the slide's files relative to its folder, the one to open first; empty for a slide of one file.
        attempts: how often reading it was begun without coming to an end.
        attributes: what the patient list gives beside the patient (`cohort.patient_list.KEPT`). They never leave the site.
    """

    path: str
    fingerprint: str
    size: int
    mtime_ns: int
    scan_key: Digest
    status: SlideStatus
    reason: ErrorCode | None = None
    detail: str | None = None
    patient: Pseudonym | None = None
    mpp: float | None = None
    width: int = 0
    height: int = 0
    tile_count: int = 0
    tiles: IndexEntry | None = None
    parts: tuple[str, ...] = ()
    attempts: int = 0
    attributes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ScanSummary:
    """How a site stands under one set of cohort rules.

    Attributes:
        slides: slides by status.
        reasons: slides that are not usable, by reason code.
        patients: patients with at least one usable tile.
        tiles: usable tiles.
    """

    slides: dict[SlideStatus, int]
    reasons: dict[ErrorCode, int]
    patients: int
    tiles: int


@dataclass(frozen=True, kw_only=True)
class StoredApproval:
    """A site's word on one plan.

    Attributes:
        plan: digest of the plan.
        signed_plan: the server's envelope around the plan.
        signed_approval: the site's envelope around its word: an `Approval`, or a `Decision` against the plan.
        declared_patients: public lower bound of the cohort's patients that the site declares for this plan; 0 where it approved none.
        at: UTC seconds.
        state: what the word is.
    """

    plan: Digest
    signed_plan: bytes = field(repr=False)
    signed_approval: bytes = field(repr=False)
    declared_patients: int
    at: float
    state: ApprovalState = ApprovalState.APPROVED


@dataclass(frozen=True, kw_only=True)
class Approver:
    """A person who may sign approvals for the site.

    Attributes:
        name: as this site calls the person.
        key: the person's own public key.
        at: UTC seconds since when.
    """

    name: str
    key: VerifyKey
    at: float


@dataclass(frozen=True, kw_only=True)
class ApproverSignature:
    """A person's signature under an approval.

    Attributes:
        plan: digest of the plan.
        approver: the person's name.
        envelope: a DSSE envelope around what was signed (`gate.second_person`).
        at: UTC seconds.
    """

    plan: Digest
    approver: str
    envelope: bytes = field(repr=False)
    at: float


@dataclass(frozen=True, kw_only=True)
class SealedUpdate:
    """One finished round of this site: asked for again, the site answers with these bytes and no others.

    Attributes:
        run: the run.
        round_index: 1 for a run's first round.
        statement: the signed statement's envelope.
        update_path: where the update's bytes lie on this machine.
        update: digest of these bytes.
        at: UTC seconds.
    """

    run: RunName
    round_index: int
    statement: bytes = field(repr=False)
    update_path: str
    update: Digest
    at: float


@dataclass(frozen=True, kw_only=True)
class Event:
    """One line of the site's own log book; it never leaves the site.

    Attributes:
        at: UTC seconds.
        kind: a short word such as `scan`, `approve`, `round`.
        code: the error code it ended with, or None.
        detail: one sentence.
    """

    at: float
    kind: str
    code: ErrorCode | None = None
    detail: str = ""


class WithdrawnMeanwhileError(Exception):
    """Something was withdrawn after the cohort was read: what was computed from it is not sealed."""
