"""The real server's control plane on loopback, and sites of the real client that are enrolled with it."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from pathfed_client.control.agent import Agent
from pathfed_client.control.enrolling import Enrolment, enroll
from pathfed_client.egress.outlet import Outlet
from pathfed_client.gate.site_policy import SitePolicy
from pathfed_client.home import SiteHome, SiteSettings, create_home
from pathfed_client.io.egress_log import EgressLog
from pathfed_client.io.site_store import SiteStore
from pathfed_client.transport.channel import Patience
from pathfed_common import digest
from pathfed_common.ids import SiteName
from pathfed_common.plan import Plan
from pathfed_common.provenance.documents import Approval
from pathfed_common.provenance.log_checkpoint import origin_of
from pathfed_common.provenance.log_leaves import PlanApproved
from pathfed_common.units import UtcSeconds
from pathfed_server import app, members
from pathfed_server.control import start_control
from pathfed_server.db.sql_store import SqlStore
from pathfed_server.home import ServerHome
from pathfed_server.provenance.log_keeper import LogKeeper
from pathfed_server.rounds.state import SiteState

_WITHIN_S = 60.0
_PLAN = """
name = "{name}"
[objective]
decoder_dim = 32
decoder_depth = 1
decoder_heads = 2
[cohort]
tile_px = 32
[privacy]
expected_patients = 4
noise_multiplier = 1.0
clip_norm = 1.0
epsilon_limit = 50.0
[rounds]
count = 2
"""


@dataclass
class Site:
    """An enrolled home with its agent."""

    home: SiteHome
    store: SiteStore = field(init=False)
    record: EgressLog = field(init=False)
    agent: Agent = field(init=False)

    def __post_init__(self) -> None:
        self.store, self.record = SiteStore(self.home.database), EgressLog(self.home.egress)
        self.agent = Agent(SiteHome(self.home.root), self.store, Outlet(self.record), patience=Patience(attempts=2))

    def pass_once(self) -> bool:
        return self.agent.pass_once()

    def until(self, seen: Callable[[], bool]) -> None:
        """Pass after pass until something is seen."""
        last = time.monotonic() + _WITHIN_S
        while not seen():
            assert time.monotonic() < last, self.store.facts()
            self.agent.pass_once()
            time.sleep(0.2)

    def approve(self, plan: Plan) -> None:
        given = Approval(
            site=self.home.name, plan=plan.digest, declared_patients=8, reply_slots=True, approved_at=UtcSeconds(time.time())
        ).to_bytes(self.home.evidence_key)
        leaf = PlanApproved(site=self.home.name, plan=plan.digest, approval=digest.of_bytes(given))
        self.store.add_word(given, leaf.to_bytes(), time.time())

    def codes(self) -> list[str]:
        return [alarm.code.value for alarm in self.store.alarms()]

    def close(self) -> None:
        self.agent.close()
        self.store.close()
        self.record.close()

    def reopened(self) -> "Site":
        self.close()
        return Site(SiteHome(self.home.root))


@dataclass
class RealServer:
    """A server's home whose control plane listens."""

    home: ServerHome
    store: SqlStore
    texts: dict[str, str] = field(default_factory=dict)

    @staticmethod
    def new_home(root: Path, name: str) -> SiteHome:
        settings = SiteSettings(name=name, slides=("/data/slides",), patients="/data/patients.csv")
        made = create_home(root, settings, SitePolicy(max_epsilon=3.5, delta=1e-6))
        SiteStore(made.database).close()
        EgressLog.create(made.egress)
        return made

    @staticmethod
    def ask(home: SiteHome, text: str) -> Enrolment:
        with EgressLog(home.egress) as record:
            return enroll(SiteHome(home.root), text, Outlet(record), wait=False, tell=lambda line: None)

    def asked(self, root: Path, name: str) -> tuple[SiteHome, Enrolment, str]:
        home = self.new_home(root, name)
        self.texts[name] = members.invite(self.home.root, SiteName(name), hours=1).text
        return home, self.ask(home, self.texts[name]), self.texts[name]

    def enrolled(self, root: Path, name: str) -> Site:
        home, asked, text = self.asked(root, name)
        members.admit(self.home.root, SiteName(name), asked.fingerprint)
        assert self.ask(home, text).admitted
        return Site(SiteHome(home.root))

    def publish(self, folder: Path, name: str) -> Plan:
        (folder / f"{name}.toml").write_text(_PLAN.format(name=name), encoding="utf-8")
        return app.publish_plan(self.home.root, folder / f"{name}.toml", folder / f"{name}.dsse")

    def approved(self, plan: Plan) -> set[str]:
        return {row.site for row in self.store.approvals(plan.digest)}

    def shortfalls(self) -> tuple[object, ...]:
        return self._keeper().history().shortfalls

    def cosigned(self, site: str) -> bool:
        history = self._keeper().history()
        return any(member.site == site for found in history.cosigned.values() for member in found)

    def _keeper(self) -> LogKeeper:
        return LogKeeper(self.store, self.home.evidence_key, origin_of(self.home.settings.consortium), least_interval_s=0)

    def revoke_if_enrolled(self, name: SiteName) -> None:
        if self.store.site(name).state is SiteState.ENROLLED:
            members.revoke(self.home.root, name)


@contextmanager
def serving_in(root: Path) -> Iterator[RealServer]:
    """A fresh server whose control plane listens in this process."""
    home = app.init(root, consortium="test", host="127.0.0.1", listen="127.0.0.1", database="")
    with SqlStore(home.database_url) as store:
        listening = start_control(home, store)
        try:
            yield RealServer(home, store)
        finally:
            listening.stop(0)
