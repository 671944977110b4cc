"""pathfed's side of the round benchmark: a real server and real sites, in processes of their own, with reply slots off.

`pathfed-server start` owns SuperLink, fleet door and superexec; each site has its SuperNode and resident runner (`_site_runner.py`).
Every round does everything a round does: signed offers, trial, ledger, sealed and signed updates, admission, the weighted mean, AdamW,
record, database.
"""

import contextlib
import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from tests.benchmarks._round_times import RoundTimes, wait_until
from tests.benchmarks._site_runner import TIMES, TRAIN_S

from pathfed_client import app as client
from pathfed_client import deciding
from pathfed_client.control.enrolling import enroll
from pathfed_client.control.supervising import start_agent
from pathfed_client.egress.outlet import Outlet
from pathfed_client.gate.site_policy import SitePolicy
from pathfed_client.home import SiteHome, SiteSettings
from pathfed_client.transport.relay_certificate import make_certificate
from pathfed_client.transport.site_engine import SiteFiles, start_relay, start_site
from pathfed_common.ids import RunName
from pathfed_common.processes import ProcessSpec, Supervisor, accepts_connections
from pathfed_local.generator import generate_hospitals
from pathfed_server import app as server
from pathfed_server import members
from pathfed_server.db.sql_store import SqlStore
from pathfed_server.rounds.state import ParticipationState, RunState
from pathfed_server.transport.engine import flower_command

#: ViT-Ti/16 with the demo's decoder: 23 MB in float32, both ways. The limits let a benchmark's many rounds pass.
_PLAN = """
name = "round-overhead"
[encoder]
preset = "vit_tiny_patch16_224"
[objective]
decoder_dim = 96
decoder_depth = 1
decoder_heads = 4
[privacy]
expected_patients = 1
noise_multiplier = 4
clip_norm = 1.0
delta = 1e-5
epsilon_limit = 100
[rounds]
count = {rounds}
deadline_s = 300
quorum = {sites}
[wire]
dtype = "float32"
"""
_PATIENTS, _SIDE_PX = 2, (512, 512)
_RUN_S = 900.0


class _StockSuperNode(Supervisor):
    """Starts Flower's own command where pathfed would start its launcher of it."""

    def start(self, spec: ProcessSpec) -> None:
        if spec.name == "supernode":
            spec = replace(spec, argv=[flower_command("flower-supernode"), *spec.argv[3:]])
        super().start(spec)


