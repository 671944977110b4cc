"""The rows of a scan: the slide table of one set of cohort rules in memory, and what a scan changes in it.

Changes gather here and reach the database together (`flush`): all of them or none, but for slides that are found and not read. Guarantees:

- **Which slides count is a function of what is there**, never of the order in which it was read. Of slides of one patient with the same
  content the one whose path comes first is used (the others: PF218). Slides with the same content that are listed for different patients
  are out, all of them (PF219): nobody here can know whose tissue it is. A slide becomes usable in the same transaction that settles this.
- A slide keeps its number and tiles for as long as its content is the same, wherever it moves.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from pathfed_client.cohort.cohort import SlideId
from pathfed_client.io.listing import Out, Placed
from pathfed_client.io.site_records import SlideRecord, SlideStatus
from pathfed_client.io.site_store import SiteStore
from pathfed_client.io.tile_index import IndexEntry, TileIndex, TileIndexWriter
from pathfed_client.slides.examine import SlideFacts
from pathfed_client.slides.tile_map import DamagedMapError
from pathfed_common.digest import Digest
from pathfed_common.errors import ErrorCode

_AT_ONCE = 20_000
_GONE = "no longer in the slides folder"


class SlideRows:
    """One scan's rows, by path."""

    def __init__(self, store: SiteStore, scan_key: Digest, index: TileIndexWriter) -> None:
        """Read the rows there are. A slide whose tile map is damaged must be read again: its row comes without tiles."""
        self._store = store
        self._index = index
        self.scan_key = scan_key
        self.records: dict[str, SlideRecord] = {}
        self.numbers: dict[str, SlideId] = {}
        self._groups: defaultdict[str, set[str]] = defaultdict(set)
        self._stale: set[str] = set()
        self._whole: set[str] = set()
        self._moved: dict[SlideId, SlideRecord] = {}
        self._forgotten: list[SlideId] = []
        self._restated: set[str] = set()
        for number, record in self._intact(store.slides(scan_key)).items():
            self.records[record.path] = record
            self.numbers[record.path] = number
            self._groups[record.fingerprint].add(record.path)

    def _intact(self, records: Mapping[SlideId, SlideRecord]) -> dict[SlideId, SlideRecord]:
        with TileIndex(self._index.path) as maps:
            return {number: record if _is_whole(record, maps) else _unread(record) for number, record in records.items()}

    def replace(self, record: SlideRecord, facts: SlideFacts | None = None) -> None:
        """A slide was found, read or refused: its row is this one, with these facts if it is usable.

        Raises:
            HostError: its tiles cannot be written (PF901, PF904).
        """
        self._put(replace(record, tile_count=0, tiles=None) if facts is None else _usable(record, facts, self._index.add(facts.tiles)))
        self._whole.add(record.path)

    def assign(self, path: str, listed: Placed | Out) -> None:
        """A known slide is there as it was; who it belongs to, and what the list says of it, may have changed."""
        record = self.records[path]
        if isinstance(listed, Out):
            wanted = replace(record, status=listed.status, reason=listed.code, detail=listed.detail, patient=None)
        else:
            wanted = replace(record, patient=listed.patient, attributes=listed.attributes)
            # One that is refused though it has tiles is so because of another slide, which `flush` looks at when that one changes.
            if record.tile_count > 0 and (record.status is not SlideStatus.REFUSED or record.patient != listed.patient):
                wanted = replace(wanted, status=SlideStatus.USABLE, reason=None, detail=None)
        self._restate(wanted)

    def miss(self, path: str) -> None:
        """A slide is no longer there."""
        record = self.records[path]
        self._restate(replace(record, status=SlideStatus.MISSING, reason=ErrorCode.SLIDE_MISSING, detail=_GONE))

    def move(self, moved: Mapping[str, SlideRecord]) -> None:
        """Slides, by their old paths, that lie elsewhere now. Paths may be exchanged among them."""
        self._moved |= {self.numbers[old]: record for old, record in moved.items()}
        numbers = {old: self.numbers.pop(old) for old in moved}
        for old in moved:
            self._stale.add(self.records[old].fingerprint)
            self._groups[self.records.pop(old).fingerprint].discard(old)
        for old, record in moved.items():
            self.records[record.path] = record
            self.numbers[record.path] = numbers[old]
            self._groups[record.fingerprint].add(record.path)

    def forget(self, paths: Iterable[str]) -> None:
        """Take out slides that were never read and are gone."""
        for path in paths:
            self._groups[self.records.pop(path).fingerprint].discard(path)
            self._forgotten.append(self.numbers.pop(path))

    def begin(self, paths: Iterable[str]) -> None:
        """Note, before reading begins, that it has begun: a slide that ends the whole machine is not tried for ever."""
        self._count({path: self.records[path].attempts + 1 for path in paths})

    def undo_begin(self, paths: Iterable[str]) -> None:
        """The scan ended in order: these slides are not to blame for it."""
        self._count({path: self.records[path].attempts - 1 for path in paths})

    def _count(self, attempts: Mapping[str, int]) -> None:
        if attempts:
            self._store.set_attempts({self.numbers[path]: count for path, count in attempts.items()})
        for path, count in attempts.items():
            self.records[path] = replace(self.records[path], attempts=count)

    def flush(self) -> None:
        """Write what has changed, in one transaction; slides that are new, and not usable yet, after it."""
        for content in self._stale - {""}:
            for wanted in _settled([self.records[path] for path in self._groups[content]]):
                self._restate(wanted)
        self._stale.clear()
        if not (self._whole or self._restated or self._moved or self._forgotten):
            return
        fresh = [path for path in sorted(self._whole) if path not in self.numbers and self.records[path].tiles is None]
        self._index.sync()  # before a row refers to it
        with self._store.together():
            self._store.forget_slides(self._forgotten)
            self._store.move_slides(self._moved)
            for path in sorted(self._whole - set(fresh)):
                self.numbers[path] = self._store.upsert_slide(self.records[path])
            self._store.restate_slides({self.numbers[path]: self.records[path] for path in self._restated - self._whole})
        for start in range(0, len(fresh), _AT_ONCE):  # none is usable yet; others must be able to write in between
            self.numbers |= self._store.add_slides([self.records[path] for path in fresh[start : start + _AT_ONCE]])
        for changes in (self._whole, self._restated, self._moved, self._forgotten):
            changes.clear()

    def _restate(self, record: SlideRecord) -> None:
        if record != self.records[record.path]:
            self._put(record)
            self._restated.add(record.path)

    def _put(self, record: SlideRecord) -> None:
        earlier = self.records.get(record.path)
        if earlier is not None and earlier.fingerprint != record.fingerprint:
            self._groups[earlier.fingerprint].discard(record.path)
            self._stale.add(earlier.fingerprint)
        self.records[record.path] = record
        self._groups[record.fingerprint].add(record.path)
        self._stale.add(record.fingerprint)

    def same_content(self) -> tuple[tuple[str, str], ...]:
        """Pairs of slides with the same content that are listed for different patients."""
        pairs = []
        for content, paths in self._groups.items():
            there = [self.records[path] for path in sorted(paths) if content and _counts(self.records[path])]
            pairs += [(there[0].path, one.path) for one in there[1:] if one.patient != there[0].patient]
        return tuple(sorted(pairs))


