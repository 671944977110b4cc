"""`pathfed-server start`: owns Flower's processes and opens a Flower run for every run of ours that should go on.

The truth about runs is in the metadata database; Flower is an engine that may be restarted at will. The daemon compares the two once a
second: a run that should go on (`machine.OPEN`) and has no living Flower run gets one (an attempt), and the round loop inside it goes on
from the last committed round. A run whose attempts keep ending early is marked failed, visibly.
"""

import json
import os
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from pathfed_common import files
from pathfed_common.errors import ErrorCode, HostError, RoundError
from pathfed_common.ids import RunName
from pathfed_common.processes import ProcessEnd, Supervisor
from pathfed_server.control import control_process
from pathfed_server.db.rows import RunRow
from pathfed_server.db.sql_store import SqlStore
from pathfed_server.home import ServerHome
from pathfed_server.notifying.notifier import notifier_processes
from pathfed_server.rounds.machine import OPEN
from pathfed_server.rounds.state import RunState, SiteState
from pathfed_server.transport.engine import LOOPBACK, EngineFiles, start_engine
from pathfed_server.transport.flower_control import FlowerControl, node_key

HOME_VARIABLE = "PATHFED_SERVER_HOME"
#: Flower runs opened for one run of ours before it is given up, counted since its last committed round.
ATTEMPTS = 3
_TICK_S = 0.25
_RECONCILE_S = 1.0  # each asks SuperLink, which has rounds to carry
#: Seconds without an answer after which a SuperLink that lives counts as hung, and is killed. A database may be locked for two minutes.
_HUNG_S = 180.0

Tell = Callable[[str], None]


@dataclass
class _Attempt:
    flower_run: int
    opened: int = 1
    committed: int = 0


@dataclass
class _Daemon:
    home: ServerHome
    store: SqlStore
    control: FlowerControl
    tell: Tell
    attempts: dict[RunName, _Attempt] = field(default_factory=dict)
    #: When SuperLink last did not fail to answer, monotonic seconds.
    answered: float = field(default_factory=time.monotonic)

    def reconcile(self) -> None:
        """Bring SuperLink's node keys and runs in line with the database."""
        enrolled = [site for site in self.store.sites() if site.state is SiteState.ENROLLED]
        self.control.ensure_nodes(node_key(site.flower_key) for site in enrolled)
        for run in self.store.runs():
            if run.state in OPEN:
                self._keep_going(run)
            elif run.name in self.attempts:
                self._close(run)

    def _keep_going(self, run: RunRow) -> None:
        attempt = self.attempts.get(run.name)
        if attempt is None:
            self.attempts[run.name] = _Attempt(self._open(run))
            self.tell(f"run {run.name}: started")
            return
        status, sub_status = self.control.run_status(attempt.flower_run)
        alive = server_app_alive(self.home, run.name, attempt.flower_run)
        if status in ("pending", "starting") or (status == "running" and alive is not False):
            return
        if status == "running":
            self.control.stop_run(attempt.flower_run)
            sub_status = "its process ended"
        self._again(run, attempt, sub_status)

    def _again(self, run: RunRow, attempt: _Attempt, why: str) -> None:
        run = self.store.run(run.name)
        if run.state not in OPEN:
            return
        committed = len(self.store.checkpoints(run.name))
        attempt.opened = 1 if committed > attempt.committed else attempt.opened + 1
        attempt.committed = committed
        if attempt.opened > ATTEMPTS:
            why = f"given up after {ATTEMPTS} attempts without a committed round; see logs/server-app.log"
            self.tell(f"{ErrorCode.RUN_FAILED.value} run {run.name}: {why}")
            self.store.give_up(run.name, code=ErrorCode.RUN_FAILED.value, at=time.time())
            return
        self.tell(
            f"{ErrorCode.PROCESS_ENDED.value} run {run.name}: the round loop ended early ({why}); it goes on from the last committed round"
        )
        forget_server_apps(self.home, run.name)
        attempt.flower_run = self._open(run)

    def _open(self, run: RunRow) -> int:
        return self.control.start_run({"pathfed-run": run.name})

    def _close(self, run: RunRow) -> None:
        attempt = self.attempts.pop(run.name)
        if run.state in (RunState.STOPPED, RunState.PAUSED) and self.control.run_status(attempt.flower_run)[0] not in (
            "finished",
            "unknown",
        ):
            self.control.stop_run(attempt.flower_run)
        forget_server_apps(self.home, run.name)
        self.tell(f"run {run.name}: {run.state.value}" + (f" ({run.code})" if run.code else ""))


