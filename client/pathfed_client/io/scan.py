"""Scanning: from a slides folder and a patient list to the site's cohort.

Guarantees:

- each slide is committed by itself, so a scan that was killed goes on where it was; an unchanged slide is not read again, unless it
  could not be opened or read before (a network share may have been away);
- a bad slide gets a status and a reason code and never stops the rest;
- a slide without a certain patient is not read at all and never trained on; one that is listed in contradiction makes the scan end with an
  error, once all others are done;
- a slide or patient that was withdrawn is not read;
- the plan's cohort rules leave slides out of its report and cohort, not out of the scan: other rules read no slide again;
- slide names go into the report, the site database and debug logs, and nowhere else.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pathfed_client.cohort.cohort import Pseudonym, SlideId
from pathfed_client.cohort.patient_list import Finding
from pathfed_client.io import site_cohort
from pathfed_client.io.listing import NOT_LISTED, ListedSlide, Listing, Out, Placed, read_listing
from pathfed_client.io.openslide_reader import OpenSlideReader
from pathfed_client.io.site_records import Event, SlideRecord, SlideStatus
from pathfed_client.io.site_store import SiteStore
from pathfed_client.io.slide_files import FileState, SlideFiles, file_state, find_slides, fingerprint
from pathfed_client.slides.examine import examine
from pathfed_client.slides.tiling import scan_key
from pathfed_common import digest
from pathfed_common.errors import ErrorCode, SiteDataError
from pathfed_common.plan import CohortPlan

_LOG = logging.getLogger(__name__)
_RETRIED = (ErrorCode.SLIDE_UNOPENABLE, ErrorCode.SLIDE_UNREADABLE)
_UNKNOWN = FileState(size=0, mtime_ns=0)


@dataclass(frozen=True, kw_only=True)
class SlideOutcome:
    """What became of one slide. For the site's own eyes: it names the file."""

    path: str
    status: SlideStatus
    reason: ErrorCode | None
    detail: str | None
    tiles: int


@dataclass(frozen=True, kw_only=True)
class PatientOutcome:
    """A patient of the list without a usable tile."""

    pseudonym: Pseudonym
    lines: tuple[int, ...]
    code: ErrorCode = ErrorCode.PATIENT_WITHOUT_TILE


@dataclass(frozen=True, kw_only=True)
class ScanReport:
    """What a scan found. For the site's own eyes.

    Attributes:
        slides: every slide that is there, or was at the last scan, in order of paths.
        patients: patients with at least one usable tile.
        tiles: usable tiles.
        slides_read: slides opened by this scan; the others were known and unchanged.
        not_found: lines of the list whose slide is not there, or whose name fits several.
        patients_without_tile: patients of the list who cannot take part.
        list_findings: lines of the list that cannot be used, and slides that are out for what the list says of them.
        same_content: pairs of usable slides of different patients with the same bytes: the list may be wrong about one of them.
    """

    slides: tuple[SlideOutcome, ...]
    patients: int
    tiles: int
    slides_read: int
    not_found: tuple[ListedSlide, ...] = ()
    patients_without_tile: tuple[PatientOutcome, ...] = ()
    list_findings: tuple[Finding, ...] = ()
    same_content: tuple[tuple[str, str], ...] = ()

    @property
    def by_status(self) -> dict[SlideStatus, int]:
        """Slides by status."""
        return dict(Counter(slide.status for slide in self.slides))

    @property
    def by_reason(self) -> dict[ErrorCode, int]:
        """Slides that are not usable, by reason code."""
        return dict(Counter(slide.reason for slide in self.slides if slide.reason is not None))

    def to_dict(self) -> dict[str, object]:
        """The report as `--json` prints it."""
        return {**asdict(self), "by_status": self.by_status, "by_reason": self.by_reason}


class ScanEndedError(SiteDataError):
    """A scan that is done and in the database, and that a person must look at; `report` is the whole of it."""

    def __init__(self, error: SiteDataError, report: ScanReport) -> None:
        super().__init__(error.code, error.what, where=error.where, value=error.value, remedy=error.remedy)
        self.report = report


class CohortEmptyError(ScanEndedError):
    """Nothing of what was scanned can be trained on (PF211); `report` says why for each slide."""

    def __init__(self, report: ScanReport, *, where: Path) -> None:
        reasons = ", ".join(f"{code.value} x {count}" for code, count in sorted(report.by_reason.items()))
        error = SiteDataError(ErrorCode.COHORT_EMPTY, "no slide can be trained on", where=where, value=reasons or "no slide")
        super().__init__(error, report)


