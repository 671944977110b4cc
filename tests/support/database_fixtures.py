"""Databases for the store's tests: SQLite files, and a real PostgreSQL that is started here and stopped at the end."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from postgres import Postgres, running_postgres

from pathfed_server.db.sql_store import SqlStore, migrate


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    with running_postgres() as made:
        yield made


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
