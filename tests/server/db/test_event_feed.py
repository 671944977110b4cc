"""Following the audit trail: each event once, in order, none passed over, whatever order transactions end in."""

from dataclasses import dataclass, field
from threading import Thread

import psycopg
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import Connection, create_engine

from pathfed_server.db.audit_store import add_event
from pathfed_server.db.event_feed import EventFeed
from pathfed_server.db.rows import AuditRow
from pathfed_server.db.sql_store import SqlStore


def event(seq: int) -> AuditRow:
    return AuditRow(seq=seq, at=1.0, actor="server", action="test", subject=str(seq), detail={})


@dataclass
class Trail:
    """A database in which transactions draw numbers, and end in any order, as PostgreSQL has it."""

    drawn: int = 0
    visible: set[int] = field(default_factory=set)
    open: dict[str, set[int]] = field(default_factory=dict)

    def audit_events(self, *, after: int = 0, until: int | None = None, limit: int | None = None) -> list[AuditRow]:
        numbers = sorted(seq for seq in self.visible if seq > after and (until is None or seq <= until))
        return [event(seq) for seq in numbers[:limit]]

    def newest_event(self) -> int:
        return max(self.visible, default=0)

    def event_writers(self) -> frozenset[str]:
        return frozenset(self.open)

    def draw(self, writer: str) -> None:
        self.drawn += 1
        self.open.setdefault(writer, set()).add(self.drawn)

    def end(self, writer: str, *, commit: bool) -> None:
        numbers = self.open.pop(writer, set())
        self.visible |= numbers if commit else set()


@dataclass
class Careless(Trail):
    """What is planted: nobody says that a transaction is open."""

    def event_writers(self) -> frozenset[str]:
        return frozenset()


_STEPS = st.lists(st.tuples(st.sampled_from(["draw", "commit", "abort", "read"]), st.integers(0, 3)), max_size=60)


def play(trail: Trail, steps: list[tuple[str, int]], limit: int) -> list[int]:
    """What a feed gives out while transactions draw numbers and end; every life of a writer has a name of its own."""
    feed, got, lives = EventFeed(trail), [], [0, 0, 0, 0]
    for what, who in steps:
        name = f"{who}/{lives[who]}"
        if what == "draw":
            trail.draw(name)
        elif what == "read":
            got += [row.seq for row in feed.read(limit)]
        else:
            trail.end(name, commit=what == "commit")
            lives[who] += 1
    for name in sorted(trail.open):
        trail.end(name, commit=True)
    while rows := feed.read(limit):
        got += [row.seq for row in rows]
    return got


@given(_STEPS, st.integers(1, 5))
def test_every_event_comes_once_and_in_order(steps, limit):
    trail = Trail()
    assert play(trail, steps, limit) == sorted(trail.visible)


def test_a_reader_that_does_not_wait_passes_events_over():
    steps = [("draw", 0), ("draw", 1), ("commit", 1), ("read", 0)]
    trail = Careless()
    assert play(trail, steps, 5) == [2]
    assert trail.visible == {1, 2}


def test_a_gap_that_stays_is_passed_although_others_always_write():
    trail = Trail()
    feed = EventFeed(trail)
    trail.draw("gone")
    trail.draw("a0")
    trail.end("a0", commit=True)
    assert feed.read() == []
    assert feed.waiting
    trail.draw("a1")
    trail.end("gone", commit=False)
    assert [row.seq for row in feed.read()] == [2]
    assert not feed.waiting


@pytest.fixture
def writers(url: str):
    """Open transactions on the database that end when the test says so; on SQLite there can be but one."""
    engine = create_engine(url.replace("postgresql://", "postgresql+psycopg://"))
    opened: list[Connection] = []

    def begin() -> Connection:
        opened.append(engine.connect())
        return opened[-1]

    yield begin
    for connection in opened:
        connection.close()
    engine.dispose()


def write(connection: Connection, subject: str) -> None:
    add_event(connection, actor="server", action="test", subject=subject, at=1.0)


def read(feed: EventFeed) -> list[str]:
    return [row.subject for row in feed.read()]


@pytest.mark.parametrize("backend", ["postgresql"], indirect=True)
def test_on_postgresql_an_event_that_is_committed_late_is_not_passed_over(store: SqlStore, writers):
    slow, fast, lost = writers(), writers(), writers()
    feed = EventFeed(store)
    write(slow, "drawn first")
    write(lost, "never")
    write(fast, "drawn third")
    fast.commit()
    assert [row.subject for row in store.audit_events()] == ["drawn third"]
    assert read(feed) == []
    assert feed.waiting
    slow.commit()
    assert read(feed) == ["drawn first"]
    assert read(feed) == []
    lost.rollback()
    assert read(feed) == ["drawn third"]
    assert (feed.after, feed.waiting) == (store.newest_event(), False)


@pytest.mark.parametrize("backend", ["postgresql"], indirect=True)
def test_on_postgresql_a_writer_whose_process_is_killed_holds_up_nobody_for_long(store: SqlStore, writers, url):
    killed, fast = writers(), writers()
    write(killed, "never")
    process = killed.exec_driver_sql("SELECT pg_backend_pid()").scalar_one()
    write(fast, "after it")
    fast.commit()
    feed = EventFeed(store)
    assert read(feed) == []
    with psycopg.connect(url, autocommit=True) as other:
        other.execute(f"SELECT pg_terminate_backend({process}, 5000)".encode())
    assert read(feed) == ["after it"]
    killed.invalidate()


@pytest.mark.parametrize("backend", ["postgresql"], indirect=True)
def test_on_postgresql_watching_from_now_on_misses_nothing_that_was_being_written(store: SqlStore, writers):
    slow, fast = writers(), writers()
    write(slow, "being written")
    write(fast, "there")
    fast.commit()
    begun = []

    def begin() -> None:
        begun.append(EventFeed.from_now(store))

    thread = Thread(target=begin)
    thread.start()
    thread.join(0.3)
    assert begun == []
    slow.commit()
    thread.join(30)
    store.audit(actor="server", action="test", subject="later", at=1.0)
    assert read(begun[0]) == ["later"]


def test_a_feed_resumes_after_any_number_and_reads_in_pages(store: SqlStore):
    for number in range(7):
        store.audit(actor="server", action="test", subject=str(number), at=1.0)
    feed = EventFeed(store)
    pages = [[row.subject for row in feed.read(3)] for _ in range(4)]
    assert pages == [["0", "1", "2"], ["3", "4", "5"], ["6"], []]
    assert read(EventFeed(store, store.audit_events()[4].seq)) == ["5", "6"]
    assert read(EventFeed.from_now(store)) == []
    store.audit(actor="server", action="test", subject="new", at=1.0)
    assert read(feed) == ["new"]
