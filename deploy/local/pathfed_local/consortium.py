"""A consortium on one machine: one server and several sites as separate processes, through the same commands people use.

Nothing is reached into: homes are made, plans published and approvals handed over by `pathfed-server` and `pathfed-site`, run as
processes of their own. Every command is written to `commands.log`, so that a reader can repeat it by hand.
"""

import json
import shlex
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pathfed_common import interrupts
from pathfed_common.errors import ErrorCode, HostError, SiteDataError, error_from_dict
from pathfed_common.processes import ProcessSpec, Supervisor, accepts_connections, end_all, start_owned

_RESTARTS = 2
_COMMANDS_GRACE_S = 10.0
#: What a command says that was killed between its work and its last word, when it is begun again: it is done.
_DONE_ALREADY = (ErrorCode.HOME_UNUSABLE, ErrorCode.RUN_EXISTS, ErrorCode.ENROLMENT_UNKNOWN)


@dataclass(frozen=True, kw_only=True)
class Hospital:
    """A hospital's folder: `<folder>/slides/*` and `<folder>/patients.csv`."""

    name: str
    slides: Path
    patients: Path


def find_hospitals(folder: Path, most: int) -> list[Hospital]:
    """The hospitals under a folder, in name order, `most` at the most.

    Raises:
        SiteDataError: PF201, there is none.
        HostError: PF905, two of them would have the same site name.
    """
    found = [
        Hospital(name=_site_name(child.name), slides=child / "slides", patients=child / "patients.csv")
        for child in sorted(folder.iterdir() if folder.is_dir() else [])
        if (child / "slides").is_dir()
    ]
    if not found:
        raise SiteDataError(
            ErrorCode.SLIDE_FOLDER_EMPTY,
            "no hospital is there",
            where=folder,
            remedy="it should hold <hospital>/slides/* and <hospital>/patients.csv",
        )
    names = [hospital.name for hospital in found[:most]]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise HostError(
            ErrorCode.SETTINGS_INVALID, "two hospitals have the same site name", where=folder, value=twice, remedy="rename one folder"
        )
    return found[:most]


def _site_name(folder_name: str) -> str:
    name = "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in folder_name.lower()).strip("-")
    return name[:63].rstrip("-") or "site"


@dataclass(frozen=True)
class _Command:
    """What is needed to begin a command again."""

    argv: Sequence[str]
    secret: str = field(repr=False)


