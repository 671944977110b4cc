"""Databases for the store's tests: SQLite files, and a real PostgreSQL that is started here and stopped at the end.

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
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import psycopg
import pytest

from pathfed_server.db.sql_store import SqlStore, migrate

_NUMBERS = count(1)
_PORTS_TRIED = 4


@dataclass(frozen=True)
class Postgres:
    """A running server on a loopback port."""

    port: int

    def url(self, name: str) -> str:
        return f"postgresql://pathfed@127.0.0.1:{self.port}/{name}"

    def create(self, *, template: str = "template0") -> str:
        """A new database; its URL."""
        name = f"t{next(_NUMBERS)}"
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name} TEMPLATE {template}".encode())
        return self.url(name)


def _programs() -> Path | None:
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda folder: float(folder.parent.name), reverse=True)
    found = shutil.which("initdb")
    candidates = [*folders, *([Path(found).parent] if found else [])]
    return next((folder for folder in candidates if (folder / "initdb").exists() and (folder / "pg_ctl").exists()), None)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    programs = _programs()
    if programs is None:
        reason = "PostgreSQL is not installed: apt-get install postgresql"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    user = "postgres" if os.geteuid() == 0 else None
    # Not under pytest's own folder, which other users may not enter; and short, since a socket's path has at most 107 bytes.
    home = Path(tempfile.mkdtemp(prefix="pf-pg-"))
    if user is not None:
        owner = pwd.getpwnam(user)
        os.chown(home, owner.pw_uid, owner.pw_gid)

    def call(program: str, *arguments: str) -> None:
        done = subprocess.run(
            [str(programs / program), *arguments],
            user=user,
            group=user,
            extra_groups=[] if user else None,
            cwd=home,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr

    def start(port: int) -> bool:
        options = f"-p {port} -k {home} -c listen_addresses=127.0.0.1 -c fsync=off -c max_connections=40"
        # stderr goes to a file: the server inherits it, and a pipe would stay open for as long as the server runs.
        with (home / "log.start").open("w") as errors:
            started = subprocess.run(
                [str(programs / "pg_ctl"), "-D", data, "-l", log, "-w", "-t", "120", "-o", options, "start"],
                user=user,
                group=user,
                extra_groups=[] if user else None,
                cwd=home,
                stdin=subprocess.DEVNULL,
                stdout=errors,
                stderr=errors,
                timeout=150,
            )
        return started.returncode == 0

    data, log = str(home / "data"), str(home / "log")
    try:
        call("initdb", "-D", data, "-U", "pathfed", "--auth=trust", "--no-sync", "--encoding=UTF8", "--locale=C")
        # A port may be snatched between its choice and its use, the more so on a busy machine.
        port = next((port for port in (_free_port() for _ in range(_PORTS_TRIED)) if start(port)), None)
        assert port is not None, "".join(file.read_text() for file in home.glob("log*"))
        try:
            yield Postgres(port)
        finally:
            call("pg_ctl", "-D", data, "-m", "immediate", "-w", "stop")
    finally:
        shutil.rmtree(home)


@pytest.fixture(scope="session")
def migrated_postgres(postgres: Postgres) -> str:
    """Name of a migrated database to copy."""
    url = postgres.create()
    migrate(url)
    return url.rsplit("/", 1)[1]


@pytest.fixture(scope="session")
def migrated_sqlite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated file to copy."""
    path = tmp_path_factory.mktemp("migrated") / "server.db"
    migrate(f"sqlite:///{path}")
    return path


@pytest.fixture(params=["sqlite", "postgresql"])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def empty_url(backend: str, tmp_path: Path, request: pytest.FixtureRequest) -> str:
    """A database with nothing in it."""
    if backend == "sqlite":
        return f"sqlite:///{tmp_path}/server.db"
    server: Postgres = request.getfixturevalue("postgres")
    return server.create()


@pytest.fixture
def url(backend: str, tmp_path: Path, request: pytest.FixtureRequest) -> str:
    """A migrated database."""
    if backend == "sqlite":
        shutil.copyfile(request.getfixturevalue("migrated_sqlite"), tmp_path / "server.db")
        return f"sqlite:///{tmp_path}/server.db"
    template: str = request.getfixturevalue("migrated_postgres")
    server: Postgres = request.getfixturevalue("postgres")
    return server.create(template=template)


@pytest.fixture
def store(url: str) -> Iterator[SqlStore]:
    """An open store on a migrated database."""
    with SqlStore(url) as opened:
        yield opened
