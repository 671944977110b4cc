"""A database of an earlier version is upgraded whole when it is opened, and keeps what it holds."""

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from pathfed_client.io.database import schema
from pathfed_client.io.database.schema import STEPS, SchemaStep
from pathfed_client.io.site_records import Event
from pathfed_client.io.site_store import SiteStore
from pathfed_common.errors import HostError


def objects(path: Path) -> set[tuple[str, str, str]]:
    with closing(sqlite3.connect(path)) as connection:
        return set(connection.execute("SELECT type, name, coalesce(sql, '') FROM sqlite_master"))


def version(path: Path) -> list[tuple[int]]:
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute("SELECT version FROM schema_version").fetchall()


@pytest.mark.parametrize("old", range(1, len(STEPS)))
def test_a_database_of_every_earlier_version_becomes_the_same_as_a_fresh_one_and_keeps_its_rows(old, tmp_path, monkeypatch):
    path = tmp_path / "site.db"
    with monkeypatch.context() as patch:
        patch.setattr(schema, "STEPS", STEPS[:old])
        with SiteStore(path) as store:
            store.append(1, b"charged")
            store.add_event(Event(at=1.0, kind="scan"))
    with SiteStore(path) as store:
        assert store.entries() == [b"charged"]
        assert len(store.events()) == 1
        assert store.words() == []
    SiteStore(tmp_path / "fresh.db").close()
    assert objects(path) == objects(tmp_path / "fresh.db")
    assert version(path) == version(tmp_path / "fresh.db") == [(len(STEPS),)]


def test_an_upgrade_that_fails_leaves_the_database_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "site.db"
    SiteStore(path).close()
    before = objects(path)
    with monkeypatch.context() as patch:
        broken = SchemaStep((), ("CREATE TABLE made_by_the_failing_step (x)", "CREATE NONSENSE"))
        patch.setattr(schema, "STEPS", (*STEPS, broken))
        with pytest.raises(HostError, match="PF904"):
            SiteStore(path)
    assert objects(path) == before
    SiteStore(path).close()
