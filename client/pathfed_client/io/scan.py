"""Scanning: from a slides folder and a patient list to the site's cohort.

Guarantees:

- each slide is committed by itself, so a scan that was killed goes on where it was; an unchanged slide is not read again, unless it
  could not be opened or read before (a network share may have been away);
- a bad slide gets a status and a reason code and never stops the rest;
- a slide that is not in the patient list is not read at all and never trained on;
- slide names go into the report, the site database and debug logs, and nowhere else.
"""

import logging
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

from pathfed_client.cohort.cohort import Pseudonym, SlideId
from pathfed_client.cohort.patient_list import Matching, PatientRow, decode_patient_list, match, parse_patient_list, pseudonym
from pathfed_client.io.direct_reader import trusted_level
from pathfed_client.io.openslide_reader import OpenSlideReader
from pathfed_client.io.site_records import Event, SlideRecord, SlideStatus
from pathfed_client.io.site_store import SiteStore
from pathfed_client.io.slide_files import FileState, SlideFiles, file_state, find_slides, fingerprint
from pathfed_client.io.tile_index import IndexEntry, TileIndex, TileIndexWriter, index_file
from pathfed_client.slides.examine import examine
from pathfed_client.slides.filters import FilteredSlideError, FilterReport, FilterWarning, filter_warnings
from pathfed_client.slides.tile_map import DamagedMapError, TileMap
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
class ListedSlide:
    """A line of the patient list that could not be laid to one slide."""

    slide: str
    line: int
    code: ErrorCode = ErrorCode.SLIDE_MISSING
    ambiguous: bool = False


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
        same_content: pairs of usable slides of different patients with the same bytes: the list may be wrong about one of them.
        filters: what the quality filters removed of each slide opened by this scan that shows tissue.
        filter_warnings: filters that removed nearly everything of a slide, or of all those slides together.
    """

    slides: tuple[SlideOutcome, ...]
    patients: int
    tiles: int
    slides_read: int
    not_found: tuple[ListedSlide, ...] = ()
    patients_without_tile: tuple[PatientOutcome, ...] = ()
    same_content: tuple[tuple[str, str], ...] = ()
    filters: dict[str, FilterReport] = field(default_factory=dict)
    filter_warnings: tuple[FilterWarning, ...] = ()

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


class CohortEmptyError(SiteDataError):
    """Nothing of what was scanned can be trained on (PF211); `report` says why for each slide."""

    def __init__(self, report: ScanReport, *, where: Path) -> None:
        reasons = ", ".join(f"{code.value} x {count}" for code, count in sorted(report.by_reason.items()))
        super().__init__(ErrorCode.COHORT_EMPTY, "no slide can be trained on", where=where, value=reasons or "no slide")
        self.report = report


@dataclass
class _Scan:
    """One scan under way."""

    store: SiteStore
    index: TileIndexWriter
    maps: TileIndex
    plan: CohortPlan
    patients: dict[str, Pseudonym]
    known: dict[str, tuple[SlideId, SlideRecord]]
    slides_read: int = field(default=0)
    filters: dict[str, FilterReport] = field(default_factory=dict)

    def visit(self, slide: SlideFiles) -> None:
        """Bring one slide's row up to date."""
        patient = self.patients.get(slide.path)
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
            self._store(slide, state, None, SlideStatus.UNMAPPED, ErrorCode.SLIDE_UNMAPPED, "not in the patient list")
        else:
            self._read(slide, state, patient)

    def _settled(self, record: SlideRecord, patient: Pseudonym | None) -> bool:
        """Whether an unchanged slide's row can be kept without opening the slide."""
        if patient is None:
            return True
        if record.tiles is not None:
            return self._is_indexed(record.tiles)
        return record.status is SlideStatus.REFUSED and record.reason not in _RETRIED

    def _is_indexed(self, entry: IndexEntry) -> bool:
        """Whether a slide's tile map is as it was written. One that is damaged costs that slide another reading."""
        try:
            self.maps.read(entry)
        except DamagedMapError:
            return False
        return True

    def _restate(self, number: SlideId, record: SlideRecord, patient: Pseudonym | None) -> None:
        """The slide is as it was; who it belongs to may have changed."""
        if patient is None:
            wanted = replace(
                record, status=SlideStatus.UNMAPPED, reason=ErrorCode.SLIDE_UNMAPPED, detail="not in the patient list", patient=None
            )
        elif record.tile_count > 0:
            wanted = replace(record, status=SlideStatus.USABLE, reason=None, detail=None, patient=patient)
        else:
            wanted = replace(record, patient=patient)
        if wanted != record:
            self.store.set_slide_state(number, status=wanted.status, reason=wanted.reason, detail=wanted.detail, patient=wanted.patient)

    def _read(self, slide: SlideFiles, state: FileState, patient: Pseudonym) -> None:
        self.slides_read += 1
        try:
            with OpenSlideReader(slide.opened, name=slide.path) as reader:
                facts = examine(reader, self.plan, where=slide.path, native=partial(trusted_level, reader, slide.files, slide.path))
        except SiteDataError as error:
            if isinstance(error, FilteredSlideError):
                self.filters[slide.path] = error.report
            self._refuse(slide, state, patient, error)
        except (OSError, MemoryError, ValueError, ArithmeticError) as error:
            # What decoders raise on damaged files they did not foresee; anything else is a bug of ours and may stop the scan.
            self._refuse(slide, state, patient, SiteDataError(ErrorCode.SLIDE_UNREADABLE, f"the slide cannot be read: {error!r}"))
        else:
            self.filters[slide.path] = facts.filters
            record = replace(
                self._record(slide, state, patient, SlideStatus.USABLE),
                mpp=facts.mpp,
                width=facts.width,
                height=facts.height,
            )
            self._save(record, facts.tiles)

    def _refuse(self, slide: SlideFiles, state: FileState, patient: Pseudonym | None, error: SiteDataError) -> None:
        detail = error.what if error.value is None else f"{error.what}: {error.value}"
        self._store(slide, state, patient, SlideStatus.REFUSED, error.code, detail)

    def _store(
        self, slide: SlideFiles, state: FileState, patient: Pseudonym | None, status: SlideStatus, reason: ErrorCode, detail: str
    ) -> None:
        self._save(replace(self._record(slide, state, patient, status), reason=reason, detail=detail), None)

    def _record(self, slide: SlideFiles, state: FileState, patient: Pseudonym | None, status: SlideStatus) -> SlideRecord:
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
            patient=patient,
        )

    def _save(self, record: SlideRecord, tiles: TileMap | None) -> None:
        """Put a slide's tiles into the index, then the slide into the database."""
        if tiles is not None:
            record = replace(record, tile_count=len(tiles), tiles=self.index.add(tiles))
            self.index.sync()
        self.store.upsert_slide(record)
        _LOG.debug("slide %s: %s %s, %d tiles", record.path, record.status, record.reason or "", record.tile_count)