@dataclass
class _Scan:
    """One scan under way."""

    store: SiteStore
    plan: CohortPlan
    placed: dict[str, Placed]
    out: dict[str, Out]
    known: dict[str, tuple[SlideId, SlideRecord]]
    slides_read: int = field(default=0)

    def visit(self, slide: SlideFiles) -> None:
        """Bring one slide's row up to date."""
        patient = self.placed.get(slide.path)
        try:
            state = file_state(slide.files)
        except OSError as error:
            self._refuse(slide, _UNKNOWN, patient, SiteDataError(ErrorCode.SLIDE_UNOPENABLE, f"cannot be reached: {error.strerror}"))
            return
        number, record = self.known.get(slide.path, (None, None))
        unchanged = record is not None and (record.size, record.mtime_ns) == (state.size, state.mtime_ns)
        if number is not None and record is not None and unchanged and self._settled(record, patient):
            self._restate(number, record, patient)
        elif patient is None:
            out = self.out.get(slide.path, NOT_LISTED)
            self._store(slide, state, None, out.status, out.code, out.detail)
        else:
            self._read(slide, state, patient)

    def _settled(self, record: SlideRecord, patient: Placed | None) -> bool:
        """Whether an unchanged slide's row can be kept without opening the slide."""
        if patient is not None and record.attributes.get("mpp") != patient.attributes.get("mpp"):
            return False
        if patient is None or record.tile_count > 0:
            return True
        return record.status is SlideStatus.REFUSED and record.reason not in _RETRIED

    def _restate(self, number: SlideId, record: SlideRecord, patient: Placed | None) -> None:
        """The slide is as it was; who it belongs to, and what the list says of it, may have changed."""
        if patient is None:
            out = self.out.get(record.path, NOT_LISTED)
            wanted = replace(record, status=out.status, reason=out.code, detail=out.detail, patient=None)
        elif record.tile_count > 0:
            usable = replace(record, status=SlideStatus.USABLE, reason=None, detail=None)
            wanted = replace(usable, patient=patient.patient, attributes=patient.attributes)
        else:
            wanted = replace(record, patient=patient.patient, attributes=patient.attributes)
        if wanted != record:
            self.store.set_slide_state(
                number,
                status=wanted.status,
                reason=wanted.reason,
                detail=wanted.detail,
                patient=wanted.patient,
                attributes=wanted.attributes,
            )

    def _read(self, slide: SlideFiles, state: FileState, patient: Placed) -> None:
        self.slides_read += 1
        try:
            with OpenSlideReader(slide.opened, name=slide.path) as reader:
                facts = examine(reader, self.plan, where=slide.path, mpp_override=patient.mpp)
        except SiteDataError as error:
            self._refuse(slide, state, patient, error)
        except (OSError, MemoryError, ValueError, ArithmeticError) as error:
            # What decoders raise on damaged files they did not foresee; anything else is a bug of ours and may stop the scan.
            self._refuse(slide, state, patient, SiteDataError(ErrorCode.SLIDE_UNREADABLE, f"the slide cannot be read: {error!r}"))
        else:
            record = replace(
                self._record(slide, state, patient, SlideStatus.USABLE),
                mpp=facts.mpp,
                width=facts.width,
                height=facts.height,
                tile_count=len(facts.corners),
                grid=facts.grid,
            )
            self._save(record, facts.corners)

    def _refuse(self, slide: SlideFiles, state: FileState, patient: Placed | None, error: SiteDataError) -> None:
        detail = error.what if error.value is None else f"{error.what}: {error.value}"
        self._store(slide, state, patient, SlideStatus.REFUSED, error.code, detail)

    def _store(
        self, slide: SlideFiles, state: FileState, patient: Placed | None, status: SlideStatus, reason: ErrorCode, detail: str
    ) -> None:
        self._save(replace(self._record(slide, state, patient, status), reason=reason, detail=detail), None)

    def _record(self, slide: SlideFiles, state: FileState, patient: Placed | None, status: SlideStatus) -> SlideRecord:
        try:
            content = fingerprint(slide.files)
        except OSError:
            content = digest.of_bytes(b"")  # the row says already that the slide cannot be opened
        return SlideRecord(
            path=slide.path,
            fingerprint=content,
            size=state.size,
            mtime_ns=state.mtime_ns,
            scan_key=scan_key(self.plan),
            status=status,
            patient=None if patient is None else patient.patient,
            attributes={} if patient is None else patient.attributes,
        )

    def _save(self, record: SlideRecord, corners: NDArray[np.int32] | None) -> None:
        self.store.upsert_slide(record, corners)
        _LOG.debug("slide %s: %s %s, %d tiles", record.path, record.status, record.reason or "", record.tile_count)


