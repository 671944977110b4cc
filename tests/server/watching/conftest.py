"""A server whose database is SQLite or PostgreSQL, with a run in it."""

from collections.abc import Iterator

import pytest
from played_run import Played

from pathfed_server import app
from pathfed_server.home import ServerHome


@pytest.fixture
def home(tmp_path, url) -> ServerHome:
    """A server's home on a database of either kind."""
    return app.init(tmp_path / "server", consortium="test", host="127.0.0.1", listen="127.0.0.1", database=url)


@pytest.fixture
def played(home) -> Iterator[Played]:
    run = Played(home.database_url)
    run.plan()
    yield run
    run.close()