def scan(
    store: SiteStore,
    slides_folder: Path,
    patient_list: Path,
    plan: CohortPlan,
    pseudonym_key: bytes,
    progress: Callable[[int, int], None] | None = None,
    *,
    now: float | None = None,
) -> ScanReport:
    """Bring the site database up to date with a slides folder and a patient list, under one plan's cohort rules.

    Args:
        store: the site database.
        slides_folder: searched with all its subfolders.
        patient_list: CSV, see `cohort.patient_list`.
        plan: the cohort rules; slides are kept apart by `scan_key(plan)`.
        pseudonym_key: 32 bytes that never leave the site.
        progress: called with (slides done, slides in all) after each slide.
        now: UTC seconds, for the log book; None for the present.

    Raises:
        SiteDataError: no slide there (PF201), a list that cannot be used (PF202) or lists a slide twice (PF203).
        CohortEmptyError: nothing can be trained on (PF211); the database is up to date all the same.
        HostError: the disk is full (PF901) or the database fails; slides done so far are kept.
    """
    slides = _slides(slides_folder)
    rows = _rows(patient_list)
    matching = match(rows, {slide.path: slide.names for slide in slides}, where=str(patient_list))
    key = scan_key(plan)
    index = index_file(store.tile_folder, key)
    with TileIndexWriter(index) as writer, TileIndex(index) as maps:
        work = _Scan(
            store=store,
            index=writer,
            maps=maps,
            plan=plan,
            patients={path: pseudonym(pseudonym_key, row.patient) for path, row in matching.patients.items()},
            known={record.path: (number, record) for number, record in store.slides(key).items()},
        )
        for done, slide in enumerate(slides, start=1):
            work.visit(slide)
            if progress is not None:
                progress(done, len(slides))
    _mark_missing(work, {slide.path for slide in slides})
    report = _report(work, rows, matching, pseudonym_key)
    _LOG.info("scan: %d slides, %d usable, %d read", len(report.slides), report.by_status.get(SlideStatus.USABLE, 0), report.slides_read)
    empty = report.patients == 0
    store.add_event(
        Event(
            at=time.time() if now is None else now,
            kind="scan",
            code=ErrorCode.COHORT_EMPTY if empty else None,
            detail=f"{len(report.slides)} slides, {report.patients} patients, {report.tiles} tiles, {report.slides_read} slides read",
        )
    )
    if empty:
        raise CohortEmptyError(report, where=slides_folder)
    return report


