"""A site whose database another process holds locked, at any write of a round: it costs a code where the site stops waiting, else nothing.

Nothing is lost, nothing is charged twice, and once the lock is free the site answers with the bytes that it would have sent.
"""

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from answering_site import bytes_of, opened
from tests.client.test_full_disk import answers_again, asked, check_nothing_half_written

from pathfed_client.io import egress_log
from pathfed_client.io.database import connection
from pathfed_client.io.egress_log import EgressLog

#: Takes the path of a database, holds its write lock until the next line, and says so.
_HOLDER = """
import sqlite3, sys
for line in sys.stdin:
    held = sqlite3.connect(line.rstrip(), isolation_level=None)
    held.execute("BEGIN IMMEDIATE")
    print("locked", flush=True)
    sys.stdin.readline()
    held.execute("ROLLBACK")
    held.close()
    print("free", flush=True)
"""
_SHORT_S, _MOMENT_S = 0.05, 0.3


@dataclass
class Lock:
    """Another process, which locks a database before the write transaction of a number, counted from 0.

    Attributes:
        seen: the database of every write transaction since `arm`.
        held: whether the lock is held.
    """

    holder: "subprocess.Popen[str]"
    moment: bool = False
    at: int | None = None
    held: bool = False
    seen: list[str] = field(default_factory=list)

    def arm(self, at: int | None) -> None:
        """Lock at the transaction of this number; None: count only."""
        self.at, self.seen = at, []

    def before(self, database: Path) -> None:
        """A write transaction is about to begin."""
        self.seen.append(database.name)
        if len(self.seen) - 1 == self.at:
            self._say(str(database), "locked")
            self.held = True
            if self.moment:
                threading.Timer(_MOMENT_S, self.free).start()

    def free(self) -> None:
        """Let the lock go, if it is held."""
        if self.held:
            self.held = False
            self._say("", "free")

    def _say(self, line: str, answer: str) -> None:
        assert self.holder.stdin is not None
        assert self.holder.stdout is not None
        self.holder.stdin.write(line + "\n")
        self.holder.stdin.flush()
        assert self.holder.stdout.readline().strip() == answer


@pytest.fixture(params=[False, True], ids=["longer than it waits", "for a moment"])
def lock(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lock]:
    """A lock on databases that are opened from now on."""
    if not request.param:
        monkeypatch.setattr(connection, "BUSY_TIMEOUT_S", _SHORT_S)
        monkeypatch.setattr(egress_log, "BUSY_TIMEOUT_S", _SHORT_S)
    begin: Callable[[Any], None] = connection._on_begin
    transaction = EgressLog._transaction
    with subprocess.Popen([sys.executable, "-c", _HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        made = Lock(holder, moment=bool(request.param))

        def counted_begin(opening: Any) -> None:
            if opening.get_execution_options().get("pathfed_write", True):
                made.before(Path(opening.engine.url.database))
            begin(opening)

        @contextmanager
        def counted_transaction(self: EgressLog) -> Iterator[None]:
            made.before(self.path)
            with transaction(self):
                yield

        monkeypatch.setattr(connection, "_on_begin", counted_begin)
        monkeypatch.setattr(EgressLog, "_transaction", counted_transaction)
        yield made
        made.free()


def test_a_locked_database_costs_a_code_and_no_answer(world, copy_home, quick, lock: Lock) -> None:
    with opened(copy_home("undisturbed")) as site:
        lock.arm(None)
        undisturbed = bytes_of(site.answer(world.offer(), world.base_state))
    writes = list(lock.seen)
    assert {"site.db", "egress.db"} == set(writes)
    assert len(writes) >= 3
    wrong = {}
    for number, write in enumerate(writes):
        home = copy_home(f"home-{number}")
        with opened(home) as site:
            lock.arm(number)
            code = asked(site, world)
            assert lock.moment or lock.held, "it was locked all the while"
            lock.free()
            lock.arm(None)
            check_nothing_half_written(home)
            again = site.answer(world.offer(), world.base_state)
            found = (code, again.code, again.code is None and bytes_of(again) == undisturbed, site.charges())
        same = answers_again(home, world) == again
        if (*found, same) != (None if lock.moment else "PF904", None, True, 1, True):
            wrong[f"{number} {write}"] = (*found, same)
    assert wrong == {}
