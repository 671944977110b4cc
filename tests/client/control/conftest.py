"""A home without a server, a home that is enrolled, and a control plane that may lie."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from control_server import ControlServer

from pathfed_client.control.agent import Agent
from pathfed_client.control.enrolling import enroll
from pathfed_client.egress.outlet import Outlet
from pathfed_client.gate.site_policy import SitePolicy
from pathfed_client.home import SiteHome, SiteSettings, create_home
from pathfed_client.io.egress_log import EgressLog
from pathfed_client.io.site_store import SiteStore
from pathfed_client.transport.channel import Patience
from pathfed_common.protocol import control_pb2 as pb
from pathfed_common.provenance.log_leaves import SiteAdmitted
from pathfed_common.units import UtcSeconds


def make_home(root: Path, name: str = "site-a") -> SiteHome:
    settings = SiteSettings(name=name, slides=("/data/slides",), patients="/data/patients.csv")
    made = create_home(root, settings, SitePolicy(max_epsilon=3.5, delta=1e-6))
    SiteStore(made.database).close()
    EgressLog.create(made.egress)
    return made


@dataclass
class Site:
    """An enrolled home with its agent."""

    home: SiteHome
    clock: list[float]
    store: SiteStore = field(init=False)
    record: EgressLog = field(init=False)
    agent: Agent = field(init=False)

    def __post_init__(self) -> None:
        self.store, self.record = SiteStore(self.home.database), EgressLog(self.home.egress)
        self.agent = Agent(
            SiteHome(self.home.root), self.store, Outlet(self.record), now=lambda: self.clock[0], patience=Patience(attempts=1)
        )

    def close(self) -> None:
        self.agent.close()
        self.store.close()
        self.record.close()

    def reopened(self) -> "Site":
        self.close()
        return Site(SiteHome(self.home.root), self.clock)

    def codes(self) -> list[str]:
        return [alarm.code.value for alarm in self.store.alarms()]


@pytest.fixture
def server() -> Iterator[ControlServer]:
    with ControlServer().running() as running:
        yield running


@pytest.fixture
def home(tmp_path) -> SiteHome:
    return make_home(tmp_path / "home")


@pytest.fixture
def enrolled(server, tmp_path) -> Iterator[Callable[..., Site]]:
    """Enrol a home with the server, and admit it in its log."""
    made: list[Site] = []

    def make(name: str = "site-a") -> Site:
        home = make_home(tmp_path / name, name)
        server.state = pb.EnrollReply.ADMITTED
        with EgressLog(home.egress) as record:
            enroll(home, server.invitation(name), Outlet(record), wait=False, tell=lambda line: None)
        admitted = SiteAdmitted(site=home.name, evidence_key=home.evidence_key.public, at=UtcSeconds(5.0))
        server.log.leaves.append(admitted.to_bytes())
        made.append(Site(home, [time.time()]))
        return made[-1]

    yield make
    for site in made:
        site.close()


@pytest.fixture
def site(enrolled) -> Site:
    return enrolled()
