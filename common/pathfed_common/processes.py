"""Child processes that are owned: started in order, watched, restarted, stopped, and never left behind.

An edge that both sides share (docs/decisions/0005): the server owns Flower's SuperLink, path filter and superexec, a site owns its
SuperNode and runner. A child runs in a session of its own, so that Ctrl-C reaches the owner alone, which then stops its children in
reverse order, with whatever they started and left behind in their sessions; and on Linux a child is ended by the kernel when its owner
dies without a word.
"""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pathfed_common import interrupts
from pathfed_common.errors import ErrorCode, HostError

#: Looked up here, not in a child between fork and exec, where loading a library may wait for a lock that no thread will release.
_prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None
_PR_SET_PDEATHSIG = 1
_PORT_POLL_S = 0.1
_READY_POLL_S = 0.05
_LOG_TAIL_LINES = 5
_ORPHANS_GRACE_S = 3.0


@dataclass(frozen=True, kw_only=True)
class ProcessSpec:
    """How one child is run.

    Attributes:
        name: what people call it, in messages.
        argv: the command.
        log: file that its output is appended to.
        environment: variables set on top of the owner's own.
        ready: says whether the child serves; None: it does from the start.
        ready_within_s: seconds after which a child that is not ready counts as failed.
        restarts: how often in a row it is started again after it ended by itself; a life of `steady_s` begins the count anew.
        restart_delay_s: seconds before each new start.
        steady_s: seconds after which a child counts as one that stays up.
    """

    name: str
    argv: Sequence[str]
    log: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    ready: Callable[[], bool] | None = None
    ready_within_s: float = 60.0
    restarts: int = 0
    restart_delay_s: float = 1.0
    steady_s: float = 300.0


@dataclass(frozen=True, kw_only=True)
class ProcessEnd:
    """A child ended by itself.

    Attributes:
        name: the child.
        status: its exit status; negative: ended by that signal.
        restarted: it was, or will be, started again.
        log: where its last words are.
    """

    name: str
    status: int
    restarted: bool
    log: Path

    def error(self) -> HostError:
        """The end as an error."""
        how = f"signal {-self.status}" if self.status < 0 else f"status {self.status}"
        return HostError(
            ErrorCode.PROCESS_ENDED,
            f"{self.name} ended by itself ({how})",
            where=self.log,
            value=_tail(self.log),
            remedy="read its log; a port in use or a missing file is named there",
        )


@dataclass
class _Child:
    spec: ProcessSpec
    process: subprocess.Popen[bytes]
    restarts: int = 0
    restart_at: float | None = None
    began: float = field(default_factory=time.monotonic)

    def start_again(self) -> None:
        """Start it anew."""
        self.restart_at, self.began = None, time.monotonic()
        self.process = _spawn(self.spec)

    def may_restart(self) -> bool:
        """Whether, having ended just now, it is to be started again; counts it."""
        if time.monotonic() - self.began >= self.spec.steady_s:
            self.restarts = 0  # what happens once a month must not add up over a run of months
        if self.restarts >= self.spec.restarts:
            return False
        self.restarts += 1
        self.restart_at = time.monotonic() + self.spec.restart_delay_s
        return True


class Supervisor:
    """Owns children. Not for use from several threads."""

    def __init__(self) -> None:
        self._children: list[_Child] = []
        #: Process groups of children that ended and left something running: superexec leaves the round loop behind, which goes on.
        self._orphaned: set[int] = set()

    def start(self, spec: ProcessSpec) -> None:
        """Start a child and wait until it is ready.

        Raises:
            HostError: PF903, it ended or was not ready in time; PF907, the command does not exist.
        """
        child = _Child(spec, _spawn(spec))
        self._children.append(child)
        if spec.ready is None:
            return
        until = time.monotonic() + spec.ready_within_s
        while not spec.ready():
            status = child.process.poll()
            if status is not None:
                self._children.remove(child)
                self._note_orphans(child)
                raise ProcessEnd(name=spec.name, status=status, restarted=False, log=spec.log).error()
            if time.monotonic() > until:
                raise HostError(
                    ErrorCode.PROCESS_ENDED,
                    f"{spec.name} was not ready within {spec.ready_within_s:g} s",
                    where=spec.log,
                    value=_tail(spec.log),
                )
            time.sleep(_READY_POLL_S)

    def poll(self) -> list[ProcessEnd]:
        """Children that ended since the last call; those with restarts left are started again when their delay is over.

        Raises:
            KeyboardInterrupt: this process was asked to end and goes on all the same; see `interrupts.heed`.
        """
        interrupts.heed()
        ends = []
        for child in list(self._children):
            if child.restart_at is not None:
                if time.monotonic() >= child.restart_at:
                    child.start_again()
                continue
            status = child.process.poll()
            if status is None:
                continue
            self._note_orphans(child)
            again = child.may_restart()
            ends.append(ProcessEnd(name=child.spec.name, status=status, restarted=again, log=child.spec.log))
            if not again:
                self._children.remove(child)
        return ends

    def pids(self) -> dict[str, int]:
        """Process id of each living child by name."""
        return {child.spec.name: child.process.pid for child in self._children if child.restart_at is None and child.process.poll() is None}

    def end(self, names: Collection[str], grace_s: float = 0.0) -> None:
        """End some children for good, by force after `grace_s` seconds, the last started first; they are not started again."""
        chosen = [child for child in reversed(self._children) if child.spec.name in names]
        end_all((child.process for child in chosen if child.restart_at is None), grace_s)
        self._children = [child for child in self._children if child not in chosen]

    def stop(self, grace_s: float = 10.0) -> None:
        """Ask every child to end, the last started first, and end by force those that have not after `grace_s` seconds.

        What they started, and left behind in their sessions, is asked and ended after them.
        """
        children = [child for child in reversed(self._children) if child.restart_at is None]
        until = time.monotonic() + grace_s
        end_all((child.process for child in children), grace_s)
        _end_groups(self._orphaned, until)
        self._children.clear()
        self._orphaned.clear()

    def _note_orphans(self, child: _Child) -> None:
        if _signal_group(child.process.pid, 0):
            self._orphaned.add(child.process.pid)


