"""`pathfed simulate`: virtual sites give what a real round admits and a record verifies, on Flower's engine as without it."""

import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import psutil
import pytest

from pathfed_common.ids import SiteName
from pathfed_common.plan import load_plan
from pathfed_common.provenance.verify import verify_record
from pathfed_local import cli
from pathfed_local.plans import simulation_plan
from pathfed_local.simulation.simulating import MARK, RUN, Simulation, SimulationOptions, enrol
from pathfed_local.simulation.virtual_site import Fleet, answer
from pathfed_server import app as server
from pathfed_server.db.sql_store import SqlStore
from pathfed_server.home import ServerHome
from pathfed_server.rounds.ports import Consent, Offer, Reply
from pathfed_server.rounds.state import RunState

COMMAND = Path(sys.executable).parent / "pathfed"
SITES = [SiteName("virtual-0001"), SiteName("virtual-0002"), SiteName("virtual-0003")]
SECRET = bytes(range(32))


class AnsweredHere:
    """`SitePort` that answers in this process, one site after the other."""

    def __init__(self, fleet: Fleet, folder: Path) -> None:
        self._fleet, self._folder = fleet, folder

    def exchange(self, offers: Sequence[Offer], spool: Path, *, withheld: Consent) -> Iterator[Reply]:
        for offer in offers:
            assert withheld(offer.site) is None
            done = answer(self._fleet, offer.envelope, offer.base_state, self._folder)
            update = done.update.replace(spool / f"{offer.site}.safetensors")
            yield Reply(site=offer.site, code=None, statement=done.statement, update=update, received_at=offer.deadline, transfer_s=0.0)


def simulated(out: Path) -> Simulation:
    """Two rounds of three virtual sites through the real loop."""
    plan = load_plan(simulation_plan().read_text(encoding="utf-8"), where="simulation")
    plan = plan.model_copy(update={"rounds": plan.rounds.model_copy(update={"count": 2})})
    home = server.init(out / "server", consortium="simulation", host="127.0.0.1", listen="127.0.0.1", database="")
    fleet = Fleet(plan=plan.canonical_bytes(), server_key=home.evidence_key.public.to_text(), secret=SECRET)
    enrol(home, plan, fleet, SITES)
    (out / "virtual-sites").mkdir()
    made = Simulation(SimulationOptions(out=out, plan=simulation_plan(), sites=3, rounds=2, processes=1), lambda line: None)
    made.drive(home, plan, AnsweredHere(fleet, out / "virtual-sites"))
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


def test_flowers_engine_carries_rounds_until_ctrl_c_and_leaves_no_process(tmp_path: Path) -> None:
    """The whole command, with Ray: rounds are committed, the record verifies at whatever instant it was left, nothing stays behind."""
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
