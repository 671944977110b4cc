"""Scanning: from slide folders and a patient list to the site's cohort.

Guarantees:

- results are committed as they come, so a scan that was killed goes on where it was; an unchanged slide is not read again, unless it
  could not be opened or read before (a network share may have been away), and a slide that only moved is not either;
- a bad slide gets a status and a reason code and never stops the rest, be it one that crashes or hangs its decoder; one that was begun
  `MOST_ATTEMPTS` times without coming to an end, because it took the whole machine with it, is not begun again;
- a slide without a certain patient is not read at all and never trained on; one that is listed in contradiction makes the scan end with an
  error, once all others are done;
- a slide or patient that was withdrawn is not read;
- the plan's cohort rules leave slides out of its report and cohort, not out of the scan: other rules read no slide again;
- a folder that is out of reach says nothing about its slides: they stay as they were;
- what is found does not depend on the executor: slides are numbered in order of their paths before the first one is read;
- slide names go into the report, the site database and debug logs, and nowhere else.
"""

import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from pathfed_client.io.listing import Listing, Placed, read_listing
from pathfed_client.io.scan_planning import MOST_ATTEMPTS, Inventory, Settling, plan_scan
from pathfed_client.io.scan_reading import InlineExecutor, SlideExecutor, SlideReading, SlideTask
from pathfed_client.io.scan_report import CohortEmptyError, PatientOutcome, ScanEndedError, ScanReport, SlideOutcome, UnreachableFolder
from pathfed_client.io.scan_rows import SlideRows
from pathfed_client.io.site_cohort import judged
from pathfed_client.io.site_records import Event, SlideStatus
from pathfed_client.io.site_store import SiteStore
from pathfed_client.io.slide_files import Folders, SlideFiles, check_folders, fingerprint_key, labelled, slide_names, under
from pathfed_client.io.slide_listing import Heads, list_slides, no_slide
from pathfed_client.io.tile_index import TileIndexWriter, index_file
from pathfed_client.slides.filters import FilterReport, filter_warnings
from pathfed_client.slides.tiling import scan_key
from pathfed_common.errors import ErrorCode, HostError, SiteDataError
from pathfed_common.plan import CohortPlan

__all__ = ["MOST_ATTEMPTS", "CohortEmptyError", "ScanEndedError", "ScanMemory", "ScanReport", "scan"]

_LOG = logging.getLogger(__name__)
#: Readings are committed this often, seconds, where several slides are read at once; a flush to the disk costs as much as a small slide.
_COMMIT_S = 0.1
_LEASE = 16  # slides noted as begun ahead of time, for each slot


@dataclass(kw_only=True)
class ScanMemory:
    """What scans of the same folders keep between them: a single scan needs none.

    Attributes:
        settling: which slides are still being written.
        heads: series of the DICOM files seen.
        retry: whether slides that could not be read are tried again though they have not changed.
    """

    settling: Settling = field(default_factory=Settling)
    heads: Heads = field(default_factory=dict)
    retry: bool = True


