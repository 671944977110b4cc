"""`pathfed simulate`: virtual sites give what a real round admits and a record verifies, on Flower's engine as without it."""

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from flwr.app import Context, Message
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.proto.task_pb2 import Task
from flwr.server.superlink.fleet.vce import vce_api
from flwr.server.superlink.fleet.vce.backend.backend import Backend
from flwr.server.superlink.fleet.vce.metrics import VceMetrics
from flwr.server.superlink.linkstate import LinkStateFactory
from flwr.server.superlink.linkstate.in_memory_linkstate import RunRecord
from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME, NOOP_FEDERATION_ID
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.federation import NoOpFederationManager
from flwr.superlink.grid import InMemoryGrid

from pathfed_common.ids import SiteName
from pathfed_common.plan import Plan, load_plan
from pathfed_common.provenance.keys import SigningKey
from pathfed_common.provenance.verify import verify_record
from pathfed_local import cli
from pathfed_local.plans import simulation_plan
from pathfed_local.simulation.simulating import MARK, RUN, Simulation, SimulationOptions, enrol
from pathfed_local.simulation.virtual_fleet import SimulatedSites, SimulationEndedError, client_app
from pathfed_local.simulation.virtual_site import Fleet, answer
from pathfed_server import app as server
from pathfed_server.db.sql_store import SqlStore
from pathfed_server.home import ServerHome
from pathfed_server.rounds.ports import Consent, Offer, Reply, Sending, SitePort
from pathfed_server.rounds.state import RunState

COMMAND = Path(sys.executable).parent / "pathfed"
SITES = [SiteName("virtual-0001"), SiteName("virtual-0002"), SiteName("virtual-0003")]
SECRET = bytes(range(32))
LOCK = threading.Lock()


def states_of(folder: Path) -> Path:
    """Where a simulation's states lie, by the folder of its virtual sites."""
    return folder.parent / "server" / "runs" / RUN / "states"


class AnsweredHere:
    """`SitePort` that answers in this process, one site after the other."""

    def __init__(self, fleet: Fleet, folder: Path) -> None:
        self._fleet, self._folder = fleet, folder

    def exchange(self, offers: Sequence[Offer], spool: Path, *, withheld: Consent, sending: Sending) -> Iterator[Reply]:
        for offer in offers:
            assert withheld(offer.site) is None
            sending(offer.site)
            done = answer(self._fleet, offer.envelope, states_of(self._folder), self._folder)
            update = done.update.replace(spool / f"{offer.site}.safetensors")
            yield Reply(site=offer.site, code=None, statement=done.statement, update=update, received_at=offer.deadline, transfer_s=0.0)


def plan_of(rounds: int) -> Plan:
    plan = load_plan(simulation_plan().read_text(encoding="utf-8"), where="simulation")
    return plan.model_copy(update={"rounds": plan.rounds.model_copy(update={"count": rounds})})


def simulated(out: Path, port: Callable[[Fleet, Path], SitePort] = AnsweredHere) -> Simulation:
    """Two rounds of three virtual sites through the real loop."""
    plan = plan_of(2)
    home = server.init(out / "server", consortium="simulation", host="127.0.0.1", listen="127.0.0.1", database="")
    fleet = Fleet(plan=plan.canonical_bytes(), server_key=home.evidence_key.public.to_text(), secret=SECRET)
    enrol(home, plan, fleet, SITES)
    (out / "virtual-sites").mkdir()
    made = Simulation(SimulationOptions(out=out, plan=simulation_plan(), sites=3, rounds=2, processes=1), lambda line: None)
    made.drive(home, plan, port(fleet, out / "virtual-sites"))
    return made