@dataclass
class Consortium:
    """The consortium under one folder.

    Attributes:
        out: the folder: `server/`, `sites/<name>/`, `logs/`, `commands.log`.
        hospitals: its hospitals.
        restarts: how often the server, and each site, is started again after it ended by itself.
    """

    out: Path
    hospitals: Sequence[Hospital]
    restarts: int = _RESTARTS
    _supervisor: Supervisor = field(default_factory=Supervisor, repr=False)
    _read_to: dict[Path, int] = field(default_factory=dict, repr=False)
    _begun: dict["subprocess.Popen[str]", "_Command"] = field(default_factory=dict, repr=False)

    @property
    def server(self) -> Path:
        """The server's home."""
        return self.out / "server"

    def site(self, name: str) -> Path:
        """A site's home."""
        return self.out / "sites" / name

    @property
    def logs(self) -> Path:
        """Logs of the two long-running commands; their children log in their homes."""
        return self.out / "logs"

    def server_command(self, *arguments: str | Path) -> Any:
        """Run a `pathfed-server` command; its result."""
        return self.finish(self.begin("pathfed-server", *arguments, "--home", self.server))

    def site_command(self, site: str, *arguments: str | Path) -> Any:
        """Run a `pathfed-site` command; its result."""
        return self.finish(self.begin_site(site, *arguments))

    def begin_site(self, site: str, *arguments: str | Path, secret: str = "") -> "subprocess.Popen[str]":
        """Begin a `pathfed-site` command beside others."""
        return self.begin("pathfed-site", *arguments, "--home", self.site(site), secret=secret)

    def begin(self, command: str, *arguments: str | Path, secret: str = "") -> "subprocess.Popen[str]":
        """Begin a command beside others. It is owned until it is finished: `stop`, or this process's death, ends it.

        Args:
            command: `pathfed-server` or `pathfed-site`.
            arguments: what follows it.
            secret: what it reads from standard input: in no list of processes, and not in `commands.log`.
        """
        interrupts.heed()
        argv = [str(part) for part in (program(command), *arguments)]
        self.out.mkdir(parents=True, exist_ok=True)
        with (self.out / "commands.log").open("a", encoding="utf-8") as log:
            log.write(shlex.join([command, *argv[1:]]) + "\n")
        return self._start(_Command([*argv, "--json"], secret))

    def _start(self, command: "_Command") -> "subprocess.Popen[str]":
        stdin = subprocess.PIPE if command.secret else subprocess.DEVNULL
        process = start_owned(command.argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=stdin, text=True)
        self._begun[process] = command
        if process.stdin is not None:
            with suppress(BrokenPipeError), process.stdin:  # one that ended without reading says why when it is finished
                process.stdin.write(command.secret)
            process.stdin = None
        return process

    def finish(self, process: "subprocess.Popen[str]") -> Any:
        """Wait for a command; its result. One that is killed with -9 is begun again, as often as the server would be.

        Raises:
            PathfedError: the command's own error.
            HostError: PF903, it ended without a result.
        """
        for left in range(self.restarts, -1, -1):
            output, errors = process.communicate()
            command = self._begun.pop(process)
            if process.returncode != -signal.SIGKILL or not left:
                break
            process = self._start(command)
        try:
            result = json.loads(output.strip().splitlines()[-1])
        except (ValueError, IndexError):
            raise HostError(
                ErrorCode.PROCESS_ENDED, f"a command ended with status {process.returncode}", where=process.args, value=errors[-600:]
            ) from None
        if process.returncode and "error" in result:
            error = error_from_dict(result["error"])
            if left == self.restarts or error.code not in _DONE_ALREADY:
                raise error
        return result

    def enrol(self, options: Mapping[str, Sequence[str | Path]]) -> None:
        """Enrol hospitals at the running server, by an invitation each. Here one program plays all who would talk by telephone.

        Args:
            options: of `pathfed-site init`, by hospital.

        Raises:
            PathfedError: what one of the commands refused.
        """
        self._each({name: self.begin_site(name, "init", "--name", name, *given) for name, given in options.items()})
        invitations = {name: str(self.server_command("invite", name)["invitation"]) for name in options}
        asked = self._each({name: self.begin_site(name, "enroll", "-", "--no-wait", secret=text) for name, text in invitations.items()})
        for name, found in asked.items():
            self.server_command("sites", "admit", name, found["fingerprint"])
        self._each({name: self.begin_site(name, "enroll", "-", secret=text) for name, text in invitations.items()})

    def _each(self, begun: Mapping[str, "subprocess.Popen[str]"]) -> dict[str, Any]:
        return {name: self.finish(process) for name, process in begun.items()}

    def start_server(self) -> None:
        """Start `pathfed-server start` and wait until sites can connect."""
        fleet_port = int(tomllib.loads((self.server / "server.toml").read_text(encoding="utf-8"))["fleet_port"])
        argv = [str(program("pathfed-server")), "start", "--home", str(self.server), "--json"]
        ready = lambda: (self.server / "ports.json").exists() and accepts_connections("127.0.0.1", fleet_port)  # noqa: E731 - one expression, used once
        self._supervisor.start(ProcessSpec(name="server", argv=argv, log=self.logs / "server.log", ready=ready, restarts=self.restarts))

    def start_sites(self) -> None:
        """Start `pathfed-site start` for every site."""
        for hospital in self.hospitals:
            self.start_site(hospital.name)

    def start_site(self, name: str, within: Sequence[str] = ()) -> None:
        """Start `pathfed-site start` for one site; `within`: the words before that command, of one that becomes it (`env A=B`)."""
        argv = [*within, str(program("pathfed-site")), "start", "--home", str(self.site(name)), "--json"]
        self._supervisor.start(ProcessSpec(name=name, argv=argv, log=self.logs / f"{name}.log", restarts=self.restarts))

    def watch(self, tell: Callable[[str], None]) -> None:
        """Tell what happened since the last call: processes that ended, and the events they told.

        Raises:
            HostError: PF903, a process ended and will not be started again.
        """
        for log in sorted(self.logs.glob("*.log")):
            for line in self._new_lines(log):
                tell(f"{log.stem}: {line}")
        for end in self._supervisor.poll():
            if not end.restarted:
                raise end.error()
            tell(f"{ErrorCode.PROCESS_ENDED.value} {end.name} ended ({end.status}) and is started again; see {end.log}")

    def _new_lines(self, log: Path) -> list[str]:
        start = self._read_to.get(log, 0)
        with log.open("rb") as file:
            file.seek(start)
            whole, newline, _ = file.read().rpartition(b"\n")
        self._read_to[log] = start + len(whole) + len(newline)
        return [_event(line) for line in whole.decode(errors="replace").splitlines() if line.strip()]

    def pids(self) -> dict[str, int]:
        """Process ids of the server's and the sites' owners."""
        return self._supervisor.pids()

    def stop(self) -> None:
        """End every process: commands that were begun and not finished first."""
        end_all(self._begun, _COMMANDS_GRACE_S)
        for process in self._begun:
            for pipe in (process.stdout, process.stderr):
                if pipe is not None:
                    pipe.close()
        self._begun.clear()
        self._supervisor.stop(grace_s=20.0)


def _event(line: str) -> str:
    try:
        return str(json.loads(line)["event"])
    except (ValueError, KeyError, TypeError):
        return line


def program(name: str) -> Path:
    """A pathfed command beside the Python that runs.

    Raises:
        HostError: PF907, it is not installed there.
    """
    path = Path(sys.executable).parent / name
    if not path.exists():
        raise HostError(
            ErrorCode.TOOL_MISSING,
            f"{name} is not installed beside this Python",
            where=path,
            remedy="pip install 'pathfed[client,server,demo]'",
        )
    return path