@dataclass
class PathfedSide:
    """A consortium under `root`. `stock_supernode`: Flower's own SuperNode command in place of pathfed's launcher."""

    root: Path
    sites: int
    rounds: int
    train_s: float
    stock_supernode: bool = False
    supervisors: list[Supervisor] = field(default_factory=list)

    def start(self) -> None:
        """Make the homes and start every process."""
        home = server.init(self.root / "server", consortium="bench", host="127.0.0.1", listen="127.0.0.1", database="")
        self.home = home
        plan_file, signed = self.root / "plan.toml", self.root / "plan.dsse"
        plan_file.write_text(_PLAN.format(rounds=self.rounds, sites=self.sites), encoding="utf-8")
        self.plan = server.publish_plan(home.root, plan_file, signed)
        argv = [str(Path(sys.executable).parent / "pathfed-server"), "start", "--home", str(home.root), "--json"]
        ready = lambda: home.ports_file.exists() and accepts_connections("127.0.0.1", home.settings.fleet_port)  # noqa: E731
        self._owner(Supervisor).start(ProcessSpec(name="pathfed-server", argv=argv, log=self.root / "server.log", ready=ready))
        self.site_homes = [self._site(hospital.slides_folder, hospital.patient_list, signed) for hospital in self._hospitals()]
        runner = [sys.executable, str(Path(__file__).with_name("_site_runner.py"))]
        for site in self.site_homes:
            flower = site.root / "flower"
            flower.mkdir(exist_ok=True)
            files = SiteFiles(
                relay=[sys.executable, "-m", "pathfed_client.relaying", str(site.root)],
                relay_ca=make_certificate(site.relay_files, "127.0.0.1", now=datetime.now(UTC)).ca,
                flower_key=site.flower_key,
                superexec_secret=site.superexec_secret,
                flower=flower,
                logs=site.logs,
                runner=["env", f"{TRAIN_S}={self.train_s}", *runner, str(site.root)],
                threads=1,
                supernode_lock=site.lock("supernode"),
            )
            supervisor = self._owner(_StockSuperNode if self.stock_supernode else Supervisor)
            ports = start_relay(supervisor, files)
            with closing(client.open_store(site)) as store:
                start_agent(site, store, supervisor, ports.tunnel)
            start_site(supervisor, files, ports)

    def _owner(self, kind: type[Supervisor]) -> Supervisor:
        """One for the server and one for each site, as each would have."""
        self.supervisors.append(kind())
        return self.supervisors[-1]

    def _hospitals(self):
        return generate_hospitals(self.root / "data", hospitals=self.sites, patients=_PATIENTS, slides_per_patient=1, side_px=_SIDE_PX)

    def _site(self, slides: Path, patients: Path, signed_plan: Path) -> SiteHome:
        name = slides.parent.name
        settings = SiteSettings(name=name, slides=(str(slides),), patients=str(patients))
        policy = SitePolicy(max_epsilon=100.0, delta=1e-5, reply_slots=False, threads=1)
        home = self._enrolled(client.init(self.root / "sites" / name, settings, policy))
        client.scan(home, self.plan.cohort, lambda done, total: None)
        approval = self.root / f"approval-{name}.dsse"
        deciding.approve(home, signed_plan, _PATIENTS, approval)
        server.add_word(self.home.root, approval)
        return home

    def _enrolled(self, home: SiteHome) -> SiteHome:
        """Invited, asked, admitted: a site answers rounds with a certificate alone."""
        invitation = members.invite(self.home.root, home.name, hours=1).text
        with client.open_egress(home) as record:
            ask = partial(enroll, text=invitation, outlet=Outlet(record), wait=False, tell=lambda line: None)
            members.admit(self.home.root, home.name, ask(SiteHome(home.root)).fingerprint)
            assert ask(SiteHome(home.root)).admitted
        return SiteHome(home.root)

    def measure(self, block: int) -> list[RoundTimes]:
        """One run of `rounds` rounds."""
        run = RunName(f"block-{block}")
        server.start_run(self.home.root, self.plan.digest, run, [])
        with SqlStore(self.home.database_url) as store:
            wait_until(lambda: self._over(store, run), _RUN_S, f"run {run}, see {self.root}")
            return [self._round(store, run, index) for index in range(1, self.rounds + 1)]

    def _over(self, store: SqlStore, run: RunName) -> bool:
        for end in (end for supervisor in self.supervisors for end in supervisor.poll()):
            raise end.error()
        state = store.run(run).state
        if state in (RunState.FAILED, RunState.STOPPED):
            raise RuntimeError(f"run {run} is {state.value}, see {self.root}")
        return state is RunState.FINISHED

    def _round(self, store: SqlStore, run: RunName, index: int) -> RoundTimes:
        row = next(row for row in store.rounds(run) if row.round_index == index)
        admitted = [one for one in store.participations(run, index) if one.state is ParticipationState.ADMITTED]
        assert len(admitted) == self.sites
        assert row.offered_at is not None
        assert row.committed_at is not None
        assert row.times is not None
        times = [self._training(home, row.offered_at, row.committed_at) for home in self.site_homes]
        # The loop stamps `committed_at` when the next state is on the disk under its digest; before that come mean, optimiser and digests.
        return RoundTimes(
            offered=row.offered_at,
            began=[began for began, _ in times],
            ended=[ended for _, ended in times],
            collected=row.committed_at - row.times.aggregation_s - row.times.step_s,
            aggregated=row.committed_at,
        )

    def _training(self, home: SiteHome, offered: float, aggregated: float) -> tuple[float, float]:
        """The one training of a site that lies inside the round."""
        lines = (home.root / TIMES).read_text(encoding="utf-8").splitlines()
        found = [(line["began"], line["ended"]) for line in map(json.loads, lines) if offered <= line["began"] < aggregated]
        (only,) = found
        return only

    def update_bytes(self) -> int:
        """Size of a sealed update."""
        return next(self.site_homes[0].updates.glob("*.safetensors")).stat().st_size

    def pids(self) -> Sequence[int]:
        """Process ids of the owners."""
        return [pid for supervisor in self.supervisors for pid in supervisor.pids().values()]

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Hold the server's daemon and the runners still, so that their idle polls do not slow the other side down.

        SuperLink and the SuperNodes go on, as the other side's do.
        """
        named = [item for supervisor in self.supervisors for item in supervisor.pids().items()]
        held = [pid for name, pid in named if name in ("pathfed-server", "runner")]
        try:
            for pid in held:
                os.kill(pid, signal.SIGSTOP)
            yield
        finally:
            for pid in held:
                os.kill(pid, signal.SIGCONT)

    def stop(self) -> None:
        """End every process."""
        for supervisor in reversed(self.supervisors):
            supervisor.stop(grace_s=20.0)