def _is_whole(record: SlideRecord, maps: TileIndex) -> bool:
    try:
        if record.tiles is not None:
            maps.read(record.tiles)
    except DamagedMapError:
        return False
    return True


def _unread(record: SlideRecord) -> SlideRecord:
    """The row of a slide that must be read again."""
    return replace(record, status=SlideStatus.PENDING, reason=None, detail=None, tile_count=0, tiles=None, attempts=0)


def _usable(record: SlideRecord, facts: SlideFacts, entry: IndexEntry) -> SlideRecord:
    """The row of a slide that was read."""
    return replace(
        record,
        status=SlideStatus.USABLE,
        reason=None,
        detail=None,
        mpp=facts.mpp,
        width=facts.width,
        height=facts.height,
        tile_count=len(facts.tiles),
        tiles=entry,
        attempts=0,
    )


def _counts(record: SlideRecord) -> bool:
    return record.patient is not None and record.status is not SlideStatus.MISSING and record.reason is not ErrorCode.SLIDE_WITHDRAWN


def _settled(group: list[SlideRecord]) -> Iterator[SlideRecord]:
    """Rows of one content as they should be."""
    there = sorted((record for record in group if _counts(record)), key=lambda record: record.path)
    shared = len({record.patient for record in there}) > 1
    able = [record for record in there if record.tile_count > 0]
    for index, record in enumerate(able):
        if shared:
            other = next(one.path for one in there if one.patient != record.patient)
            detail = f"the same content is listed for another patient: {other}"
            yield replace(record, status=SlideStatus.REFUSED, reason=ErrorCode.SLIDE_SHARED, detail=detail)
        elif index:
            detail = f"the same content as {able[0].path}, which is used"
            yield replace(record, status=SlideStatus.REFUSED, reason=ErrorCode.SLIDE_DUPLICATE, detail=detail)
        else:
            yield replace(record, status=SlideStatus.USABLE, reason=None, detail=None)
