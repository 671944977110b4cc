"""An enrolled site with genuine keys and certificate does another hostile thing in each round of a run, on the bulk plane and in Flower's
messages, between real processes. Each time it gets a code, the round is committed without it, and in the end it is suspended.

What it does is listed in `hostile_site.TURNS`. `make chaos` runs it.
"""

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hostile_site
import pytest
import torch
from hostile_site import TURNS
from kill_world import KINDS, bring_together, find, matrix_plan, write_trust
from tests.chaos.conftest import CHAOS
from tests.end_to_end.conftest import processes_of, wait_for

from pathfed_client.answering import SiteAnswerer
from pathfed_client.bulk import SiteBulk
from pathfed_client.transport import flower_client
from pathfed_client.transport.channel import Calls
from pathfed_common.encoder import weights
from pathfed_common.ids import RunName
from pathfed_local.consortium import Consortium, find_hospitals
from pathfed_server.db.sql_store import SqlStore
from pathfed_server.home import ServerHome
from pathfed_server.rounds.refusals import FAULTS
from pathfed_server.rounds.state import RoundState, RunState

pytestmark = pytest.mark.timeout(1800)
long = pytest.mark.skipif(not CHAOS, reason="runs with `make chaos`")
RUN = RunName("besieged")
HOOK = Path(hostile_site.__file__).parent / "hostile"
#: The turns, and a round after the suspension.
ROUNDS = len(TURNS) + 1
SUSPEND_AFTER = sum(turn.code in FAULTS for turn in TURNS)
_WITHIN_S = 300.0
_RUN_WITHIN_S = 1000.0
_TICK_S = 0.3
#: What a process of the server may have grown by at its peak, from the first round to the last, MB. A single act sends far more.
_MOST_GROWTH_MB = 100.0


@dataclass
class Siege:
    """The consortium with its run at its end, and what was seen on the way.

    Attributes:
        made: the consortium.
        hostile: name of the hostile site.
        honest: names of the others.
        folder: where the hostile site notes what it is answered.
        pids: process ids of the server's processes after the first round, by kind.
        peaks: their memory's peaks then, MB.
        last_peaks: the same when they were last seen.
        told: the codes of the hostile site's rounds, as its own `pathfed-site status` tells them.
        said: what the processes said.
    """

    made: Consortium
    hostile: str
    honest: tuple[str, ...]
    folder: Path
    pids: dict[str, list[int]] = field(default_factory=dict)
    peaks: dict[int, float] = field(default_factory=dict)
    last_peaks: dict[int, float] = field(default_factory=dict)
    told: dict[int, str] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)

    def server_processes(self) -> dict[str, list[int]]:
        kinds = [kind for kind, (_, side) in KINDS.items() if side == "server"]
        return {kind: sorted(process.pid for process in find(self.made, kind, "server")) for kind in kinds}

    def look(self) -> RunState:
        """See how far the run is; take note of what is to be compared later."""
        self.made.watch(self.said.append)
        with SqlStore(ServerHome(self.made.server).database_url) as store:
            done = len(store.checkpoints(RUN)) - 1
            state = store.run(RUN).state
        if done >= 1 and not self.pids:
            self.pids = self.server_processes()
            self.peaks = self.peaks_now()
        if self.pids:
            self.last_peaks |= self.peaks_now()
        if done >= 8 and not self.told:
            self.ask_site()
        return state

    def peaks_now(self) -> dict[int, float]:
        found = {}
        for pid in (pid for pids in self.pids.values() for pid in pids):
            with suppress(OSError, IndexError):
                found[pid] = peak_mb(pid)
        return found

    @property
    def codes(self) -> dict[int, str | None]:
        """What the server says of the hostile site, by round."""
        return dict(enumerate((*(turn.code for turn in TURNS), "PF565"), 1))

    def ask_site(self) -> Mapping[str, Any]:
        status: dict[str, Any] = self.made.site_command(self.hostile, "status")
        self.told |= {row["round_index"]: row["code"] for row in status["rounds"]}
        return status


def peak_mb(pid: int) -> float:
    """The largest resident memory that a process has had."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    return int(status.split("VmHWM:")[1].split()[0]) / 1000


def _start_hostile(made: Consortium, name: str, folder: Path, accomplice: str) -> None:
    """Start the site with its runner turned: its processes inherit these variables, nobody else's do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(HOOK), os.environ.get("PYTHONPATH")))))
        patch.setenv(hostile_site.FOLDER_VARIABLE, str(folder))
        patch.setenv(hostile_site.ACCOMPLICE_VARIABLE, str(made.site(accomplice)))
        made.start_site(name)


