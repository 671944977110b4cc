"""`pathfed simulate`: the real round loop, admission, aggregation and record, with many virtual sites on Flower's simulation engine.

What it is for: seeing what a server has to do as sites become many, before there are many. What it is not: a test of networks, of
hospitals' machines or of privacy; virtual sites have no ledger and no patients.
"""

import logging
import math
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import psutil
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.serverapp import Grid

from pathfed_common.errors import ErrorCode, HostError, RoundError
from pathfed_common.ids import RunName, SiteName
from pathfed_common.model import initial_state, state_shapes
from pathfed_common.plan import Plan
from pathfed_common.provenance.documents import Approval, SiteCard, seal_plan
from pathfed_common.units import UtcSeconds
from pathfed_local.folders import fresh_folder
from pathfed_local.simulation.virtual_fleet import SimulatedSites, run_engine
from pathfed_local.simulation.virtual_site import Fleet
from pathfed_server import app as server
from pathfed_server.db.rows import ApprovalRow
from pathfed_server.db.sql_store import SqlStore
from pathfed_server.driving import SystemClock
from pathfed_server.home import ServerHome
from pathfed_server.provenance.recorder import Recorder
from pathfed_server.rounds.files import RunFiles
from pathfed_server.rounds.loop import run_rounds
from pathfed_server.rounds.ports import SitePort
from pathfed_server.rounds.progress import Progress, Stage
from pathfed_server.rounds.settings import RunSettings
from pathfed_server.rounds.state import RunState

RUN = RunName("simulation")
MARK = ".pathfed-simulation"
#: More than any consortium that is planned for.
MOST_SITES = 2000
_MB = 1e6
_SAMPLE_S = 0.5


@dataclass(frozen=True, kw_only=True)
class SimulationOptions:
    """What `pathfed simulate` was asked for.

    Attributes:
        out: the folder everything goes into; an earlier simulation there is replaced.
        plan: the plan file.
        sites: virtual sites.
        rounds: rounds, or None for the plan's.
        processes: virtual sites that compute at a time.
    """

    out: Path
    plan: Path
    sites: int
    rounds: int | None
    processes: int


