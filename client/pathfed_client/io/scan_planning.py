"""What a scan has to do: the listing laid against the rows of earlier scans, before a slide is read.

| slide in the listing | its row | what becomes of it |
| --- | --- | --- |
| as it was | settled | kept; its patient and attributes are brought up to date |
| as it was | another resolution is listed | read, under a new number |
| as it was | never read | read, begun `MOST_ATTEMPTS` times at most where reading came to no end |
| as it was | could not be read | the same, unless the scan before was interrupted: what it had not read comes first |
| new place | another row's content, whose file is gone | that row moves here, with number and tiles |
| new, or size or time changed | | read, under a new number |
| without a certain patient, or withdrawn | | listed as such, not read |
| still being written | | left for the next scan |
"""

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from pathfed_client.io.listing import NOT_LISTED, Out, Placed
from pathfed_client.io.scan_rows import SlideRows
from pathfed_client.io.site_records import SlideRecord, SlideStatus
from pathfed_client.io.slide_files import UNREACHED, FileState, SlideFiles, fingerprint
from pathfed_common.errors import ErrorCode

#: How often reading a slide is begun that does not come to an end: it crashes, hangs, or takes the machine with it.
MOST_ATTEMPTS = 3

_AWAY = (ErrorCode.SLIDE_UNOPENABLE, ErrorCode.SLIDE_UNREADABLE)  # a network share may have been
_ENDLESS = (ErrorCode.SLIDE_CRASHED, ErrorCode.SLIDE_TIMEOUT)


@dataclass(frozen=True)
class Inventory:
    """What lies in the slide folders, and what is known of it.

    Attributes:
        slides: in order of their paths.
        kept: paths of rows whose folders are out of reach.
        unlisted: those folders, with the reason.
    """

    slides: Sequence[SlideFiles]
    kept: Sequence[str]
    unlisted: Mapping[str, str]


@dataclass(kw_only=True)
class Settling:
    """Tells which slides are still being written: their size or time has moved within the last seconds.

    Attributes:
        seconds: how long a slide must have been at rest; 0 takes every slide as it is.
    """

    seconds: float = 0.0
    _seen: dict[str, tuple[FileState, float]] = field(default_factory=dict)

    def at_rest(self, slide: SlideFiles, *, wall_s: float, clock_s: float) -> bool:
        """Whether a slide can be read: its time says so, or it was seen as it is long enough ago (a share's clock may be ahead).

        Args:
            slide: as it was listed now.
            wall_s: the present, UTC seconds.
            clock_s: the present of a clock that never jumps, seconds.
        """
        if wall_s - slide.state.mtime_ns / 1e9 >= self.seconds:
            self._seen.pop(slide.path, None)
            return True
        state, since = self._seen.get(slide.path, (None, 0.0))
        if state != slide.state:
            self._seen[slide.path] = (slide.state, clock_s)
            return self.seconds == 0
        return clock_s - since >= self.seconds


@dataclass(frozen=True)
class ScanPlan:
    """What is left to do.

    Attributes:
        queue: slides to read: fresh ones in order of their paths, then those that did not come to an end before, the oftenest last.
        moved: rows that were moved.
        left: slides still being written.
    """

    queue: Sequence[SlideFiles]
    moved: int
    left: Sequence[str]


def plan_scan(
    rows: SlideRows,
    inventory: Inventory,
    listed: Mapping[str, Placed | Out],
    key: bytes,
    *,
    settling: Settling,
    retry: bool,
) -> ScanPlan:
    """Bring rows up to date as far as no slide must be read for it, and say which must.

    Args:
        rows: of earlier scans; changed here, and in the database when this returns.
        inventory: what is there now.
        listed: what the patient list says of each slide, by path.
        key: of the site's fingerprints.
        settling: tells slides that are still being written.
        retry: whether slides that could not be read are tried again.
    """
    wall, clock = time.time(), time.monotonic()
    fresh = [slide for slide in inventory.slides if not _same(rows.records.get(slide.path), slide)]
    left = {slide.path for slide in fresh if slide.state != UNREACHED and not settling.at_rest(slide, wall_s=wall, clock_s=clock)}
    moved = _moved(rows, inventory, [slide for slide in fresh if slide.path not in left], key)
    rows.move(moved)
    retry = retry and not _interrupted(rows, inventory)
    queue = []
    for slide in inventory.slides:
        if slide.path in left:
            continue
        record, said = rows.records.get(slide.path), listed.get(slide.path, NOT_LISTED)
        if record is not None and _same(record, slide) and not _other_mpp(record, said):
            if _keep(rows, slide, said, retry=retry):
                queue.append(slide)
        elif _add(rows, slide, said):
            queue.append(slide)
    _lay_aside(rows, inventory, listed)
    rows.flush()
    queue.sort(key=lambda slide: rows.records[slide.path].attempts)
    return ScanPlan(queue, len(moved), sorted(left))


def _interrupted(rows: SlideRows, inventory: Inventory) -> bool:
    """Whether the scan before this one left slides to read. Then those that it could not read wait until all have had their turn."""
    records = ((rows.records.get(slide.path), slide) for slide in inventory.slides)
    return any(record is not None and record.status is SlideStatus.PENDING and _same(record, slide) for record, slide in records)


