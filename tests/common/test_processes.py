"""Real processes throughout."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pathfed_common.errors import ErrorCode, HostError
from pathfed_common.processes import (
    ProcessEnd,
    ProcessSpec,
    Supervisor,
    accepts_connections,
    end_all,
    free_port,
    require_free_port,
    start_owned,
)


@pytest.fixture
def supervisor() -> Iterator[Supervisor]:
    made = Supervisor()
    yield made
    made.stop(grace_s=0.5)


@pytest.fixture
def spec(tmp_path: Path) -> Callable[..., ProcessSpec]:
    def make(script: str, **options: Any) -> ProcessSpec:
        return ProcessSpec(**{"name": "child", "argv": ["sh", "-c", script], "log": tmp_path / "logs" / "child.log", **options})

    return make


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def eventually(holds: Callable[[], bool], within_s: float = 60.0) -> bool:
    until = time.monotonic() + within_s
    while not holds():
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True


def noted(ends: list[ProcessEnd], supervisor: Supervisor) -> list[ProcessEnd]:
    ends.extend(supervisor.poll())
    return ends


def test_a_child_that_gets_ready_is_waited_for(supervisor, spec, tmp_path):
    mark = tmp_path / "ready"
    supervisor.start(spec(f"sleep 0.2; touch {mark}; exec sleep 60", ready=mark.exists))
    assert mark.exists()
    assert alive(supervisor.pids()["child"])
    supervisor.stop()
    assert supervisor.pids() == {}


def test_a_child_that_ends_before_it_is_ready_is_told_with_its_last_words(supervisor, spec):
    with pytest.raises(HostError) as caught:
        supervisor.start(spec("echo out; echo the disk is on fire >&2; exit 7", ready=lambda: False))
    assert caught.value.code is ErrorCode.PROCESS_ENDED
    assert "status 7" in caught.value.what
    assert caught.value.value == "out / the disk is on fire"


def test_a_child_that_does_not_get_ready_in_time_is_told_and_ended_with_the_rest(supervisor, spec):
    with pytest.raises(HostError, match=r"PF903.*not ready within 0\.2 s"):
        supervisor.start(spec("exec sleep 60", ready=lambda: False, ready_within_s=0.2))
    (pid,) = supervisor.pids().values()
    supervisor.stop()
    assert not alive(pid)


def test_a_command_that_is_missing_is_told(supervisor, spec):
    with pytest.raises(HostError) as caught:
        supervisor.start(spec("", argv=["/nowhere/no-such-command"]))
    assert caught.value.code is ErrorCode.TOOL_MISSING
    assert caught.value.where == "/nowhere/no-such-command"


def test_a_child_that_ends_is_started_again_as_often_as_allowed(supervisor, spec, tmp_path):
    supervisor.start(spec(f"echo x >> {tmp_path}/starts; exit 3", restarts=2, restart_delay_s=0.05))
    ends: list[ProcessEnd] = []
    assert eventually(lambda: len(noted(ends, supervisor)) == 3)
    assert [end.restarted for end in ends] == [True, True, False]
    assert all(end.status == 3 for end in ends)
    assert (tmp_path / "starts").read_text() == "x\n" * 3
    assert supervisor.pids() == {}
    assert supervisor.poll() == []


def test_a_restart_waits_for_its_delay(supervisor, spec, tmp_path):
    supervisor.start(spec(f"echo x >> {tmp_path}/starts; exec sleep 60", restarts=1, restart_delay_s=0.4))
    assert eventually(lambda: (tmp_path / "starts").exists())
    os.kill(supervisor.pids()["child"], signal.SIGKILL)
    ends: list[ProcessEnd] = []
    began = time.monotonic()
    assert eventually(lambda: bool(noted(ends, supervisor)))
    assert ends[0].status == -signal.SIGKILL
    assert "signal 9" in ends[0].error().what
    assert supervisor.pids() == {}
    assert eventually(lambda: supervisor.poll() == [] and bool(supervisor.pids()))
    assert time.monotonic() - began >= 0.4
    assert eventually(lambda: (tmp_path / "starts").read_text() == "x\n" * 2)


def test_a_child_that_will_not_end_is_killed_after_its_grace(supervisor, spec, tmp_path):
    ready = tmp_path / "ready"
    supervisor.start(spec(f"trap '' TERM; touch {ready}; while :; do sleep 0.02; done", ready=ready.exists))
    (pid,) = supervisor.pids().values()
    began = time.monotonic()
    supervisor.stop(grace_s=0.3)
    assert time.monotonic() - began >= 0.3
    assert not alive(pid)


@pytest.mark.parametrize("how", ["stopped", "killed before", "ended before"])
def test_what_a_child_started_ends_with_it(supervisor, spec, tmp_path, how):
    """Superexec leaves the round loop's process behind when it is killed: nobody else would end that."""
    note = tmp_path / "grandchild"
    supervisor.start(spec(f"sleep 60 & echo $! > {note}.new; mv {note}.new {note}; wait", ready=note.exists, restarts=1))
    grandchild = int(note.read_text())
    if how != "stopped":
        os.kill(supervisor.pids()["child"], signal.SIGKILL)
        assert eventually(lambda: not alive(supervisor.pids().get("child", -1)))
    if how == "ended before":
        assert eventually(lambda: bool(supervisor.poll()))
    supervisor.stop()
    assert eventually(lambda: not alive(grandchild))


