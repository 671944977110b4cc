"""A real `pathfed-server start`, and what it reads off other processes."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from pathfed_common import digest, files
from pathfed_common.errors import ErrorCode, HostError, RoundError
from pathfed_common.ids import RunName
from pathfed_common.processes import ProcessEnd, ProcessSpec, Supervisor, accepts_connections
from pathfed_server import daemon
from pathfed_server.db.sql_store import SqlStore
from pathfed_server.home import ServerHome
from pathfed_server.rounds.state import RunState

RUN = RunName("run-1")
PROGRAM = Path(sys.executable).parent / "pathfed-server"


def command(home: ServerHome) -> list[str]:
    return [str(PROGRAM), "start", "--home", str(home.root), "--json"]


def descendants(pid: int) -> set[int]:
    found: set[int] = set()
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        found |= {int(child)} | descendants(int(child))
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def eventually(holds, within_s: float) -> bool:
    until = time.monotonic() + within_s
    while not holds():
        if time.monotonic() > until:
            return False
        time.sleep(0.1)
    return True


@contextlib.contextmanager
def started(home: ServerHome, log: Path) -> Iterator["subprocess.Popen[bytes]"]:
    with log.open("wb") as out, subprocess.Popen(command(home), stdout=out, stderr=subprocess.STDOUT) as process:
        try:
            assert eventually(lambda: home.ports_file.exists() or process.poll() is not None, 60), log.read_text()
            assert process.poll() is None, log.read_text()
            yield process
        finally:
            process.terminate()


def test_a_server_serves_alone_and_ends_all_it_started(server_home, tmp_path):
    """Also where Flower's own database was damaged."""
    log = tmp_path / "server.log"
    secret = server_home.root / "keys" / "pager.secret"
    files.write_atomic(secret, b"0123456789abcdef", secret=True)
    (server_home.root / "notify.toml").write_text(f'[webhook.pager]\nurl = "http://127.0.0.1/"\nsecret_file = "{secret}"\n')
    (server_home.flower / "superlink.db").write_bytes(b"this is no database " * 500)
    with started(server_home, log) as process:
        ports = json.loads(server_home.ports_file.read_text())
        assert ports["pid"] == process.pid
        assert accepts_connections("127.0.0.1", server_home.settings.fleet_port)
        children = descendants(process.pid)
        assert len(children) >= 3
        assert any(b"notifying.notifier" in Path(f"/proc/{child}/cmdline").read_bytes() for child in children)
        assert (server_home.flower / "superlink.db.damaged").exists()

        second = subprocess.run(command(server_home), capture_output=True, text=True, timeout=60, check=False)
        assert (second.returncode, json.loads(second.stdout.splitlines()[-1])["error"]["code"]) == (19, "PF902")
        # The one that holds the port still stands, and says where.
        assert json.loads(server_home.ports_file.read_text()) == ports
        assert accepts_connections("127.0.0.1", server_home.settings.fleet_port)

        os.kill(process.pid, signal.SIGINT)
        assert process.wait(30) in (0, 130)
    assert eventually(lambda: not any(alive(pid) for pid in children), 10)
    assert not server_home.ports_file.exists()
    assert not accepts_connections("127.0.0.1", server_home.settings.fleet_port)
    assert "Traceback" not in log.read_text()


def test_the_round_loops_process_is_known_by_its_number(server_home):
    assert daemon.server_app_alive(server_home, RUN, 1) is None
    daemon.note_server_app(server_home, RUN, 1)
    assert daemon.server_app_alive(server_home, RUN, 1) is True
    daemon.forget_server_apps(server_home, RUN)
    daemon.forget_server_apps(server_home, RUN)
    assert daemon.server_app_alive(server_home, RUN, 1) is None


def test_a_round_loop_that_ended_is_noticed_also_as_a_zombie(server_home):
    note = server_home.run_folder(RUN) / "server-app-1.pid"
    note.parent.mkdir(parents=True)
    with subprocess.Popen(["sleep", "60"]) as process:
        note.write_text(str(process.pid))
        assert daemon.server_app_alive(server_home, RUN, 1) is True
        process.kill()
        # Nobody has waited for it yet.
        assert eventually(lambda: daemon.server_app_alive(server_home, RUN, 1) is False, 5)
    assert daemon.server_app_alive(server_home, RUN, 1) is False