def test_virtual_sites_are_admitted_in_every_round_and_their_record_verifies(tmp_path: Path) -> None:
    made = simulated(tmp_path)
    home = tmp_path / "server"
    with SqlStore(f"sqlite:///{home}/pathfed.db") as store:
        assert store.run(RUN).state is RunState.FINISHED
        rows = [one for index in (1, 2) for one in store.participations(RUN, index)]
    assert [(row.site, row.code) for row in rows] == [(site, None) for site in SITES] * 2
    assert len({row.update for row in rows}) == len(rows), "every site, in every round, has noise of its own"
    verdict = verify_record(home / "runs" / RUN / "record", None)
    assert not verdict.findings
    assert verdict.rounds == 2
    assert len(made.committed) == 3
    figures = made.figures(ServerHome(home))
    assert (figures["sites"], figures["rounds"], figures["admitted"]) == (3, 2, 3)
    assert figures["update_mb"] == pytest.approx(2 * figures["parameters"] / 1e6, rel=0.01), "bfloat16"
    assert figures["parameters"] > 5_000_000
    assert figures["server_ms_per_site"] == pytest.approx(figures["admission_ms_per_site"] + figures["aggregation_ms_per_site"], abs=0.02)
    assert min(figures["rounds_per_minute"], figures["step_s"], figures["round_s"]) > 0


def test_the_keys_of_virtual_sites_are_their_own_and_follow_from_the_secret() -> None:
    fleet = Fleet(plan=b"", server_key="", secret=SECRET)
    keys = {fleet.key(site).public.to_text() for site in SITES}
    assert len(keys) == len(SITES)
    assert keys == {Fleet(plan=b"other", server_key="x", secret=SECRET).key(site).public.to_text() for site in SITES}
    assert SECRET.hex() not in repr(fleet)
    assert repr(SECRET) not in repr(fleet)


class HereBackend(Backend):
    """Flower's engine without Ray: a message is handled in the thread that took it."""

    @property
    def num_workers(self) -> int:
        return 2

    def build(self, app_fn: Any) -> None:
        self._app = app_fn()

    def is_worker_idle(self) -> bool:
        return True

    def terminate(self) -> None:
        pass

    def process_message(self, message: Message, context: Context) -> tuple[Message, Context]:
        with LOCK:  # virtual sites of one process share a model
            return self._app(message, context), context


@pytest.fixture
def engine() -> Iterator[Callable[[Fleet, int], InMemoryGrid]]:
    """Flower's simulation engine with so many nodes, all of it but Ray."""
    stop, threads = threading.Event(), []

    def start(fleet: Fleet, sites: int) -> InMemoryGrid:
        factory = LinkStateFactory(FLWR_IN_MEMORY_DB_NAME, NoOpFederationManager(), ObjectStoreFactory())
        run = Run.create_empty(run_id=7)
        run.primary_task_id, run.federation_id = 8, NOOP_FEDERATION_ID
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 8, 7, SUPERLINK_NODE_ID
        state: Any = factory.state()
        state.run_ids[7], state.task_store[8] = RunRecord(run=run), Task(task_id=8, run_id=7)
        grid = InMemoryGrid(state_factory=factory)
        grid.set_run(run)
        nodes = vce_api._register_nodes(sites, factory)
        stores = vce_api._register_node_info_stores(nodes, run)
        given = (lambda: client_app(fleet), lambda: HereBackend({}), nodes, factory, stores, stop, VceMetrics())
        threads.append(threading.Thread(target=vce_api.run_api, args=given))
        threads[-1].start()
        return grid

    yield start
    stop.set()
    for thread in threads:
        thread.join()


def test_offers_and_answers_travel_as_flowers_messages(tmp_path: Path, engine: Any) -> None:
    made = simulated(
        tmp_path, lambda fleet, folder: SimulatedSites(engine(fleet, len(SITES)), SITES, folder, states_of(folder), threading.Event())
    )
    assert len(made.committed) == 3
    record = tmp_path / "server" / "runs" / RUN / "record"
    assert not verify_record(record, None).findings


def test_what_a_virtual_site_cannot_answer_is_its_code_and_a_site_that_fails_is_one_too(tmp_path: Path, engine: Any) -> None:
    """An offer that another server signed, and a base state that is not there."""
    fleet = Fleet(plan=plan_of(1).canonical_bytes(), server_key=SigningKey.generate().public.to_text(), secret=SECRET)
    sites = SimulatedSites(engine(fleet, 2), SITES[:2], tmp_path, tmp_path, threading.Event())
    offers = [Offer(site=site, envelope=b"{}", deadline=time.time() + 60) for site in SITES[:2]]
    replies = sorted(sites.exchange(offers, tmp_path, withheld=lambda site: None, sending=lambda site: None), key=lambda reply: reply.site)
    assert [(reply.site, reply.update) for reply in replies] == [(site, None) for site in SITES[:2]]
    assert {reply.code for reply in replies} <= {"PF601", "PF602", "PF405", "PF410"}
    (held,) = sites.exchange(offers[:1], tmp_path, withheld=lambda site: "PF518", sending=lambda site: None)
    assert held.code == "PF518"


