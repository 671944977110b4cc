"""Slides in the site database."""

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.sqlite import insert as sqlite_insert

from pathfed_client.cohort.cohort import Cohort, Pseudonym, SlideId
from pathfed_client.io.database.connection import SiteDatabase
from pathfed_client.io.database.schema import SLIDE
from pathfed_client.io.site_records import SlideRecord, SlideStatus
from pathfed_client.io.tile_index import IndexEntry
from pathfed_common import digest
from pathfed_common.digest import Digest
from pathfed_common.errors import ErrorCode

_AT_ONCE = 500  # numbers in one question: SQLite bounds its parameters


class SlidesPart(SiteDatabase):
    """Slides, and the cohorts that are made of them."""

    def upsert_slide(self, record: SlideRecord) -> SlideId:
        """Store a slide under its path and scan key, replacing what was there.

        A number names content and the tiles found in it: a file whose bytes, size, time or resolution changed gets a new number, and
        numbers are never used again, so that a cohort's digest changes with its slides. A slide that was not read yet keeps the number it
        was given when it was found.

        Args:
            record: the slide; its tile map is on the disk already.

        Returns:
            The slide's number.

        Raises:
            ValueError: it has tiles without a tile map, or the reverse.
        """
        if (record.tile_count > 0) != (record.tiles is not None):
            raise ValueError(f"a slide with {record.tile_count} tiles and tile map {record.tiles}")
        values = _slide_values(record)
        same_place = (SLIDE.c.path == record.path) & (SLIDE.c.scan_key == record.scan_key)
        same_file = (
            same_place
            & SLIDE.c.fingerprint.in_([record.fingerprint, ""])  # empty: not read yet, and none other than this
            & (SLIDE.c.size == record.size)
            & (SLIDE.c.mtime_ns == record.mtime_ns)
            & (SLIDE.c.mpp.is_(None) | SLIDE.c.mpp.is_not_distinct_from(record.mpp))
        )
        with self._transaction() as connection:
            connection.execute(sa.delete(SLIDE).where(same_place & ~same_file))
            statement = sqlite_insert(SLIDE).values(**values)
            statement = statement.on_conflict_do_update(index_elements=["path", "scan_key"], set_=values)
            return SlideId(connection.execute(statement.returning(SLIDE.c.id)).scalar_one())

    def set_slide_state(
        self,
        slide: SlideId,
        *,
        status: SlideStatus,
        reason: ErrorCode | None = None,
        detail: str | None = None,
        patient: Pseudonym | None = None,
    ) -> None:
        """Change who a slide belongs to and whether it counts, without reading it again; its tiles stay.

        Raises:
            KeyError: there is no such slide.
        """
        values = {"status": status.value, "reason": None if reason is None else reason.value, "detail": detail, "patient": patient}
        with self._transaction() as connection:
            changed = connection.execute(sa.update(SLIDE).where(SLIDE.c.id == slide).values(**values)).rowcount
        if not changed:
            raise KeyError(f"no slide {slide}")

    def add_slides(self, records: Sequence[SlideRecord]) -> dict[str, SlideId]:
        """Slides that were not known and have no tiles yet; numbers by path, ascending in this order. Quick for very many."""
        if not records:
            return {}
        values = [_slide_values(record) for record in records]
        with self._transaction() as connection:
            last = connection.execute(sa.select(sa.func.coalesce(sa.func.max(SLIDE.c.id), 0))).scalar_one()
            connection.execute(sa.insert(SLIDE), values)
            return {row.path: SlideId(row.id) for row in connection.execute(sa.select(SLIDE.c.id, SLIDE.c.path).where(SLIDE.c.id > last))}

    def restate_slides(self, records: Mapping[SlideId, SlideRecord]) -> None:
        """As `set_slide_state`, of many slides at once, and what the list says of them; of each record only these fields count."""
        fields = ("status", "reason", "detail", "patient", "attributes")
        self._update(fields, [{"number": number} | _slide_values(record) for number, record in records.items()])

    def move_slides(self, moved: Mapping[SlideId, SlideRecord]) -> None:
        """Slides that lie elsewhere now: path, parts and time change, numbers and tiles stay. Paths may be exchanged among them."""
        with self.together():
            self._update(("path",), [{"number": number, "path": f"/{number}"} for number in moved])  # no slide's name begins so
            self._update(("path", "parts", "mtime_ns"), [{"number": number} | _slide_values(record) for number, record in moved.items()])

    def forget_slides(self, slides: Collection[SlideId]) -> None:
        """Take out slides; their numbers are not used again."""
        if slides:
            with self._transaction() as connection:
                connection.execute(sa.delete(SLIDE).where(SLIDE.c.id == sa.bindparam("number")), [{"number": one} for one in slides])

    def set_attempts(self, attempts: Mapping[SlideId, int]) -> None:
        """Note how often reading these slides was begun without coming to an end."""
        self._update(("attempts",), [{"number": number, "attempts": count} for number, count in attempts.items()])

    def _update(self, fields: Sequence[str], values: Sequence[Mapping[str, Any]]) -> None:
        """Set these columns of many slides, each by its number."""
        if values:
            statement = sa.update(SLIDE).where(SLIDE.c.id == sa.bindparam("number"))
            statement = statement.values({name: sa.bindparam(f"new_{name}") for name in fields})
            with self._transaction() as connection:
                connection.execute(statement, [{"number": one["number"]} | {f"new_{name}": one[name] for name in fields} for one in values])

    def slides_of(self, numbers: Collection[SlideId]) -> dict[SlideId, SlideRecord]:
        """Slides by their numbers; those that are no more are left out."""
        found: dict[SlideId, SlideRecord] = {}
        wanted = sorted(numbers)
        with self._transaction(write=False) as connection:
            for start in range(0, len(wanted), _AT_ONCE):
                some = wanted[start : start + _AT_ONCE]
                rows = connection.execute(sa.select(SLIDE).where(SLIDE.c.id.in_(some)))
                found |= {SlideId(row.id): _slide_record(row) for row in rows}
        return found

    def slides(self, scan_key: Digest) -> dict[SlideId, SlideRecord]:
        """All slides scanned under these rules, in order of their paths."""
        with self._transaction(write=False) as connection:
            rows = connection.execute(sa.select(SLIDE).where(SLIDE.c.scan_key == scan_key).order_by(SLIDE.c.path)).all()
        return {SlideId(row.id): _slide_record(row) for row in rows}

    def all_slides(self) -> list[SlideRecord]:
        """All slides under any rules; a slide that was scanned under several comes several times."""
        with self._transaction(write=False) as connection:
            rows = connection.execute(sa.select(SLIDE).order_by(SLIDE.c.path, SLIDE.c.id)).all()
        return [_slide_record(row) for row in rows]

    def cohort(self, scan_key: Digest, weigh: Callable[[SlideRecord], float | None] = lambda _: 1.0) -> Cohort:
        """The patients these rules leave, each with the tiles of all that patient's usable slides. Empty before a scan.

        What a plan makes of them besides (`io.site_cohort`) comes in by `weigh`.

        Args:
            scan_key: the rules that the slides were scanned under.
            weigh: gives the weight of a usable slide's tiles, or None to leave it out.
        """
        query = (
            sa.select(SLIDE)
            .where((SLIDE.c.scan_key == scan_key) & (SLIDE.c.status == SlideStatus.USABLE.value))
            .order_by(SLIDE.c.patient, SLIDE.c.id)
        )
        with self._transaction(write=False) as connection:
            return Cohort.of_rows(_weighed(connection.execute(query), weigh))