def _slides(folder: Path) -> list[SlideFiles]:
    try:
        slides = find_slides(folder)
    except OSError as error:
        raise SiteDataError(
            ErrorCode.SLIDE_FOLDER_EMPTY, f"the slides folder cannot be listed: {error.strerror}", where=error.filename or folder
        ) from error
    if not slides:
        raise SiteDataError(ErrorCode.SLIDE_FOLDER_EMPTY, "there is no slide in the slides folder", where=folder)
    return slides


def _rows(path: Path) -> tuple[PatientRow, ...]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SiteDataError(ErrorCode.PATIENT_LIST_UNREADABLE, f"the patient list cannot be read: {error.strerror}", where=path) from error
    return parse_patient_list(decode_patient_list(data, where=str(path)), where=str(path))


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


def _report(work: _Scan, rows: tuple[PatientRow, ...], matching: Matching, key: bytes) -> ScanReport:
    records = list(work.store.slides(scan_key(work.plan)).values())
    usable = [record for record in records if record.status is SlideStatus.USABLE]
    able = {record.patient for record in usable}
    lines: defaultdict[Pseudonym, list[int]] = defaultdict(list)
    for row in rows:
        lines[pseudonym(key, row.patient)].append(row.line)
    not_found = [ListedSlide(slide=row.slide, line=row.line) for row in matching.missing]
    not_found += [ListedSlide(slide=row.slide, line=row.line, ambiguous=True) for row in matching.ambiguous]
    return ScanReport(
        slides=tuple(
            SlideOutcome(path=record.path, status=record.status, reason=record.reason, detail=record.detail, tiles=record.tile_count)
            for record in records
        ),
        patients=len(able),
        tiles=sum(record.tile_count for record in usable),
        slides_read=work.slides_read,
        not_found=tuple(sorted(not_found, key=lambda entry: entry.line)),
        patients_without_tile=tuple(
            PatientOutcome(pseudonym=name, lines=tuple(where)) for name, where in lines.items() if name not in able
        ),
        same_content=_same_content(usable),
        filters=work.filters,
        filter_warnings=filter_warnings(work.filters),
    )


def _same_content(records: list[SlideRecord]) -> tuple[tuple[str, str], ...]:
    first: dict[str, SlideRecord] = {}
    pairs = []
    for record in records:
        earlier = first.setdefault(record.fingerprint, record)
        if earlier.patient != record.patient:
            pairs.append((earlier.path, record.path))
    return tuple(pairs)