@dataclass
class _Reading:
    """The reading part of one scan."""

    rows: SlideRows
    executor: SlideExecutor
    plan: CohortPlan
    key: bytes
    placed: Mapping[str, Placed]
    progress: Callable[[], None]
    queue: deque[SlideFiles]
    read: int = 0
    left: list[str] = field(default_factory=list)
    filters: dict[str, FilterReport] = field(default_factory=dict)
    _leased: deque[SlideFiles] = field(default_factory=deque)
    _begun: dict[int, SlideFiles] = field(default_factory=dict)
    _unsaid: int = 0
    _committed: float = field(default_factory=time.monotonic)

    def run(self) -> None:
        """Read the queue; every reading that came back is in the database when this returns or raises."""
        try:
            while self.queue or self._leased or self._begun:
                self._fill()
                for reading in self.executor.finished():
                    self._take(reading)
                if self.executor.slots == 1 or time.monotonic() - self._committed >= _COMMIT_S:
                    self._commit()
        except BaseException:
            with contextlib.suppress(HostError):  # the disk may be what failed
                self._commit()
                self.rows.undo_begin(slide.path for slide in (*self._leased, *self._begun.values()))
            raise
        self._commit()

    def _fill(self) -> None:
        while len(self._begun) < self.executor.slots and (self._leased or self.queue):
            if not self._leased:
                self._lease()
            slide = self._leased.popleft()
            number = self.rows.numbers[slide.path]
            self._begun[number] = slide
            self.executor.submit(
                SlideTask(
                    number=number,
                    name=slide.path,
                    files=slide.files,
                    state=slide.state,
                    plan=self.plan,
                    key=self.key,
                    mpp_override=self.placed[slide.path].mpp,
                )
            )

    def _lease(self) -> None:
        """Note the next slides as begun: many fresh ones at once, but one alone of those that did not come to an end before."""
        self._commit()
        many = _LEASE * self.executor.slots
        while self.queue and len(self._leased) < many:
            if self._suspect(self.queue[0]) and self._leased:
                break
            self._leased.append(self.queue.popleft())
            if self._suspect(self._leased[-1]):
                break
        self.rows.begin(slide.path for slide in self._leased)

    def _suspect(self, slide: SlideFiles) -> bool:
        return self.rows.records[slide.path].attempts > 0

    def _take(self, reading: SlideReading) -> None:
        slide = self._begun.pop(reading.number)
        record = replace(self.rows.records[slide.path], fingerprint=reading.fingerprint)
        self.read += 1
        self._unsaid += 1
        if reading.filters is not None and not reading.unsettled:
            self.filters[slide.path] = reading.filters
        if reading.unsettled:
            self.left.append(slide.path)
            self.rows.undo_begin([slide.path])
        elif reading.facts is not None:
            self.rows.replace(record, reading.facts)
        else:
            blamed = reading.code in (ErrorCode.SLIDE_CRASHED, ErrorCode.SLIDE_TIMEOUT)
            attempts = record.attempts if blamed else 0
            self.rows.replace(
                replace(record, status=SlideStatus.REFUSED, reason=reading.code, detail=reading.detail, attempts=attempts, tile_count=0)
            )
        _LOG.debug("slide %s: %s", slide.path, reading.code or "read")

    def _commit(self) -> None:
        self.rows.flush()
        self._committed = time.monotonic()
        for _ in range(self._unsaid):
            self._unsaid -= 1
            self.progress()


def scan(
    store: SiteStore,
    slides_folder: Folders,
    patient_list: Path,
    plan: CohortPlan,
    pseudonym_key: bytes,
    progress: Callable[[int, int], None] | None = None,
    *,
    columns: Mapping[str, str] | None = None,
    now: float | None = None,
    executor: SlideExecutor | None = None,
    memory: ScanMemory | None = None,
) -> ScanReport:
    """Bring the site database up to date with slide folders and a patient list, under one plan's cohort rules.

    Args:
        store: the site database.
        slides_folder: one folder or several, searched with all their subfolders.
        patient_list: CSV, see `cohort.list_file` and `cohort.patient_list`.
        plan: the cohort rules; slides are kept apart by `scan_key(plan)`.
        pseudonym_key: 32 bytes that never leave the site.
        progress: called with (slides done, slides in all) after each slide, once it is committed.
        columns: the list's configured headers, by what they mean (`cohort.list_file`).
        now: UTC seconds, for the log book; None for the present.
        executor: where slides are read; None for this process, one after the other.
        memory: of earlier scans of the same folders, or None.

    Raises:
        SiteDataError: no slide there (PF201), folders that overlap (PF217), a list that cannot be read (PF202).
        ScanEndedError: the list gives a slide to two patients (PF203), contradicts itself (PF231) or has a line that cannot be used
            (PF232). The slides concerned are out, all others are done, and the database is up to date.
        CohortEmptyError: nothing can be trained on (PF211); the database is up to date all the same.
        HostError: the disk is full (PF901), the database fails, or the executor does (PF903, PF908); slides done so far are kept.
    """
    site = _Site(store, labelled(slides_folder), patient_list, dict(columns or {}), plan, pseudonym_key)
    with TileIndexWriter(index_file(store.tile_folder, scan_key(plan))) as index:
        report, wrong = _scan(site, SlideRows(store, scan_key(plan), index), progress, executor or InlineExecutor(), memory or ScanMemory())
    ended = _ended(site, report, wrong)
    _book(store, report, None if ended is None else ended.code, time.time() if now is None else now)
    if ended is not None:
        raise ended
    return report


@dataclass(frozen=True)
class _Site:
    """What a scan looks at.

    Attributes:
        store: the site database.
        folders: slide folders by their labels.
        patient_list: where the list lies.
        columns: its configured headers.
        plan: the cohort rules.
        key: of the pseudonyms.
    """

    store: SiteStore
    folders: Mapping[str, Path]
    patient_list: Path
    columns: Mapping[str, str]
    plan: CohortPlan
    key: bytes = field(repr=False)