def serve(home: ServerHome, tell: Tell) -> None:
    """Serve until interrupted (Ctrl-C, SIGTERM); then end every process that was started.

    Raises:
        RoundError: the database cannot be reached, or is not at this version's schema.
        HostError: PF902, one of the ports for sites is taken; PF903, a process does not start or will not stay up; PF906, others may
            read a key file; PF904 to PF906, `notify.toml`, or a file that it names, cannot be used.
    """
    for key in (home.tls_key, home.superexec_secret, home.authority_files.key):
        files.read_secret(key)
    notifiers = notifier_processes(home)
    supervisor = Supervisor()
    with SqlStore(home.database_url) as store:
        try:
            port = start_engine(supervisor, _engine_files(home))
            supervisor.start(control_process(home))
            for notifier in notifiers:
                supervisor.start(notifier)
            files.write_atomic(
                home.ports_file, json.dumps({"superlink": port, "fleet": home.settings.fleet_port, "pid": os.getpid()}).encode()
            )
            tell(f"serving sites on {home.settings.host}:{home.settings.fleet_port}")
            with FlowerControl(f"{LOOPBACK}:{port}", home.ca_file) as control:
                _loop(_Daemon(home, store, control, tell), supervisor)
        except KeyboardInterrupt:
            tell("stopping")
        finally:
            supervisor.stop()
            _forget_ports(home)


def _forget_ports(home: ServerHome) -> None:
    """Take back what this process wrote, and nothing that another server of this home, which holds the port, wrote."""
    try:
        mine = json.loads(home.ports_file.read_bytes())["pid"] == os.getpid()
    except (OSError, ValueError, KeyError, TypeError):
        return
    if mine:
        home.ports_file.unlink(missing_ok=True)


def _loop(daemon: _Daemon, supervisor: Supervisor) -> None:
    trouble = ""
    while True:
        trouble = _reconciled(daemon, trouble)
        _end_hung(daemon, supervisor)
        until = time.monotonic() + _RECONCILE_S
        while time.monotonic() < until:
            time.sleep(_TICK_S)
            tell_ends(supervisor.poll(), daemon.tell)


def _reconciled(daemon: _Daemon, before: str) -> str:
    """Reconcile; what is in the way is told once while it lasts, and ends nothing.

    Returns:
        What is in the way, or nothing.
    """
    try:
        daemon.reconcile()
    except httpx.HTTPError as error:
        trouble = f"SuperLink does not answer ({type(error).__name__}); waiting for it"
    except (RoundError, HostError) as error:
        trouble, daemon.answered = str(error), time.monotonic()
    else:
        daemon.answered = time.monotonic()
        return ""
    if trouble != before:
        daemon.tell(trouble)
    return trouble


def _end_hung(daemon: _Daemon, supervisor: Supervisor) -> None:
    """Kill a SuperLink that has not answered for long, though it lives: the supervisor starts it again."""
    if time.monotonic() - daemon.answered < _HUNG_S:
        return
    daemon.answered = time.monotonic()
    process = supervisor.pids().get("superlink")
    if process is not None:
        daemon.tell(f"{ErrorCode.PROCESS_ENDED.value} superlink has not answered for {_HUNG_S:g} s: it is ended")
        os.kill(process, signal.SIGKILL)


def tell_ends(ends: Iterable[ProcessEnd], tell: Tell) -> None:
    """Say which processes ended; raise when one will not be started again.

    Raises:
        HostError: PF903, a process ended for good.
    """
    for end in ends:
        if not end.restarted:
            raise end.error()
        tell(f"{ErrorCode.PROCESS_ENDED.value} {end.name} ended ({end.status}) and is started again; see {end.log}")


def _engine_files(home: ServerHome) -> EngineFiles:
    return EngineFiles(
        ca=home.ca_file,
        certificate=home.tls_certificate,
        key=home.tls_key,
        superexec_secret=home.superexec_secret,
        flower=home.flower,
        logs=home.logs,
        listen=home.settings.listen,
        fleet_port=home.settings.fleet_port,
        app_environment={HOME_VARIABLE: str(home.root.resolve())},
    )


def _server_app_file(home: ServerHome, run: RunName, flower_run: int) -> Path:
    return home.run_folder(run) / f"server-app-{flower_run}.pid"


def note_server_app(home: ServerHome, run: RunName, flower_run: int) -> None:
    """Write this process's id, so that the daemon notices at once when the round loop's process ends.

    Each attempt has a file of its own: the process of one that was given up may come to this line after the next one was opened, and its
    end says nothing about that.
    """
    files.make_folder(home.run_folder(run))
    files.write_atomic(_server_app_file(home, run, flower_run), str(os.getpid()).encode())


def forget_server_apps(home: ServerHome, run: RunName) -> None:
    """Forget the process ids of a run's round loops that ended."""
    for file in home.run_folder(run).glob("server-app*.pid"):
        file.unlink(missing_ok=True)


def server_app_alive(home: ServerHome, run: RunName, flower_run: int) -> bool | None:
    """Whether the round loop's process of an attempt lives; None: it has not said so yet."""
    try:
        pid = int(_server_app_file(home, run, flower_run).read_text())
        os.kill(pid, 0)
    except (FileNotFoundError, ValueError):
        return None
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return not _is_zombie(pid)


def _is_zombie(pid: int) -> bool:
    """A killed child that its parent has not waited for (superexec does not) still has a process id."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (OSError, IndexError):
        return False
