"""Lines that fail while rounds run: cut for minutes, reset in mid-shard, of 1 Mbit/s, half a second away, half-open, a wire that is down.

A consortium of three sites makes one run, each site over a line of its own: a proxy of ours that fails on command, and for one of them a
wire in a network namespace besides, where that is permitted. Every test has the next round and puts its faults there, one at each line; the
round waits for every site, and counts once. The last one holds the run against one that nothing disturbed.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import line_faults
import pathfed_instants
import pytest
from fault_proxy import fault_proxy
from kill_conductor import Conductor
from kill_world import RUN, Ended, World, doubles, matrix_plan
from line_faults import Line, arm, standing
from packet_capture import building
from tests.chaos.conftest import CHAOS

from pathfed_client.home import SiteHome
from pathfed_common.errors import ErrorCode
from pathfed_local.consortium import Consortium, find_hospitals
from pathfed_server.db.sql_store import SqlStore
from pathfed_server.home import ServerHome
from pathfed_server.rounds.state import RunState

pytestmark = [pytest.mark.timeout(2400), pytest.mark.skipif(not CHAOS, reason="runs with `make chaos`")]
AWAY = ErrorCode.SERVER_UNREACHABLE.value
ROUNDS = 4
_ROUND_WITHIN_S = 850.0
_ASKED_EVERY_S = 10.0
_TICK_S = 0.3
_ROUND_ENDS = f"committed@{pathfed_instants.SERVER}"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, hospitals: Path) -> World:
    """A consortium at rest, for a run with a round for each test. Updates of int8: a quarter of the bytes."""
    plan = matrix_plan(ROUNDS) + '[wire]\ndtype = "int8"\n'
    made = World(out=tmp_path_factory.mktemp("network") / "consortium", hospitals=find_hospitals(hospitals, 3), plan_text=plan)
    made.set_up()
    return made


@pytest.fixture(scope="module")
def undisturbed(world: World) -> Ended:
    """How the run ends over lines that nothing is wrong with."""
    with world.again() as made:
        assert Conductor(world, made, []).drive(600) is RunState.FINISHED, world.told
        return world.ended(made)


@dataclass(frozen=True)
class Told:
    """What operators were told while a round went on.

    Attributes:
        at_site: what `pathfed-site status` said of the way to the server, again and again; "": nothing.
        unseen_s: the longest time for which `pathfed-server sites list` had not heard of the site.
    """

    at_site: frozenset[str]
    unseen_s: float


@dataclass
class Running:
    """The run, round by round: its round loop stands at each commit until the next test has put its faults in.

    Attributes:
        world: where it is.
        made: its processes.
        lines: each site's, in the order of the hospitals.
        reference: drives to the end, and compares with the run that nothing disturbed.
    """

    world: World
    made: Consortium
    lines: list[Line]
    reference: Conductor

    def play(self, *faults: Callable[[Line], None], asked: int = 0) -> Told:
        """One round with a fault at each line; what operators were told about the site whose number is `asked`."""
        with SqlStore(ServerHome(self.made.server).database_url) as store, ThreadPoolExecutor(len(self.lines)) as pool:
            with standing(self.world.instants, _ROUND_ENDS):
                arm(self.world.instants, _ROUND_ENDS)
                before = len(store.checkpoints(RUN))
                for line in self.lines:
                    line.begin_round()
                going = [pool.submit(fault, line) for fault, line in zip(faults, self.lines, strict=True)]
            try:
                told = self._watch(store, before, self.lines[asked].site, going)
            finally:
                for line in self.lines:
                    line.over.set()
                    line.proxy.mend()
            for fault in going:
                fault.result()
            self.reference.compare(store)
        return told

    def _watch(self, store: SqlStore, before: int, asked: str, going: Sequence[Future[None]]) -> Told:
        """Wait for the commit of the round, and ask as operators do."""
        at_site, unseen_s = set(), 0.0
        until = time.monotonic() + _ROUND_WITHIN_S
        ask_at = time.monotonic() + _ASKED_EVERY_S
        while len(store.checkpoints(RUN)) == before:
            self.made.watch(self.world.told.append)
            for fault in going:
                if fault.done():
                    fault.result()
            assert time.monotonic() < until, self.report()
            if time.monotonic() >= ask_at:
                at_site.add(self.made.site_command(asked, "status")["control"]["code"] or "")
                (seen,) = [row["last_seen_at"] for row in self.made.server_command("sites", "list") if row["site"] == asked]
                unseen_s = max(unseen_s, time.time() - seen)
                ask_at = time.monotonic() + _ASKED_EVERY_S
            time.sleep(_TICK_S)
        return Told(frozenset(at_site), unseen_s)

    def report(self) -> str:
        """What the processes said in this round."""
        said = [f"-- {line.site}, {name}\n{line.said(name)[-3000:]}" for line in self.lines for name in ("runner", "agent", "supernode")]
        return "\n".join([*self.world.told, *said])


@pytest.fixture(scope="module")
def running(world: World, undisturbed: Ended) -> Iterator[Running]:
    """The run that the tests share; the last site is behind a wire, where a network namespace is permitted."""
    updates = ServerHome(world.out / "server").record(RUN) / "updates"
    sizes = {
        "base_state": undisturbed.checkpoints[0].state_bytes,
        "update": max(file.stat().st_size for file in updates.rglob("*") if file.is_file()),
    }
    with ExitStack() as stack:
        wire = None
        with suppress(pytest.skip.Exception):  # it is not permitted here, and the test of the wire says so
            wire = stack.enter_context(building())
        lines = []
        for one, place in zip(world.hospitals, (None, None, wire), strict=True):
            proxy = stack.enter_context(fault_proxy(host="127.0.0.1" if place is None else place.outside))
            logs = SiteHome(world.out / "sites" / one.name).logs
            lines.append(Line(one.name, proxy, world.instants, building=place, logs=logs, **sizes))
        world.within = {line.site: line.within() for line in lines}
        made = stack.enter_context(world.again())
        arm(world.instants, _ROUND_ENDS)
        yield Running(world, made, lines, Conductor(world, made, [], reference=undisturbed.checkpoints))


def was_cut(line: Line) -> bool:
    """Whether the site said in this round that a transfer was cut, with the code of the reason."""
    return f"a transfer was cut ({AWAY}); it goes on from where it was" in line.said("runner")


def test_a_line_that_is_cut_while_its_site_trains_one_of_a_megabit_and_one_that_is_far_away(running: Running) -> None:
    told = running.play(line_faults.cut_while_it_trains, line_faults.one_megabit, line_faults.far_away)
    cut, slow, far = running.lines
    assert AWAY in told.at_site
    assert told.unseen_s > line_faults.CUT_S / 2
    assert was_cut(cut), running.report()
    assert f"{AWAY} the server cannot be reached" in cut.said("relay")
    for line in (slow, far):
        assert not was_cut(line), "a line that is slow or long is used, and not given up"
        assert AWAY not in line.said("relay") + line.said("agent")
        assert line.carried("down") < 1.1 * line.base_state
        assert line.carried("up") < 1.2 * line.update


def test_lines_that_are_cut_and_half_open_while_an_update_travels_and_one_that_is_silent(running: Running) -> None:
    faults = (line_faults.cut_while_the_update_travels, line_faults.half_open_for_good, line_faults.silent_for_a_minute)
    running.play(*faults)
    for line in running.lines:
        assert was_cut(line), running.report()
        assert line.carried("up") < 2 * line.update, "what has arrived is not sent again"


def test_lines_that_are_reset_in_mid_shard_and_a_wire_that_is_down(running: Running) -> None:
    *_, wired = running.lines
    last = line_faults.reset_in_mid_shard if wired.building is None else line_faults.wire_down
    running.play(line_faults.reset_in_mid_shard, line_faults.reset_in_mid_shard, last)
    for line in running.lines:
        assert was_cut(line), running.report()
        assert line.carried("down") < 1.5 * line.base_state
    if wired.building is None:
        pytest.skip("no wire was cut: that needs the right to make a network namespace, as root has it, and the command `ip`")


def test_every_line_is_cut_while_all_sites_train(running: Running) -> None:
    told = running.play(*[line_faults.cut_while_it_trains] * len(running.lines), asked=1)
    assert AWAY in told.at_site
    assert all(was_cut(line) for line in running.lines), running.report()


def test_the_run_ends_as_one_whose_lines_were_never_disturbed(
    running: Running, undisturbed: Ended, world: World, processes_of: Callable[[Path], object]
) -> None:
    with standing(world.instants, _ROUND_ENDS):
        pass
    assert running.reference.drive(_ROUND_WITHIN_S) is RunState.FINISHED, running.report()
    assert doubles(running.made) == [], running.report()
    assert world.ended(running.made) == undisturbed, running.report()
    running.made.stop()
    assert not processes_of(world.out)