def scan(
    store: SiteStore,
    slides_folder: Path,
    patient_list: Path,
    plan: CohortPlan,
    pseudonym_key: bytes,
    progress: Callable[[int, int], None] | None = None,
    *,
    columns: Mapping[str, str] | None = None,
    now: float | None = None,
) -> ScanReport:
    """Bring the site database up to date with a slides folder and a patient list, under one plan's cohort rules.

    Args:
        store: the site database.
        slides_folder: searched with all its subfolders.
        patient_list: CSV, see `cohort.list_file` and `cohort.patient_list`.
        plan: the cohort rules; slides are kept apart by `scan_key(plan)`.
        pseudonym_key: 32 bytes that never leave the site.
        progress: called with (slides done, slides in all) after each slide.
        columns: the list's configured headers, by what they mean (`cohort.list_file`).
        now: UTC seconds, for the log book; None for the present.

    Raises:
        SiteDataError: no slide there (PF201), a list that cannot be read (PF202).
        ScanEndedError: the list gives a slide to two patients (PF203), contradicts itself (PF231) or has a line that cannot be used
            (PF232). The slides concerned are out, all others are done, and the database is up to date.
        CohortEmptyError: nothing can be trained on (PF211); the database is up to date all the same.
        HostError: the disk is full (PF901) or the database fails; slides done so far are kept.
    """
    slides = list_slides(slides_folder)
    listing = read_listing(patient_list, slides, columns)
    placed, out = listing.placed(pseudonym_key, store.withdrawn())
    known = {record.path: (number, record) for number, record in store.slides(scan_key(plan)).items()}
    work = _Scan(store=store, plan=plan, placed=placed, out=out, known=known)
    for done, slide in enumerate(slides, start=1):
        work.visit(slide)
        if progress is not None:
            progress(done, len(slides))
    _mark_missing(work, {slide.path for slide in slides})
    report = _report(work, listing, pseudonym_key)
    _LOG.info("scan: %d slides, %d usable, %d read", len(report.slides), report.by_status.get(SlideStatus.USABLE, 0), report.slides_read)
    ended = _ended(listing, report, slides_folder)
    detail = f"{len(report.slides)} slides, {report.patients} patients, {report.tiles} tiles, {report.slides_read} slides read"
    code = None if ended is None else ended.code
    store.add_event(Event(at=time.time() if now is None else now, kind="scan", code=code, detail=detail))
    if ended is not None:
        raise ended
    return report


def _ended(listing: Listing, report: ScanReport, slides_folder: Path) -> ScanEndedError | None:
    """What a person must look at: what is wrong with the list before what follows from it."""
    if listing.error is not None:
        return ScanEndedError(listing.error, report)
    return CohortEmptyError(report, where=slides_folder) if report.patients == 0 else None


def list_slides(folder: Path) -> list[SlideFiles]:
    """All slides of a slides folder, in order of their paths.

    Raises:
        SiteDataError: there is none, or a folder cannot be listed (PF201).
    """
    try:
        slides = find_slides(folder)
    except OSError as error:
        raise SiteDataError(
            ErrorCode.SLIDE_FOLDER_EMPTY, f"the slides folder cannot be listed: {error.strerror}", where=error.filename or folder
        ) from error
    if not slides:
        raise SiteDataError(ErrorCode.SLIDE_FOLDER_EMPTY, "there is no slide in the slides folder", where=folder)
    return slides


def _mark_missing(work: _Scan, there: set[str]) -> None:
    for path, (number, record) in work.known.items():
        if path not in there and record.status is not SlideStatus.MISSING:
            work.store.set_slide_state(
                number,
                status=SlideStatus.MISSING,
                reason=ErrorCode.SLIDE_MISSING,
                detail="no longer in the slides folder",
                patient=record.patient,
            )


def _report(work: _Scan, listing: Listing, key: bytes) -> ScanReport:
    records = list(site_cohort.records(work.store, work.plan, key).values())
    usable = [record for record in records if record.status is SlideStatus.USABLE]
    able = {record.patient for record in usable}
    without = [(name, lines) for name, lines in listing.lines_by_patient(key).items() if name not in able]
    return ScanReport(
        slides=tuple(
            SlideOutcome(path=record.path, status=record.status, reason=record.reason, detail=record.detail, tiles=record.tile_count)
            for record in records
        ),
        patients=len(able),
        tiles=sum(record.tile_count for record in usable),
        slides_read=work.slides_read,
        not_found=listing.not_found,
        patients_without_tile=tuple(PatientOutcome(pseudonym=name, lines=lines) for name, lines in without),
        list_findings=listing.findings,
        same_content=_same_content(usable),
    )


def _same_content(records: list[SlideRecord]) -> tuple[tuple[str, str], ...]:
    first: dict[str, SlideRecord] = {}
    pairs = []
    for record in records:
        earlier = first.setdefault(record.fingerprint, record)
        if earlier.patient != record.patient:
            pairs.append((earlier.path, record.path))
    return tuple(pairs)