@pytest.fixture(scope="module")
def siege(tmp_path_factory, hospitals) -> Iterator[Siege]:
    folder = tmp_path_factory.mktemp("siege")
    made = Consortium(folder / "out", find_hospitals(hospitals, 3))
    *honest, hostile = (one.name for one in made.hospitals)
    found = Siege(made, hostile, tuple(honest), folder / "hostile")
    found.folder.mkdir()

    def start() -> None:
        for name in honest:
            made.start_site(name)
        _start_hostile(made, hostile, found.folder, honest[0])

    plan = matrix_plan(ROUNDS).replace("quorum = 3", "quorum = 2").replace("deadline_s = 900", "deadline_s = 120")
    try:
        digest = bring_together(made, plan, settings=("suspend_after = 3", f"suspend_after = {SUSPEND_AFTER}"), start=start)
        made.server_command("run", "start", digest, "--name", RUN)
        until = time.monotonic() + _RUN_WITHIN_S
        while found.look() in (RunState.PLANNED, RunState.RUNNING) and time.monotonic() < until:
            time.sleep(_TICK_S)
        yield found
    finally:
        made.stop()
    assert not wait_for(lambda: processes_of(folder), until=lambda left: not left, within_s=60)


def test_what_is_turned_is_in_the_program() -> None:
    """A function that was renamed would leave the site honest, or unable to play a turn."""
    assert all(callable(function) for function in (SiteAnswerer.__call__, flower_client._content, SiteBulk._connected, Calls.send))
    assert len({turn.act for turn in TURNS}) == len(TURNS)
    assert SUSPEND_AFTER > 3


@long
def test_every_round_is_committed_with_the_honest_sites_alone(siege: Siege) -> None:
    with SqlStore(ServerHome(siege.made.server).database_url) as store:
        assert store.run(RUN).state is RunState.FINISHED, siege.said
        assert store.run(RUN).attempt == 1, "the round loop was never begun anew"
        assert [row.state for row in store.rounds(RUN)] == [RoundState.COMMITTED] * ROUNDS
        rows = [store.participations(RUN, index) for index in range(1, ROUNDS + 1)]
        statements = store.statements(RUN)
    assert {index: {row.site: row.code for row in each} for index, each in enumerate(rows, 1)} == {
        index: {**dict.fromkeys(siege.honest), siege.hostile: code} for index, code in siege.codes.items()
    }
    assert [row.round_index for row in statements if row.site == siege.hostile] == [1], "its honest round alone"
    assert len(statements) == 2 * ROUNDS + 1


@long
def test_what_it_tries_on_the_bulk_port_is_answered_with_a_code_and_leaves_the_round_as_it_was(siege: Siege) -> None:
    lines = (siege.folder / hostile_site.ANSWERED).read_text().splitlines()
    found = {line["round"]: (line["trial"], line["answered"]) for line in map(json.loads, lines)}
    assert found == {index: (turn.trial.__name__, turn.answered) for index, turn in enumerate(TURNS, 1) if turn.trial is not None}


@long
def test_the_operator_sees_each_refusal_and_the_suspension(siege: Siege) -> None:
    aside = siege.made.server_command("quarantine", "list", RUN)
    assert {row["round"]: (row["site"], row["code"]) for row in aside} == {
        index: (siege.hostile, turn.code) for index, turn in enumerate(TURNS, 1) if turn.code and turn.sends_update
    }
    shown = {row["round"]: row["sites"] for row in siege.made.server_command("rounds", RUN)}
    assert {index: sites[siege.hostile]["code"] for index, sites in shown.items()} == siege.codes
    rows = {row["site"]: row for row in siege.made.server_command("sites", "list")}
    assert [site for site, row in rows.items() if row["suspended_at"] is not None] == [siege.hostile]
    assert {site: row["rounds"] for site, row in rows.items()} == {**dict.fromkeys(siege.honest, ROUNDS), siege.hostile: 1}
    assert rows[siege.hostile]["last_refusal"]["code"] == TURNS[-1].code


@long
def test_the_hostile_site_is_told_the_same(siege: Siege) -> None:
    status = wait_for(siege.ask_site, until=lambda status: status["control"]["suspended"], within_s=_WITHIN_S)
    assert status["control"]["suspended"] is True
    assert siege.told == {index: code or "" for index, code in siege.codes.items() if code != "PF565"}, "it is not asked any more"


@long
def test_the_encoder_is_finite_and_the_release_is_proven_by_replay(siege: Siege) -> None:
    made, out = siege.made, siege.made.out / "release"
    made.server_command("release", "create", RUN, "--out", out, "--wait", "180")
    tensors = weights.load((out / "encoder" / "model.safetensors").read_bytes())
    assert tensors
    assert all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values())
    updates = ServerHome(made.server).record(RUN) / "updates"
    made.finish(made.begin("pathfed", "verify", out, "--trust", write_trust(made), "--replay", updates))


@long
def test_no_process_of_the_server_died_or_grew(siege: Siege) -> None:
    ended = {"round loop": siege.pids["round loop"]}  # with its run
    assert all(siege.pids.values()), siege.pids
    assert siege.server_processes() | ended == siege.pids, siege.said
    assert [line for line in siege.said if line.startswith("server: PF")] == []
    kinds = {pid: kind for kind, pids in siege.pids.items() for pid in pids}
    grown = {kinds[pid]: siege.last_peaks[pid] - peak for pid, peak in siege.peaks.items()}
    print("MB that the peaks have grown by:", grown, "from", {kinds[pid]: peak for pid, peak in siege.peaks.items()})
    assert max(grown.values()) < _MOST_GROWTH_MB, grown