@pytest.mark.parametrize("text", ["", "nonsense"])
def test_a_note_that_says_nothing_is_no_answer(server_home, text):
    note = server_home.run_folder(RUN) / "server-app-1.pid"
    note.parent.mkdir(parents=True)
    note.write_text(text)
    assert daemon.server_app_alive(server_home, RUN, 1) is None


def test_an_end_that_is_made_good_is_told_and_one_for_good_is_raised(tmp_path):
    told: list[str] = []
    daemon.tell_ends([ProcessEnd(name="door", status=1, restarted=True, log=tmp_path / "door.log")], told.append)
    assert told == [f"PF903 door ended (1) and is started again; see {tmp_path / 'door.log'}"]
    with pytest.raises(HostError, match="PF903"):
        daemon.tell_ends([ProcessEnd(name="door", status=1, restarted=False, log=tmp_path / "door.log")], told.append)


class FailingEngine:
    """What the daemon uses of Flower's control; every run ends at once, before its loop begins."""

    def ensure_nodes(self, keys: Iterable[bytes]) -> None:
        pass

    def start_run(self, config: dict[str, str]) -> int:
        return 1

    def run_status(self, run: int) -> tuple[str, str]:
        return "finished", "failed"


@contextlib.contextmanager
def planned(home: ServerHome) -> Iterator[SqlStore]:
    """The server's database, with a run that should go on."""
    with SqlStore(home.database_url) as store:
        plan = digest.of_bytes(b"plan")
        store.add_plan(plan, name="plan", canonical=b"{}", signed=b"{}", at=1.0)
        store.create_run(RUN, plan_digest=plan, sites=[], at=1.0)
        yield store


def test_a_run_whose_loop_never_began_is_given_up_and_the_server_goes_on(server_home):
    told: list[str] = []
    with planned(server_home) as store:
        engine: Any = FailingEngine()
        watched = daemon._Daemon(server_home, store, engine, told.append)
        for _ in range(daemon.ATTEMPTS + 2):
            assert daemon._reconciled(watched, "") == ""
        run = store.run(RUN)
        assert (run.state, run.attempt, run.code) == (RunState.FAILED, 0, "PF514")
        assert [event.action for event in store.audit_events()].count("run.failed") == 1
        store.give_up(RUN, code="PF514", at=2.0)
        assert store.run(RUN) == run, "a run that ended stays as it is"
    assert told[-1] == "run run-1: failed (PF514)"


def test_what_the_database_refuses_is_told_once_while_it_lasts(server_home, monkeypatch):
    told: list[str] = []
    with SqlStore(server_home.database_url) as store:
        engine: Any = FailingEngine()
        watched = daemon._Daemon(server_home, store, engine, told.append)

        def refuse() -> None:
            raise RoundError(ErrorCode.DATABASE_UNAVAILABLE, "away")

        trouble = ""
        with monkeypatch.context() as broken:
            broken.setattr(watched, "reconcile", refuse)
            for _ in range(3):
                trouble = daemon._reconciled(watched, trouble)
        assert daemon._reconciled(watched, trouble) == ""
    assert len(told) == 1
    assert "PF512" in told[0]