def test_an_exchange_ends_with_the_engine_and_with_its_deadline(tmp_path: Path, engine: Any) -> None:
    fleet = Fleet(plan=plan_of(1).canonical_bytes(), server_key=SigningKey.generate().public.to_text(), secret=SECRET)
    ended = threading.Event()
    sites = SimulatedSites(engine(fleet, 1), SITES[:1], tmp_path, tmp_path, ended)
    late = Offer(site=SITES[0], envelope=b"{}", deadline=time.time() - 1)
    (silent,) = sites.exchange([late], tmp_path, withheld=lambda site: None, sending=lambda site: None)
    assert silent.code == "PF515"
    ended.set()
    with pytest.raises(SimulationEndedError):
        list(sites.exchange([replace(late, deadline=time.time() + 600)], tmp_path, withheld=lambda site: None, sending=lambda site: None))


@pytest.mark.timeout(900)
def test_ray_carries_rounds_until_ctrl_c_and_leaves_no_process(tmp_path: Path) -> None:
    """The whole command, where Ray is installed: rounds are committed, the record verifies wherever it was left, nothing stays behind."""
    pytest.importorskip("ray", reason="wants the extra simulation")
    command = [str(COMMAND), "simulate", "--sites", "4", "--rounds", "1000", "--out", str(tmp_path / "out")]
    told = []
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as running:
        assert running.stderr is not None
        for line in running.stderr:
            told.append(line)
            if "round 1 of" in line:
                tree = psutil.Process(running.pid).children(recursive=True)
                running.send_signal(signal.SIGINT)
                break
        told += running.stderr.readlines()
        assert running.wait(120) == 130, told
    assert len(tree) >= 4, "Ray's two, and a process for each site that computes at a time"
    assert psutil.wait_procs(tree, timeout=60)[1] == []
    home = tmp_path / "out" / "server"
    with SqlStore(f"sqlite:///{home}/pathfed.db") as store:
        assert [(row.site, row.code) for row in store.participations(RUN, 1)] == [(f"virtual-000{number}", None) for number in range(1, 5)]
    assert not verify_record(home / "runs" / RUN / "record", None).findings


@pytest.fixture
def pathfed(run_main):
    return partial(run_main, cli.main, "pathfed")


@pytest.mark.parametrize(
    ("options", "code", "told"),
    [
        (["--sites", 0], "PF905", "1 to 2000"),
        (["--sites", 2001], "PF905", "1 to 2000"),
        (["--sites", 1], "PF905", "quorum"),
        (["nowhere.toml"], "PF904", "nowhere.toml"),
        (["broken.toml"], "PF101", "not TOML"),
        (["started.toml"], "PF905", "random weights"),
    ],
)
def test_bad_options_get_a_code_and_make_no_folder(pathfed, tmp_path, monkeypatch, options, code, told) -> None:
    monkeypatch.chdir(tmp_path)
    Path("broken.toml").write_text("name = ")
    started = f'init_from = "sha256:{"0" * 64}"'
    Path("started.toml").write_text(simulation_plan().read_text().replace("[encoder]", f"[encoder]\n{started}"))
    done = pathfed("simulate", *options, "--out", "out", "--json")
    assert done.code == code
    assert told in done.out
    assert not Path("out").exists()


def test_a_folder_that_holds_something_else_is_left_as_it_is(pathfed, tmp_path) -> None:
    (tmp_path / "mine").write_text("mine")
    done = pathfed("simulate", "--out", tmp_path, "--json")
    assert done.code == "PF904"
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_without_ray_the_command_says_what_to_install(pathfed, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    done = pathfed("simulate", "--sites", 2, "--out", tmp_path / "out", "--json")
    assert done.code == "PF907"
    assert "pathfed[client,server,simulation]" in done.out
    assert (tmp_path / "out" / MARK).exists()
