"""`pathfed demo` with nothing given but fewer patients and rounds: slides are painted, the ready plan is fitted, and it can be kept."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pathfed_local.demo import MARK
from pathfed_local.plans import demo_plan
from pathfed_server.report.data import SERVER_MEMORY_LIMIT_MB, SITE_MEMORY_LIMIT_MB

BIN = Path(sys.executable).parent
SITES = ["hospital-a", "hospital-b", "hospital-c"]
pytestmark = pytest.mark.timeout(1300)


@pytest.fixture(scope="module")
def kept(tmp_path_factory, wait_for):
    """A demo over an earlier one's remains, left running by `--keep` while the module's tests look at it."""
    out = tmp_path_factory.mktemp("defaults") / "out"
    (out / "server").mkdir(parents=True)
    (out / MARK).touch()
    (out / "server" / "old").touch()
    (out.parent / "neighbour").touch()
    log = out.parent / "demo.log"
    with log.open("wb") as file:
        command = [str(BIN / "pathfed"), "demo", "--out", str(out), "--patients", "8", "--rounds", "1", "--keep"]
        demo = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
    try:
        ready = wait_for(lambda: demo.poll() is not None or "stays up" in log.read_text(), until=bool, within_s=1000)
        assert ready, log.read_text()
        assert demo.poll() is None, log.read_text()
        yield out, demo
    finally:
        if demo.poll() is None:
            demo.terminate()
            demo.wait(120)


def test_an_earlier_demo_is_replaced_and_its_neighbours_are_left(kept) -> None:
    out, _ = kept
    assert not (out / "server" / "old").exists()
    assert (out.parent / "neighbour").exists()


def test_three_hospitals_are_painted_and_the_ready_plan_is_fitted_to_them(kept) -> None:
    out, _ = kept
    assert sorted(path.name for path in (out / "data").iterdir()) == SITES
    assert all(len(list((out / "data" / site / "slides").iterdir())) >= 8 for site in SITES)
    assert f"# {demo_plan().name}, fitted" in (out / "plan.toml").read_text()


def test_every_phase_is_timed_and_memory_stays_within_its_limits(kept) -> None:
    out, _ = kept
    facts = json.loads((out / "demo.json").read_text())
    assert list(facts["phases_s"]) == ["paint", "set up", "publish", "start", "scan", "approve", "rounds", "release"]
    peaks = facts["memory_peak_mb"]
    assert sorted(peaks) == [*SITES, "server"]
    assert 100 < peaks["server"] < SERVER_MEMORY_LIMIT_MB
    assert all(100 < peaks[site] < SITE_MEMORY_LIMIT_MB for site in SITES)


def test_a_kept_consortium_answers_until_ctrl_c_and_leaves_no_process(kept, processes_of, wait_for) -> None:
    out, demo = kept
    assert len(processes_of(out)) >= 4
    listed = subprocess.run(
        [str(BIN / "pathfed-server"), "rounds", "demo", "--home", str(out / "server"), "--json"], capture_output=True, text=True, check=True
    )
    assert [row["state"] for row in json.loads(listed.stdout)] == ["committed"]
    demo.send_signal(signal.SIGINT)
    assert demo.wait(120) == 130
    assert not wait_for(lambda: processes_of(out), until=lambda found: not found, within_s=60)