class RunningEngine(FailingEngine):
    """Every run of its runs until it is stopped."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.stopped: list[int] = []

    def start_run(self, config: dict[str, str]) -> int:
        self.started.append(config["pathfed-run"])
        return len(self.started)

    def run_status(self, run: int) -> tuple[str, str]:
        return ("finished", "stopped") if run in self.stopped else ("running", "")

    def stop_run(self, run: int) -> None:
        self.stopped.append(run)


def test_a_paused_run_is_ended_in_flower_and_opened_again_only_when_resumed(server_home):
    with planned(server_home) as store:
        engine = RunningEngine()
        flower: Any = engine
        daemon_of = daemon._Daemon(server_home, store, flower, lambda line: None)
        daemon_of.reconcile()
        store.begin_attempt(RUN, at=2.0)
        daemon.note_server_app(server_home, RUN, 1)
        assert store.pause_run(RUN, at=3.0) is RunState.PAUSING
        daemon_of.reconcile()
        assert (engine.started, engine.stopped) == ([RUN], []), "its round goes on"
        assert store.pause_run(RUN, now=True, at=4.0) is RunState.PAUSED
        for _ in range(3):
            daemon_of.reconcile()
        assert (engine.started, engine.stopped) == ([RUN], [1])
        again = daemon._Daemon(server_home, store, flower, lambda line: None)
        again.reconcile()
        assert engine.started == [RUN], "nor does a server that starts anew open it"
        store.reopen_run(RUN, at=5.0)
        daemon_of.reconcile()
        assert engine.started == [RUN, RUN]


def test_the_end_of_an_attempts_process_says_nothing_about_the_attempt_after_it(server_home):
    """On a slow machine a round loop that was given up while it was still being loaded came to write its number after that, and ended."""
    ended = subprocess.Popen(["true"])
    ended.wait()
    told: list[str] = []
    with planned(server_home) as store:
        engine = RunningEngine()
        flower: Any = engine
        files.make_folder(server_home.run_folder(RUN))
        earlier = server_home.run_folder(RUN) / "server-app-77.pid"  # an earlier server's, which was killed
        earlier.write_text(str(ended.pid))
        daemon_of = daemon._Daemon(server_home, store, flower, told.append)
        for _ in range(3):
            daemon_of.reconcile()
        assert (engine.started, engine.stopped) == ([RUN], []), told
        (server_home.run_folder(RUN) / "server-app-1.pid").write_text(str(ended.pid))
        daemon_of.reconcile()
        assert (engine.started, engine.stopped) == ([RUN, RUN], [1]), "its own end does"
        (server_home.run_folder(RUN) / "server-app-1.pid").write_text(str(ended.pid))
        for _ in range(3):
            daemon_of.reconcile()
        assert (engine.started, engine.stopped) == ([RUN, RUN], [1]), told


def test_a_superlink_that_has_lost_its_database_is_given_the_run_again(server_home):
    told: list[str] = []
    with planned(server_home) as store:
        engine = RunningEngine()
        flower: Any = engine
        daemon_of = daemon._Daemon(server_home, store, flower, told.append)
        daemon_of.reconcile()
        engine.run_status = lambda run: ("unknown", "SuperLink knows it no more") if run == 1 else ("running", "")
        for _ in range(3):
            daemon_of.reconcile()
        assert (engine.started, engine.stopped) == ([RUN, RUN], [])
        assert "ended early (SuperLink knows it no more)" in told[-1]


def test_a_superlink_that_lives_and_does_not_answer_is_ended_and_started_again(server_home, tmp_path, monkeypatch):
    monkeypatch.setattr(daemon, "_HUNG_S", 0.2)
    told: list[str] = []
    supervisor = Supervisor()
    supervisor.start(ProcessSpec(name="superlink", argv=["sleep", "60"], log=tmp_path / "log", restarts=1, restart_delay_s=0.0))
    hung = supervisor.pids()["superlink"]

    def no_answer() -> None:
        raise httpx.ReadTimeout("hung")

    try:
        with SqlStore(server_home.database_url) as store:
            engine: Any = FailingEngine()
            watched = daemon._Daemon(server_home, store, engine, told.append)
            assert daemon._reconciled(watched, "") == ""
            daemon._end_hung(watched, supervisor)
            assert alive(hung), "it has just answered"
            monkeypatch.setattr(watched, "reconcile", no_answer)
            time.sleep(0.3)
            daemon._reconciled(watched, "")
            daemon._end_hung(watched, supervisor)
        ends: list[ProcessEnd] = []

        def is_back() -> bool:
            ends.extend(supervisor.poll())
            return bool(ends) and "superlink" in supervisor.pids()

        assert eventually(is_back, 20)
        assert [(end.status, end.restarted) for end in ends] == [(-9, True)]
        assert supervisor.pids()["superlink"] != hung
        assert any("has not answered" in line for line in told)
    finally:
        supervisor.stop(grace_s=0.5)