def test_stopping_twice_is_harmless(supervisor, spec):
    supervisor.start(spec("exec sleep 60"))
    supervisor.stop()
    supervisor.stop()


def test_children_of_an_owner_killed_without_a_word_end(tmp_path):
    script = f"""
import time
from pathlib import Path
from pathfed_common.processes import ProcessSpec, Supervisor
supervisor = Supervisor()
for name in ("a", "b"):
    supervisor.start(ProcessSpec(name=name, argv=["sleep", "60"], log=Path({str(tmp_path)!r}) / "log"))
print(*supervisor.pids().values(), flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        pids = [int(text) for text in owner.stdout.readline().split()]
        assert len(pids) == 2
        assert all(alive(pid) for pid in pids)
        owner.kill()
    assert eventually(lambda: not any(alive(pid) for pid in pids))


def test_a_command_begun_beside_others_ends_with_its_owner_and_on_demand(tmp_path):
    script = """
import time
from pathfed_common.processes import start_owned
print(start_owned(["sleep", "60"]).pid, flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        pid = int(owner.stdout.readline())
        assert alive(pid)
        owner.kill()
    assert eventually(lambda: not alive(pid))
    with start_owned(["sh", "-c", "sleep 60 & echo $!; wait"], stdout=subprocess.PIPE, text=True) as command:
        assert command.stdout is not None
        grandchild = int(command.stdout.readline())
        end_all([command], grace_s=10)
        assert command.returncode == -signal.SIGTERM
    assert eventually(lambda: not alive(grandchild))


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM"])
def test_an_interrupt_that_comes_while_the_owner_forks_is_not_lost(number):
    """Python runs its handler in the first fork handler, and throws away what is raised there."""
    script = f"""
import os, signal
from pathfed_common.interrupts import end_on_terminate
from pathfed_common.processes import start_owned
end_on_terminate()
os.register_at_fork(after_in_parent=lambda: os.kill(os.getpid(), signal.{number}))
try:
    start_owned(["true"])
    print("lost")
except KeyboardInterrupt:
    print("heeded")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "heeded\n"


def test_ctrl_c_reaches_the_owner_alone(supervisor, spec):
    """A child in the owner's group would get the terminal's signal too, and end before its owner ends it in order."""
    supervisor.start(spec("exec sleep 60"))
    (pid,) = supervisor.pids().values()
    assert os.getpgid(pid) == pid != os.getpgid(0)
    assert os.getsid(pid) == pid


def test_logs_are_appended_to_and_the_environment_is_added(supervisor, spec, tmp_path):
    for word in ("one", "two"):
        supervisor.start(spec('echo "$WORD $HOME"', environment={"WORD": word}))
    log = tmp_path / "logs" / "child.log"
    home = os.environ.get("HOME", "")
    assert eventually(lambda: sorted(log.read_text().splitlines()) == [f"one {home}", f"two {home}"])


def test_a_port_in_use_is_told_and_a_free_one_is_not():
    with contextlib.closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        assert accepts_connections("127.0.0.1", port)
        with pytest.raises(HostError) as caught:
            require_free_port("127.0.0.1", port)
        assert caught.value.code is ErrorCode.PORT_IN_USE
        assert caught.value.value == f"127.0.0.1:{port}"
    # A port that was let go may be taken by any program of this machine: several are looked at.
    assert eventually(lambda: not accepts_connections("127.0.0.1", free_port()), within_s=10)


def test_a_port_that_is_let_go_in_time_is_waited_for():
    with contextlib.closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        letting_go = threading.Timer(0.3, listener.close)
        letting_go.start()
        require_free_port("127.0.0.1", port, within_s=60)
        letting_go.join()


def test_a_port_that_is_not_let_go_is_told_when_the_time_is_over():
    with contextlib.closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        began = time.monotonic()
        with pytest.raises(HostError, match="PF902"):
            require_free_port("127.0.0.1", listener.getsockname()[1], within_s=0.2)
        assert time.monotonic() - began >= 0.2


def test_an_address_of_another_machine_cannot_be_listened_on():
    with pytest.raises(HostError, match="PF902"):
        require_free_port("192.0.2.1", 1)


def test_free_ports_can_be_listened_on():
    ports = {free_port() for _ in range(5)}
    assert all(1024 <= port <= 65535 for port in ports)
    assert eventually(lambda: can_be_listened_on(free_port()), within_s=10)


def can_be_listened_on(port: int) -> bool:
    try:
        require_free_port("127.0.0.1", port)
    except HostError:
        return False
    return True


def test_a_long_life_begins_the_count_of_restarts_anew(supervisor, spec):
    supervisor.start(spec("sleep 0.3", restarts=1, restart_delay_s=0.0, steady_s=0.1))
    ends: list[ProcessEnd] = []
    assert eventually(lambda: len(noted(ends, supervisor)) >= 4)
    assert all(end.restarted for end in ends)


def test_short_lives_add_up_to_an_end_for_good(supervisor, spec):
    supervisor.start(spec("exit 3", restarts=2, restart_delay_s=0.0))
    ends: list[ProcessEnd] = []
    assert eventually(lambda: len(noted(ends, supervisor)) >= 3)
    assert [end.restarted for end in ends] == [True, True, False]
