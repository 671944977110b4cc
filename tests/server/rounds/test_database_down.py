"""A database that goes away under the loop: told as PF512 or waited for, no transition is lost, and the end is that of a calm run."""

import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from postgres import Postgres, running_postgres
from sqlalchemy import event
from tests.server.rounds.consortium import NAMES, RUN, Consortium, FakeClock, FakeRecorder, FakeSites, Make, found, make_plan

from pathfed_common.errors import ErrorCode, RoundError
from pathfed_server import driving
from pathfed_server.db import database
from pathfed_server.db.sql_store import SqlStore, migrate
from pathfed_server.driving import outlast
from pathfed_server.rounds.loop import run_rounds
from pathfed_server.rounds.state import RunState

PLAN = make_plan(rounds=2, quorum=2)
SITES = NAMES[:2]


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    """One that these tests may stop."""
    with running_postgres() as made:
        yield made


@pytest.fixture(scope="module")
def migrated(postgres: Postgres) -> str:
    url = postgres.create()
    migrate(url)
    return url.rsplit("/", 1)[1]


@pytest.fixture
def planned(postgres: Postgres, migrated: str, tmp_path: Path) -> Iterator[Callable[[], Consortium]]:
    """A consortium with a planned run on PostgreSQL, each call another one."""
    stores: list[SqlStore] = []

    def make() -> Consortium:
        home = tmp_path / f"home-{len(stores)}"
        home.mkdir()
        made = found(home, PLAN, SITES, url=postgres.create(template=migrated))
        stores.append(made.store)
        return made

    yield make
    for store in stores:
        store.close()


class Before:
    """A store that something happens to before its call of a number, counted from 0."""

    def __init__(self, store: SqlStore, number: int | None, happens: Callable[[], None]) -> None:
        self._store, self._number, self._happens = store, number, happens
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        work = getattr(self._store, name)

        def called(*given: Any, **more: Any) -> Any:
            self.calls.append(name)
            if len(self.calls) - 1 == self._number:
                self._happens()
            return work(*given, **more)

        return called


def drive(made: Consortium, store: Any) -> None:
    clock = FakeClock()
    run_rounds(made.settings(), sites=FakeSites(PLAN, clock), store=store, recorder=FakeRecorder(), clock=clock)


def end_of(made: Consortium) -> object:
    store = made.store
    return (
        store.checkpoints(RUN),
        [(row.round_index, row.site, row.digest) for row in store.statements(RUN)],
        [(row.site, row.state, row.code, row.update) for index in (1, 2) for row in store.participations(RUN, index)],
        store.log_leaves(0, store.log_size()),
        store.run(RUN).state,
    )


def test_connections_cut_before_any_word_to_the_store_lose_no_transition(planned, postgres: Postgres) -> None:
    """A restart of PostgreSQL between two words: the pool's connections are dead, and the next word goes over a new one."""
    calm = planned()
    counted = Before(calm.store, None, lambda: None)
    drive(calm, counted)
    undisturbed = end_of(calm)
    assert len(counted.calls) > 15
    for number in range(0, len(counted.calls), 3):
        made = planned()
        drive(made, Before(made.store, number, postgres.cut))
        assert end_of(made) == undisturbed, f"cut before {counted.calls[number]}, call {number}"


def test_a_database_that_stops_under_the_loop_is_outlasted(planned, postgres: Postgres) -> None:
    """Stopped as by a crash in the middle of a round, and back while the loop waits. Nobody touches the run."""
    calm = planned()
    drive(calm, calm.store)
    undisturbed, made = end_of(calm), planned()
    store = Before(made.store, 6, postgres.stop)
    waited: list[float] = []

    def wait(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 3:
            postgres.start()

    outlast(lambda: drive(made, store), wait)
    assert len(waited) >= 3
    assert end_of(made) == undisturbed


def test_a_database_that_stops_in_the_middle_of_a_word_says_so_and_the_run_goes_on(planned, postgres: Postgres) -> None:
    """The connection dies inside a transaction, as it does when the machine of the database goes down."""
    calm = planned()
    drive(calm, calm.store)
    undisturbed = end_of(calm)
    for number in (3, 8, 14):
        made = planned()
        words: list[int] = []

        def cut(connection: Any, cursor: Any, statement: str, *_: Any, words: list[int] = words, number: int = number) -> None:
            words.append(1)
            if statement.startswith(("INSERT", "UPDATE")) and len(words) > number * 5 and 0 not in words:
                words.append(0)
                postgres.cut()

        event.listen(made.store._engine, "before_cursor_execute", cut)
        with pytest.raises(RoundError, match="PF512"):
            drive(made, made.store)
        drive(made, made.store)
        assert end_of(made) == undisturbed


def test_what_no_wait_mends_is_raised_at_once() -> None:
    def work() -> None:
        made.append(1)
        raise RoundError(ErrorCode.RUN_STATE, "stopped")

    made: list[int] = []
    with pytest.raises(RoundError, match="PF511"):
        outlast(work, lambda seconds: pytest.fail("it waits"))
    assert made == [1]


def test_pauses_grow_to_a_minute_and_no_further() -> None:
    waited: list[float] = []

    def work() -> None:
        if len(waited) < 9:
            raise RoundError(ErrorCode.DATABASE_UNAVAILABLE, "away")

    outlast(work, waited.append)
    assert waited == sorted(waited)
    assert (waited[0], waited[-1]) == (1.0, 60.0)


def test_trouble_is_told_once_and_again_when_it_has_passed_meanwhile(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """However long all went well before it."""
    lasts = iter([100.0, 0.1, 0.1, 100.0, 0.1, 0.1])
    clock = [0.0]
    waited: list[float] = []

    def work() -> None:
        took = next(lasts, None)
        if took is not None:
            clock[0] += took
            raise RoundError(ErrorCode.DATABASE_UNAVAILABLE, "away")

    monkeypatch.setattr(driving, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    with caplog.at_level(logging.WARNING, logger="pathfed_server.driving"):
        outlast(work, waited.append)
    assert [record.getMessage().split(";")[0] for record in caplog.records] == ["PF512: away", "PF512: away"]
    assert waited == [1.0, 2.0, 5.0] * 2


def test_a_locked_sqlite_file_is_waited_for(consortium: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process holds the write lock, a backup say: longer than the loop waits for it inside a transaction."""
    monkeypatch.setattr(database, "_BUSY_MS", 50)
    calm, made = consortium(PLAN, sites=SITES), consortium(PLAN, sites=SITES)
    drive(calm, calm.store)
    locked = threading.Event()

    def hold() -> None:
        with closing(sqlite3.connect(made.home / "server.db", isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            locked.set()
            while not waited:
                time.sleep(0.01)
            other.execute("ROLLBACK")

    def lock() -> None:
        holding.start()
        assert locked.wait(30)

    waited: list[float] = []
    holding = threading.Thread(target=hold)
    store = Before(made.store, 6, lock)

    def wait(seconds: float) -> None:
        waited.append(seconds)
        holding.join()

    outlast(lambda: drive(made, store), wait)
    assert waited
    assert end_of(made) == end_of(calm)
    assert made.store.run(RUN).state is RunState.FINISHED