@dataclass
class MemoryPeaks:
    """Largest resident memory, MB: of this process, which is server and engine, and of the processes under it, which compute."""

    server_at_start_mb: float = 0.0
    server_mb: float = 0.0
    sites_mb: float = 0.0

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Look twice a second until the block ends."""
        ended = threading.Event()
        self.server_at_start_mb = self.server_mb = psutil.Process().memory_info().rss / _MB

        def watch() -> None:
            while not ended.wait(_SAMPLE_S):
                self._look()

        watcher = threading.Thread(target=watch, name="memory")
        watcher.start()
        try:
            yield
        finally:
            ended.set()
            watcher.join()

    def _look(self) -> None:
        own, total = psutil.Process(), 0.0
        for process in own.children(recursive=True):
            try:
                total += process.memory_info().rss / _MB
            except psutil.Error:
                continue
        self.server_mb, self.sites_mb = max(self.server_mb, own.memory_info().rss / _MB), max(self.sites_mb, total)


@dataclass
class Simulation:
    """One simulation. `committed` has the moment (monotonic seconds) at which each round, from 0, was committed."""

    options: SimulationOptions
    tell: Callable[[str], None]
    memory: MemoryPeaks = field(default_factory=MemoryPeaks)
    committed: list[float] = field(default_factory=list)

    def run(self) -> dict[str, Any]:
        """Make the consortium, drive the run to its end, and say what it took.

        Raises:
            HostError: PF904, the folder holds something else; PF905, too few or too many sites; PF907, no simulation engine.
            PlanError: the plan cannot be used.
            RoundError: the run failed.
        """
        plan = self._plan()
        out = fresh_folder(self.options.out, MARK, "a simulation")
        home = server.init(out / "server", consortium="simulation", host="127.0.0.1", listen="127.0.0.1", database="")
        fleet = Fleet(plan=plan.canonical_bytes(), server_key=home.evidence_key.public.to_text(), secret=os.urandom(32))
        sites = [SiteName(f"virtual-{number:04d}") for number in range(1, self.options.sites + 1)]
        _log_to(out / "simulation.log")
        self.tell(f"{len(sites)} virtual sites join and approve the plan")
        enrol(home, plan, fleet, sites)
        folder = out / "virtual-sites"
        folder.mkdir()
        self.tell(f"rounds, {self.options.processes} sites at a time")
        self._simulate(home, plan, fleet, sites, folder)
        return self.figures(home)

    def _simulate(self, home: ServerHome, plan: Plan, fleet: Fleet, sites: Sequence[SiteName], folder: Path) -> None:
        ended = threading.Event()

        def drive(grid: Grid) -> None:
            states = RunFiles(home.root, RUN).state(0).parent
            self.drive(home, plan, SimulatedSites(grid, sites, folder, states, ended))

        with self.memory.watched():
            run_engine(fleet, len(sites), self.options.processes, drive, ended)

    def _plan(self) -> Plan:
        sites = self.options.sites
        if not 1 <= sites <= MOST_SITES:
            _refuse(f"a simulation has 1 to {MOST_SITES} sites", "--sites", sites, "give another number")
        plan = server.read_plan(self.options.plan)
        if plan.encoder.init_from:
            _refuse("a simulation starts from random weights", self.options.plan, plan.encoder.init_from, "leave encoder.init_from out")
        if plan.rounds.quorum > sites:
            _refuse("there are fewer sites than the plan's quorum", "--sites", sites, f"give at least {plan.rounds.quorum}")
        count = self.options.rounds or plan.rounds.count
        return plan.model_copy(update={"rounds": plan.rounds.model_copy(update={"count": count})})

    def drive(self, home: ServerHome, plan: Plan, sites: SitePort) -> None:
        """The real round loop with the real store and recorder, on whatever brings offers and replies."""
        with SqlStore(home.database_url) as store:
            cards = {site: home.site_card(site) for site in store.run(RUN).sites}
            settings = RunSettings(
                run=RUN,
                plan=plan,
                shapes=state_shapes(plan),
                initial_state=lambda: initial_state(plan, None),
                key=home.evidence_key,
                home=home.root,
            )
            recorder = Recorder(home.record(RUN), home.evidence_key, cards)
            run_rounds(settings, sites=sites, store=store, recorder=recorder, clock=SystemClock(), progress=self._note)

    def _note(self, progress: Progress) -> None:
        if progress.stage is Stage.COMMITTED:
            self.committed.append(time.monotonic())
            self.tell(f"round {progress.round_index} of {progress.rounds} committed")

    def figures(self, home: ServerHome) -> dict[str, Any]:
        """What the rounds took, medians over them.

        Raises:
            RoundError: PF514, the run is not finished.
        """
        with SqlStore(home.database_url) as store:
            plan = store.plan(store.run(RUN).plan).plan()
            run, rows = store.run(RUN), [row for row in store.rounds(RUN) if row.times is not None]
            admitted = [sum(one.update is not None for one in store.participations(RUN, row.round_index)) for row in rows]
            update_bytes = next((one.update_bytes for one in store.participations(RUN, 1) if one.update_bytes), 0)
        if run.state is not RunState.FINISHED:
            raise RoundError(ErrorCode.RUN_FAILED, f"the run {run.state.value}", where=home.root.parent / "simulation.log", value=run.code)
        walls = [later - earlier for earlier, later in pairwise(self.committed)]
        # The first round has the processes' start in it.
        settled = walls[1:] or walls
        median = {name: statistics.median(getattr(row.times, name) for row in rows) for name in ("admission_s", "aggregation_s", "step_s")}
        sites = self.options.sites
        return {
            "sites": sites,
            "processes": self.options.processes,
            "rounds": len(rows),
            "admitted": min(admitted),
            "parameters": sum(math.prod(shape) for shape in state_shapes(plan).values()),
            "update_mb": round(update_bytes / _MB, 2),
            "round_s": round(statistics.median(settled), 2),
            "rounds_per_minute": round(60 / statistics.median(settled), 2),
            "admission_ms_per_site": round(1000 * median["admission_s"] / sites, 2),
            "aggregation_ms_per_site": round(1000 * median["aggregation_s"] / sites, 2),
            "server_ms_per_site": round(1000 * (median["admission_s"] + median["aggregation_s"]) / sites, 2),
            "step_s": round(median["step_s"], 3),
            "server_mb_at_start": round(self.memory.server_at_start_mb, 1),
            "server_mb_at_peak": round(self.memory.server_mb, 1),
            "sites_mb_at_peak": round(self.memory.sites_mb, 1),
            "record": str(home.record(RUN)),
        }


def _refuse(what: str, where: str | Path, value: object, remedy: str) -> NoReturn:
    raise HostError(ErrorCode.SETTINGS_INVALID, what, where=where, value=value, remedy=remedy)


def enrol(home: ServerHome, plan: Plan, fleet: Fleet, sites: Sequence[SiteName]) -> None:
    """Cards, approvals and the run, in the server's database as from real sites; certificates are for networks, which there is none of."""
    now, declared = UtcSeconds(time.time()), fleet.declared_patients
    signed = seal_plan(plan, home.evidence_key)
    with SqlStore(home.database_url) as store:
        store.add_plan(plan.digest, name=plan.name, canonical=plan.canonical_bytes(), signed=signed, at=now)
        for site in sites:
            key = fleet.key(site)
            card = SiteCard(site=site, evidence_key=key.public, flower_key=_node_key())
            home.site_card_file(site).write_bytes(card.to_bytes(key))
            store.add_site(site, evidence_key=key.public.to_text(), flower_key=card.flower_key, at=now)
            word = Approval(site=site, plan=plan.digest, declared_patients=declared, reply_slots=False, approved_at=now)
            row = ApprovalRow(
                site=site, plan=plan.digest, declared_patients=declared, reply_slots=False, envelope=word.to_bytes(key), approved_at=now
            )
            store.add_approval(row, at=now)
        store.create_run(RUN, plan_digest=plan.digest, sites=sites, at=now)


def _node_key() -> str:
    """The public key of a Flower node, OpenSSH text. The engine asks for none; the database wants every site to have its own."""
    public = ec.generate_private_key(ec.SECP384R1()).public_key()
    return public.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()


def _log_to(path: Path) -> None:
    """What Flower, Ray and the round loop say goes into a file; people get a line a round."""
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    for name in ("flwr", "ray", "pathfed_local", "pathfed_server"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(logging.INFO)
        logger.propagate = False
