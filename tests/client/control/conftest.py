"""A home without a server, and a control plane that may lie."""

from collections.abc import Iterator

import pytest
from control_server import ControlServer

from pathfed_client.gate.site_policy import SitePolicy
from pathfed_client.home import SiteHome, SiteSettings, create_home
from pathfed_client.io.site_store import SiteStore

SETTINGS = SiteSettings(name="site-a", slides=("/data/slides",), patients="/data/patients.csv")


@pytest.fixture
def server() -> Iterator[ControlServer]:
    with ControlServer().running() as running:
        yield running


@pytest.fixture
def home(tmp_path) -> SiteHome:
    made = create_home(tmp_path / "home", SETTINGS, SitePolicy(max_epsilon=3.5, delta=1e-6))
    SiteStore(made.database).close()
    return made
