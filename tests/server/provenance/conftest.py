"""A migrated SQLite database for the log's tests; the store's contract on PostgreSQL is in tests/server/db."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from pathfed_server.db.sql_store import SqlStore, migrate


@pytest.fixture
def log_store(tmp_path: Path) -> Iterator[SqlStore]:
    url = f"sqlite:///{tmp_path}/server.db"
    migrate(url)
    with SqlStore(url) as store:
        yield store