def _attributes_text(attributes: Mapping[str, str]) -> str:
    return digest.canonical(dict(attributes)).decode()


def _slide_values(record: SlideRecord) -> dict[str, Any]:
    tiles = record.tiles
    values = {name: getattr(record, name) for name in record.__dataclass_fields__ if name != "tiles"}
    return values | {
        "attributes": _attributes_text(record.attributes),
        "parts": json.dumps(record.parts),
        "status": record.status.value,
        "reason": None if record.reason is None else record.reason.value,
        "index_offset": None if tiles is None else tiles.offset,
        "index_size": None if tiles is None else tiles.size,
        "index_check": None if tiles is None else tiles.check,
    }


def _slide_record(row: sa.Row[Any]) -> SlideRecord:
    return SlideRecord(
        path=row.path,
        fingerprint=row.fingerprint,
        size=row.size,
        mtime_ns=row.mtime_ns,
        scan_key=row.scan_key,
        parts=tuple(json.loads(row.parts)),
        attempts=row.attempts,
        status=SlideStatus(row.status),
        reason=None if row.reason is None else ErrorCode(row.reason),
        detail=row.detail,
        patient=row.patient,
        mpp=row.mpp,
        width=row.width,
        height=row.height,
        tile_count=row.tile_count,
        tiles=None if row.index_check is None else IndexEntry(row.index_offset, row.index_size, row.index_check),
        attributes=json.loads(row.attributes),
    )


def _weighed(rows: Iterable[sa.Row[Any]], weigh: Callable[[SlideRecord], float | None]) -> Iterator[tuple[str, int, int, str, float]]:
    """Rows of a cohort, see `Cohort.of_rows`; slides without a weight are left out."""
    for row in rows:
        weight = weigh(_slide_record(row))
        if weight is not None:
            yield row.patient, row.id, row.tile_count, row.index_check, weight