def start_owned(argv: Sequence[str], **options: Any) -> "subprocess.Popen[Any]":
    """Start a child in a session of its own, which the kernel ends (SIGTERM) when its owner dies (Linux).

    Its owner is the calling thread: call it from the main one. `options` are those of `subprocess.Popen`. An interrupt that comes while
    the process forks takes effect afterwards: Python would raise it inside a fork handler (`os.register_at_fork`), and lose it there.

    Raises:
        FileNotFoundError: no such command.
    """
    owner = os.getpid()
    with interrupts.held():
        return subprocess.Popen(
            list(argv), start_new_session=True, preexec_fn=(lambda: _die_with(owner)) if _prctl is not None else None, **options
        )


def end_all(children: Iterable["subprocess.Popen[Any]"], grace_s: float) -> None:
    """End children of `start_owned`, in the order given: asked first, by force after `grace_s` seconds in all.

    What they started, and left behind in their sessions, is asked and ended after them.
    """
    children = list(children)
    for child in children:
        if child.poll() is None:
            child.terminate()
    until = time.monotonic() + grace_s
    for child in children:
        try:
            child.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            _signal_group(child.pid, signal.SIGKILL)
            child.wait()
    _end_groups([child.pid for child in children], until)


def _spawn(spec: ProcessSpec) -> subprocess.Popen[bytes]:
    spec.log.parent.mkdir(parents=True, exist_ok=True)
    with spec.log.open("ab") as log:
        try:
            return start_owned(
                spec.argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **spec.environment},
            )
        except FileNotFoundError as error:
            raise HostError(ErrorCode.TOOL_MISSING, f"{spec.name} cannot be started: no such command", where=spec.argv[0]) from error


def _die_with(owner: int) -> None:
    if _prctl is not None:
        _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != owner:
        os._exit(1)


def _signal_group(group: int, number: int) -> bool:
    """Signal a process group; whether there was one."""
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def _end_groups(groups: Iterable[int], until: float) -> None:
    """Ask process groups to end, and end by force what has not at `until` (monotonic seconds), or soon: nobody waits for them."""
    until = min(until, time.monotonic() + _ORPHANS_GRACE_S)
    waiting = {group for group in groups if _signal_group(group, signal.SIGTERM)}
    while waiting and time.monotonic() < until:
        time.sleep(_READY_POLL_S)
        waiting = {group for group in waiting if _signal_group(group, 0)}
    for group in waiting:
        _signal_group(group, signal.SIGKILL)


def _tail(log: Path) -> str:
    try:
        lines = log.read_text(errors="replace").strip().splitlines()
    except OSError:
        return ""
    return " / ".join(line.strip() for line in lines[-_LOG_TAIL_LINES:] if line.strip())[-600:]


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port that nobody listens on now. Another process may take it before it is used: starting a child names that error."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def require_free_port(host: str, port: int, within_s: float = 0.0) -> None:
    """Check that a port chosen by a person can be listened on, now or within some seconds: a predecessor may still be closing it.

    Raises:
        HostError: PF902, somebody listens there already.
    """
    until = time.monotonic() + within_s
    while True:
        try:
            return _try_port(host, port)
        except HostError:
            if time.monotonic() >= until:
                raise
        time.sleep(_PORT_POLL_S)


def _try_port(host: str, port: int) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise HostError(
                ErrorCode.PORT_IN_USE,
                f"the port cannot be listened on: {error.strerror}",
                value=f"{host}:{port}",
                remedy="stop what listens there, or choose another port",
            ) from error


def accepts_connections(host: str, port: int) -> bool:
    """Whether something listens on a TCP port."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.settimeout(0.5)
        return probe.connect_ex((host, port)) == 0