def _scan(
    site: _Site, rows: SlideRows, progress: Callable[[int, int], None] | None, executor: SlideExecutor, memory: ScanMemory
) -> tuple[ScanReport, SiteDataError | None]:
    """The report, and what is wrong with the list."""
    key = fingerprint_key(site.key)
    inventory = _inventory(site.folders, rows, memory)
    kept = {path: slide_names(path, rows.records[path].parts) for path in inventory.kept}
    listing = read_listing(site.patient_list, {slide.path: slide.names for slide in inventory.slides} | kept, site.columns)
    placed, out = listing.placed(site.key, site.store.withdrawn())
    planned = plan_scan(rows, inventory, {**out, **placed}, key, settling=memory.settling, retry=memory.retry)
    said = _counter(progress, len(inventory.slides), len(inventory.slides) - len(planned.queue))
    reading = _Reading(rows, executor, site.plan, key, placed, said, deque(planned.queue))
    reading.run()
    report = replace(
        _report(rows, listing, site),
        slides_read=reading.read,
        slides_moved=planned.moved,
        unreachable=tuple(UnreachableFolder(folder=place, detail=why) for place, why in inventory.unlisted.items()),
        left=tuple(sorted([*planned.left, *reading.left])),
        filters=reading.filters,
        filter_warnings=filter_warnings(reading.filters),
    )
    return report, listing.error


def _ended(site: _Site, report: ScanReport, wrong: SiteDataError | None) -> ScanEndedError | None:
    """What a person must look at: what is wrong with the list before what follows from it."""
    if wrong is not None:
        return ScanEndedError(wrong, report)
    return CohortEmptyError(report, where=next(iter(site.folders.values()))) if report.patients == 0 else None


def _counter(progress: Callable[[int, int], None] | None, total: int, known: int) -> Callable[[], None]:
    """Says one slide more each time it is called; the known slides at once."""
    done = known

    def said() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    if progress is not None and known:
        progress(known, total)
    return said


def _inventory(places: Mapping[str, Path], rows: SlideRows, memory: ScanMemory) -> Inventory:
    """What is there now, and which rows nothing can be said about."""
    folders = list(places.values())
    check_folders(folders)
    listing = list_slides(folders, memory.heads)
    unlisted = dict(listing.unlisted)
    held = {path.rpartition("//")[0] for path in rows.records}
    filled = {slide.path.rpartition("//")[0] for slide in listing.slides}
    unlisted |= {
        f"{label}//": "it is empty, and held slides before"
        for label in places
        if len(places) > 1 and label in held and label not in filled and f"{label}//" not in unlisted
    }
    if not listing.slides:
        raise no_slide(unlisted, folders)
    there = {slide.path for slide in listing.slides}
    kept = [path for path in rows.records if path not in there and _unknown(path, unlisted, places)]
    return Inventory(listing.slides, tuple(kept), unlisted)


def _unknown(path: str, unlisted: Mapping[str, str], places: Mapping[str, Path]) -> bool:
    """Whether a slide that was not found may be there all the same: its folder, or the one it was in before, is out of reach."""
    return bool(unlisted) and (under(path, unlisted) or path.rpartition("//")[0] not in places)


def _book(store: SiteStore, report: ScanReport, code: ErrorCode | None, at: float) -> None:
    _LOG.info("scan: %d slides, %d usable, %d read", len(report.slides), report.by_status.get(SlideStatus.USABLE, 0), report.slides_read)
    detail = f"{len(report.slides)} slides, {report.patients} patients, {report.tiles} tiles, {report.slides_read} slides read"
    store.add_event(Event(at=at, kind="scan", code=code, detail=detail))


def _report(rows: SlideRows, listing: Listing, site: _Site) -> ScanReport:
    """The slides as the plan sees them: less what its rules leave out, less what was withdrawn meanwhile."""
    withdrawn = site.store.withdrawn()
    records = [judged(rows.records[path], site.plan, withdrawn, site.key) for path in sorted(rows.records)]
    usable = [record for record in records if record.status is SlideStatus.USABLE]
    able = {record.patient for record in usable}
    without = [(name, lines) for name, lines in listing.lines_by_patient(site.key).items() if name not in able]
    return ScanReport(
        slides=tuple(
            SlideOutcome(path=record.path, status=record.status, reason=record.reason, detail=record.detail, tiles=record.tile_count)
            for record in records
        ),
        patients=len(able),
        tiles=sum(record.tile_count for record in usable),
        slides_read=0,
        not_found=listing.not_found,
        patients_without_tile=tuple(PatientOutcome(pseudonym=name, lines=lines) for name, lines in without),
        list_findings=listing.findings,
        same_content=rows.same_content(),
    )
