"""A real PostgreSQL that is started here, may be stopped and started again, and ends with the test.

PostgreSQL's programs are looked for where Debian puts them and then on PATH. Started as root, the server runs as the user `postgres`, since
it refuses to run as root. Without PostgreSQL the tests that need it are skipped, but fail where the variable CI is set.
"""

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import psycopg
import pytest

_NUMBERS = count(1)
_PORTS_TRIED = 4


@dataclass
class Postgres:
    """A server on a loopback port.

    Attributes:
        home: its folder.
        port: where it listens; the same after a stop and a start.
    """

    home: Path
    programs: Path
    port: int = 0

    def url(self, name: str) -> str:
        return f"postgresql://pathfed@127.0.0.1:{self.port}/{name}"

    def create(self, *, template: str = "template0") -> str:
        """A new database; its URL."""
        name = f"t{next(_NUMBERS)}"
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name} TEMPLATE {template}".encode())
        return self.url(name)

    def stop(self) -> None:
        """As a crash would: connections are cut, nothing is flushed, and the next start recovers from the write-ahead log."""
        self._call("pg_ctl", "-D", self._data, "-m", "immediate", "-w", "stop")

    def start(self) -> None:
        """Start again, on the same port."""
        assert self._start(self.port), self._logs()

    def cut(self) -> None:
        """End every connection but the one that does it."""
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND datname IS NOT NULL"
            )

    @property
    def _data(self) -> str:
        return str(self.home / "data")

    def begin(self) -> None:
        """Make the cluster and start it, on a port that is free."""
        self._call("initdb", "-D", self._data, "-U", "pathfed", "--auth=trust", "--no-sync", "--encoding=UTF8", "--locale=C")
        # A port may be snatched between its choice and its use, the more so on a busy machine.
        found = next((port for port in (_free_port() for _ in range(_PORTS_TRIED)) if self._start(port)), None)
        assert found is not None, self._logs()
        self.port = found

    def _logs(self) -> str:
        return "".join(file.read_text() for file in self.home.glob("log*"))

    def _call(self, program: str, *arguments: str) -> None:
        done = subprocess.run(
            [str(self.programs / program), *arguments],
            user=_user(),
            group=_user(),
            extra_groups=[] if _user() else None,
            cwd=self.home,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr

    def _start(self, port: int) -> bool:
        # fsync off: a crash of the server process alone loses nothing that it has written.
        options = f"-p {port} -k {self.home} -c listen_addresses=127.0.0.1 -c fsync=off -c max_connections=40"
        # stderr goes to a file: the server inherits it, and a pipe would stay open for as long as the server runs.
        with (self.home / "log.start").open("w") as errors:
            started = subprocess.run(
                [str(self.programs / "pg_ctl"), "-D", self._data, "-l", str(self.home / "log"), "-w", "-t", "120", "-o", options, "start"],
                user=_user(),
                group=_user(),
                extra_groups=[] if _user() else None,
                cwd=self.home,
                stdin=subprocess.DEVNULL,
                stdout=errors,
                stderr=errors,
                timeout=150,
            )
        return started.returncode == 0


def _user() -> str | None:
    return "postgres" if os.geteuid() == 0 else None


def _programs() -> Path | None:
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda folder: float(folder.parent.name), reverse=True)
    found = shutil.which("initdb")
    candidates = [*folders, *([Path(found).parent] if found else [])]
    return next((folder for folder in candidates if (folder / "initdb").exists() and (folder / "pg_ctl").exists()), None)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextmanager
def running_postgres() -> Iterator[Postgres]:
    """A server of its own; skips the test where there is no PostgreSQL."""
    programs = _programs()
    if programs is None:
        reason = "PostgreSQL is not installed: apt-get install postgresql"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    # Not under pytest's own folder, which other users may not enter; and short, since a socket's path has at most 107 bytes.
    home = Path(tempfile.mkdtemp(prefix="pf-pg-"))
    user = _user()
    if user is not None:
        owner = pwd.getpwnam(user)
        os.chown(home, owner.pw_uid, owner.pw_gid)
    made = Postgres(home, programs)
    try:
        made.begin()
        try:
            yield made
        finally:
            if (home / "data" / "postmaster.pid").exists():
                made.stop()
    finally:
        shutil.rmtree(home)
