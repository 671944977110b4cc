"""What Flower's processes do when they do not die but hang, lock up or lose their database: rounds go on by themselves.

Each fault is put into a run of the matrix's consortium; the states are those of the run that nobody disturbed.
"""

import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

import psutil
import pytest
from kill_conductor import Conductor
from kill_world import RUN, Ended, World, find
from tests.chaos.conftest import FULL, WITHIN_S

from pathfed_local.consortium import Consortium
from pathfed_server.db.sql_store import SqlStore
from pathfed_server.home import ServerHome

pytestmark = [pytest.mark.timeout(9000), pytest.mark.skipif(not FULL, reason="runs with `make chaos`")]
_TICK_S = 0.3


@pytest.fixture(scope="module")
def running(world: World, undisturbed: Ended) -> Iterator[Consortium]:
    """The consortium with a run that goes on for longer than all faults take."""
    if len(undisturbed.committed) < 5 * len(FAULTS):
        pytest.skip("a run of so few rounds ends before all faults have come")
    with world.again() as made:
        yield made


def _database(made: Consortium) -> Path:
    return ServerHome(made.server).flower / "superlink.db"


def _superlink(made: Consortium) -> psutil.Process:
    return find(made, "superlink", "server")[0]


def _hung(made: Consortium, kind: str, owner: str, seconds: float, *, then: signal.Signals) -> None:
    """Stop a process for a while, with its ports open and its heartbeats silent."""
    (process, *_) = find(made, kind, owner)
    process.send_signal(signal.SIGSTOP)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        made.watch(lambda line: None)
        time.sleep(_TICK_S)
    process.send_signal(then)


def hung_superlink(made: Consortium) -> None:
    """Longer than Flower waits for a ServerApp's heartbeat: the Flower run fails."""
    _hung(made, "superlink", "server", 80, then=signal.SIGKILL)


def hung_supernode(made: Consortium) -> None:
    """Longer than Flower waits for a SuperNode's heartbeat, and then it goes on as if nothing had happened."""
    _hung(made, "supernode", made.hospitals[0].name, 80, then=signal.SIGCONT)


def locked_database(made: Consortium) -> None:
    """Longer than Flower itself waits for SQLite's lock."""
    with closing(sqlite3.connect(_database(made), isolation_level=None, timeout=60)) as other:
        other.execute("BEGIN IMMEDIATE").close()
        until = time.monotonic() + 15
        while time.monotonic() < until:
            made.watch(lambda line: None)
            time.sleep(_TICK_S)
        other.execute("ROLLBACK").close()


def damaged_database(made: Consortium) -> None:
    """Flower's own database cannot be read any more when SuperLink starts again."""
    process = _superlink(made)
    process.send_signal(signal.SIGSTOP)
    with _database(made).open("r+b") as file:
        file.write(b"no database " * 1000)
    process.send_signal(signal.SIGKILL)


def lost_database(made: Consortium) -> None:
    """SuperLink is back with an empty database: it knows no node, and no run."""
    process = _superlink(made)
    process.send_signal(signal.SIGSTOP)
    for file in _database(made).parent.glob("superlink.db*"):
        file.unlink()
    process.send_signal(signal.SIGKILL)


FAULTS: dict[str, Callable[[Consortium], None]] = {
    fault.__name__.replace("_", " "): fault for fault in (hung_superlink, locked_database, hung_supernode, damaged_database, lost_database)
}


@pytest.mark.parametrize("fault", FAULTS)
def test_rounds_go_on_after_a_fault_that_kills_no_process_of_ours(
    world: World, undisturbed: Ended, running: Consortium, fault: str
) -> None:
    conductor = Conductor(world, running, [], reference=undisturbed.checkpoints)
    with SqlStore(ServerHome(running.server).database_url) as store:
        FAULTS[fault](running)
        before = len(store.checkpoints(RUN))
        until = time.monotonic() + WITHIN_S / 4
        while len(store.checkpoints(RUN)) < before + 2 and time.monotonic() < until:
            with suppress(IndexError):
                running.watch(world.told.append)
            conductor.compare(store)
            time.sleep(_TICK_S)
        assert len(store.checkpoints(RUN)) >= before + 2, world.told