def _same(record: SlideRecord | None, slide: SlideFiles) -> bool:
    return record is not None and (record.size, record.mtime_ns) == (slide.state.size, slide.state.mtime_ns)


def _moved(rows: SlideRows, inventory: Inventory, fresh: Sequence[SlideFiles], key: bytes) -> dict[str, SlideRecord]:
    """Rows by their old paths, as they are where their content was found again. Only slides of a vanished row's size are looked into."""
    there = {slide.path: slide for slide in inventory.slides}
    kept = set(inventory.kept)
    candidates: defaultdict[int, dict[str, list[str]]] = defaultdict(dict)
    for path in sorted(rows.records, reverse=True):
        record = rows.records[path]
        vanished = path not in kept and (path not in there or not _same(record, there[path]))
        if vanished and record.fingerprint:
            candidates[record.size].setdefault(record.fingerprint, []).append(path)
    moved: dict[str, SlideRecord] = {}
    for slide in fresh:
        contents = candidates.get(slide.state.size)
        if not contents or (slide.path in rows.records and slide.state.size == rows.records[slide.path].size):
            continue  # a file changed in place is read again: samples do not prove that it is what it was
        try:
            olds = contents.get(fingerprint(slide.files, key), [])
        except OSError:
            continue
        if olds:
            old = olds.pop()
            moved[old] = replace(rows.records[old], path=slide.path, parts=slide.parts, mtime_ns=slide.state.mtime_ns)
    while blocked := {old for old, record in moved.items() if record.path in rows.records and record.path not in moved}:
        moved = {old: record for old, record in moved.items() if old not in blocked}  # another slide's row is there still
    return moved


def _other_mpp(record: SlideRecord, said: Placed | Out) -> bool:
    """Whether the list gives another resolution than the slide was read with, or was to be read with."""
    return isinstance(said, Placed) and record.attributes.get("mpp") != said.attributes.get("mpp")


def _keep(rows: SlideRows, slide: SlideFiles, said: Placed | Out, *, retry: bool) -> bool:
    """A slide that is as it was. Returns whether it must be read."""
    record = rows.records[slide.path]
    if isinstance(said, Out) or record.tile_count > 0 or _is_settled(record):
        rows.assign(slide.path, said)
        return False
    if record.attempts >= MOST_ATTEMPTS:
        code = record.reason if record.reason in _ENDLESS else ErrorCode.SLIDE_CRASHED
        detail = f"reading it was begun {record.attempts} times and came to no end"
        rows.replace(
            replace(record, status=SlideStatus.REFUSED, reason=code, detail=detail, patient=said.patient, attributes=said.attributes)
        )
        return False
    if record.status is SlideStatus.REFUSED and record.reason is not ErrorCode.SLIDE_WITHDRAWN:
        rows.assign(slide.path, said)
        return retry
    wanted = replace(record, status=SlideStatus.PENDING, reason=None, detail=None, patient=said.patient, attributes=said.attributes)
    if wanted != record:
        rows.replace(wanted)
    return True


def _is_settled(record: SlideRecord) -> bool:
    """Whether a slide without tiles was read and would be refused again."""
    return record.status is SlideStatus.REFUSED and record.reason not in (*_AWAY, *_ENDLESS, ErrorCode.SLIDE_WITHDRAWN)


def _add(rows: SlideRows, slide: SlideFiles, said: Placed | Out) -> bool:
    """A slide that is new or has changed. Returns whether it must be read."""
    record = SlideRecord(
        path=slide.path,
        fingerprint="",
        size=slide.state.size,
        mtime_ns=slide.state.mtime_ns,
        scan_key=rows.scan_key,
        status=SlideStatus.PENDING,
        parts=slide.parts,
    )
    if isinstance(said, Out):
        rows.replace(replace(record, status=said.status, reason=said.code, detail=said.detail))
        return False
    rows.replace(replace(record, patient=said.patient, attributes=said.attributes))
    return True


def _lay_aside(rows: SlideRows, inventory: Inventory, listed: Mapping[str, Placed | Out]) -> None:
    """Rows without a slide in the listing: missing, never read and gone, or out of reach, of which only what is listed can have changed."""
    there, kept = {slide.path for slide in inventory.slides}, set(inventory.kept)
    gone = []
    for path in sorted(set(rows.records) - there):
        record = rows.records[path]
        if path in kept:
            said = listed.get(path, NOT_LISTED)
            if record.status is not SlideStatus.MISSING and (record.tile_count > 0 or isinstance(said, Out)):
                rows.assign(path, said if isinstance(said, Out) else _as_read(record, said))
        elif record.fingerprint == "":
            gone.append(path)
        elif record.status is not SlideStatus.MISSING:
            rows.miss(path)
    rows.forget(gone)


def _as_read(record: SlideRecord, said: Placed) -> Placed:
    """What the list says, but for the resolution that the slide was read with: another one counts once it can be read again."""
    attributes = {name: value for name, value in said.attributes.items() if name != "mpp"}
    return replace(said, attributes=attributes | {name: value for name, value in record.attributes.items() if name == "mpp"})
