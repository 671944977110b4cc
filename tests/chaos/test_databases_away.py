"""Databases that are away under a run of real processes: a site's file that another process holds locked for longer than the site waits,
then the server's PostgreSQL, which stops as in a crash and comes back. The run goes on by itself, and ends as it should.

`make chaos` runs it.
"""

import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from kill_world import KINDS, bring_together, find, matrix_plan, write_trust
from postgres import Postgres, running_postgres
from tests.chaos.conftest import CHAOS
from tests.end_to_end.conftest import processes_of, wait_for

from pathfed_client.home import SiteHome
from pathfed_client.io.database.connection import BUSY_TIMEOUT_S
from pathfed_common.errors import ErrorCode, RoundError
from pathfed_common.ids import RunName
from pathfed_local.consortium import Consortium, find_hospitals
from pathfed_server.db.sql_store import SqlStore
from pathfed_server.home import ServerHome
from pathfed_server.rounds.state import RoundState, RunState

pytestmark = [pytest.mark.timeout(1800), pytest.mark.skipif(not CHAOS, reason="runs with `make chaos`")]
RUN = RunName("away")
ROUNDS = 8
#: Longer than a site waits for its database, and than the daemon and the round loop wait between their first tries.
_LOCKED_S, _AWAY_S = BUSY_TIMEOUT_S + 20.0, 30.0
_WITHIN_S = 400.0
_TICK_S = 0.3


@dataclass
class Running:
    """The consortium with its run under way.

    Attributes:
        made: the consortium.
        postgres: what holds the server's database.
        said: what the processes said.
    """

    made: Consortium
    postgres: Postgres
    said: list[str] = field(default_factory=list)

    def see(self, look: Callable[[SqlStore], object]) -> object:
        """Look into the server's database; None while it is away."""
        self.made.watch(self.said.append)
        try:
            with SqlStore(ServerHome(self.made.server).database_url) as store:
                return look(store)
        except RoundError as error:
            if error.code is not ErrorCode.DATABASE_UNAVAILABLE:
                raise
            return None

    def committed(self) -> int:
        found = self.see(lambda store: len(store.checkpoints(RUN)) - 1)
        return found if isinstance(found, int) else -1

    def codes(self, site: str) -> list[str | None]:
        """What became of a site in each round that is decided for it."""

        def look(store: SqlStore) -> list[str | None]:
            rows = (row for each in store.rounds(RUN) for row in store.participations(RUN, each.round_index))
            return [row.code for row in rows if row.site == site and row.received_at is not None]

        found = self.see(look)
        return found if isinstance(found, list) else []

    def pause(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self.made.watch(self.said.append)
            time.sleep(_TICK_S)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, hospitals: Path) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("away")
    made = Consortium(folder / "out", find_hospitals(hospitals, 3))
    with running_postgres() as postgres:
        plan = matrix_plan(ROUNDS).replace("quorum = 3", "quorum = 2").replace("deadline_s = 900", "deadline_s = 300")
        try:
            digest = bring_together(made, plan, init=("--database", postgres.create()))
            made.server_command("run", "start", digest, "--name", RUN)
            yield Running(made, postgres)
        finally:
            made.stop()
    assert not wait_for(lambda: processes_of(folder), until=lambda left: not left, within_s=60)


def test_a_site_whose_database_is_locked_for_long_refuses_with_a_code_and_takes_part_again(running: Running) -> None:
    site = running.made.hospitals[-1].name
    assert wait_for(running.committed, until=lambda rounds: rounds >= 1, within_s=_WITHIN_S) >= 1, running.said
    with closing(sqlite3.connect(SiteHome(running.made.site(site)).database, isolation_level=None, timeout=60)) as other:
        other.execute("BEGIN IMMEDIATE").close()
        running.pause(_LOCKED_S)
        other.execute("ROLLBACK").close()
    codes = wait_for(lambda: running.codes(site), until=lambda codes: "PF904" in codes and codes[-1] is None, within_s=_WITHIN_S)
    assert codes.count("PF904") == 1, (codes, running.said)
    assert codes[-1] is None


def test_a_run_outlasts_a_database_that_stops_and_comes_back(running: Running) -> None:
    before = wait_for(running.committed, until=lambda rounds: rounds >= 3, within_s=_WITHIN_S)
    kinds = [kind for kind, (_, side) in KINDS.items() if side == "server"]
    processes = {kind: [process.pid for process in find(running.made, kind, "server")] for kind in kinds}
    running.postgres.stop()
    running.pause(_AWAY_S)
    assert {kind: [process.pid for process in find(running.made, kind, "server")] for kind in kinds} == processes, running.said
    running.postgres.start()
    assert wait_for(running.committed, until=lambda rounds: rounds >= before + 2, within_s=_WITHIN_S) >= before + 2, running.said
    assert len([line for line in running.said if "PF512" in line]) >= 1, "it is told"
    assert "PF512" in (ServerHome(running.made.server).logs / "server-app.log").read_text()


def test_the_run_ends_as_it_should_with_every_round_charged_once(running: Running, tmp_path: Path) -> None:
    made = running.made
    ended = wait_for(
        lambda: running.see(lambda store: store.run(RUN).state), until=lambda state: state == RunState.FINISHED, within_s=_WITHIN_S
    )
    assert ended is RunState.FINISHED, running.said
    *whole, locked = (one.name for one in made.hospitals)
    with SqlStore(ServerHome(made.server).database_url) as store:
        assert store.run(RUN).failures == 0
        assert [(row.round_index, row.state) for row in store.rounds(RUN)] == [
            (index, RoundState.COMMITTED) for index in range(1, ROUNDS + 1)
        ]
        counted = {site: [row.round_index for row in store.statements(RUN) if row.site == site] for site in (*whole, locked)}
    assert [counted[site] for site in whole] == [list(range(1, ROUNDS + 1))] * 2
    assert len(counted[locked]) == ROUNDS - 1
    for site, rounds in counted.items():
        made.site_command(site, "ledger", "verify")
        charged = [entry["round"] for entry in made.site_command(site, "ledger", "show")["entries"]]
        assert len(charged) == len(set(charged)), (site, charged)
        assert set(rounds) <= set(charged)
    release = tmp_path / "release"
    made.server_command("release", "create", RUN, "--out", release, "--wait", "180")
    updates = ServerHome(made.server).record(RUN) / "updates"
    made.finish(made.begin("pathfed", "verify", release, "--trust", write_trust(made), "--replay", updates))
