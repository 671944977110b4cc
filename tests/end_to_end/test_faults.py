"""A consortium whose processes are killed one after another goes on, and says what happened. Bad keys and certificates are named."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from kill_world import bring_together, find

from pathfed_common.ids import RunName
from pathfed_local.consortium import Consortium, find_hospitals
from pathfed_server.db.sql_store import SqlStore
from pathfed_server.home import ServerHome

BIN = Path(sys.executable).parent
RUN = RunName("faults")
#: kind of process (`kill_world.KINDS`) -> what is told when it was killed ({owner}: the command that owns it)
VICTIMS = {
    "runner": r"{owner}: PF903 runner ended \(-9\) and is started again",
    "supernode": r"{owner}: PF\d+ supernode ended \(-9\) and is started again",
    "site": r"PF903 {owner} ended \(-9\) and is started again",
    "fleet door": r"{owner}: PF903 fleet-door ended \(-9\) and is started again",
    "superlink": r"{owner}: PF903 superlink ended \(-9\) and is started again",
    "superexec": r"{owner}: PF903 superexec ended \(-9\) and is started again",
    "round loop": rf"{{owner}}: PF903 run {RUN}: the round loop ended early",
    "control plane": r"{owner}: PF903 control ended \(-9\) and is started again",
    "agent": r"{owner}: PF\d+ agent ended \(-9\) and is started again",
    "server": r"PF903 {owner} ended \(-9\) and is started again",
}
#: Generous: they bound a hang, and are reached by no machine that works. Their sum, and the fixture's time, stay below the limit.
pytestmark = pytest.mark.timeout(1500)
_COMMITS_WITHIN_S = 400
_TOLD_WITHIN_S = 200
_ENDS_WITHIN_S = 120


@pytest.fixture(scope="module")
def consortium(tmp_path_factory, plan_file, hospitals) -> Iterator[Consortium]:
    """A running consortium with a run of many rounds, set up through the commands."""
    out = tmp_path_factory.mktemp("faults")
    made = Consortium(out, find_hospitals(hospitals, 3), restarts=20)  # no victim uses up another's
    text = plan_file.read_text().replace("count = 2", "count = 1000").replace("epsilon_limit = 8.0", "epsilon_limit = 900.0")
    text = text.replace("noise_multiplier = 4.0", "noise_multiplier = 20.0").replace("deadline_s = 120", "deadline_s = 40")

    def start() -> None:
        # Copied while nothing writes to it: the folder of a running site changes under a copy's hands.
        shutil.copytree(made.site(made.hospitals[0].name), _site_at_rest(made))
        made.start_sites()

    try:
        digest = bring_together(made, text, start=start)
        made.server_command("run", "start", digest, "--name", RUN)
        yield made
    finally:
        made.stop()


def _site_at_rest(consortium: Consortium) -> Path:
    """The first site's folder as it was before the site was started."""
    return consortium.out / "site-at-rest"


def _committed(consortium: Consortium) -> int:
    with SqlStore(ServerHome(consortium.server).database_url) as store:
        return max(0, len(store.checkpoints(RUN)) - 1)


def _victim(consortium: Consortium, kind: str) -> tuple[str, psutil.Process] | None:
    """A living process of a kind, and its owner's name; None: none now (it is being started again)."""
    return next(((owner, process) for owner in consortium.pids() for process in find(consortium, kind, owner)), None)


@pytest.mark.parametrize("victim", VICTIMS)
def test_a_killed_process_is_named_and_rounds_go_on(consortium: Consortium, victim: str, wait_for) -> None:
    told: list[str] = []

    def look() -> int:
        consortium.watch(told.append)
        return _committed(consortium)

    def one() -> tuple[str, psutil.Process] | None:
        consortium.watch(told.append)
        return _victim(consortium, victim)

    before = look()
    assert wait_for(look, until=lambda rounds: rounds > before, within_s=_COMMITS_WITHIN_S) > before, told
    found = wait_for(one, until=lambda found: found, within_s=_TOLD_WITHIN_S)
    assert found, told
    owner, process = found
    told.clear()
    process.send_signal(signal.SIGKILL)

    def named() -> bool:
        look()
        return any(re.match(VICTIMS[victim].format(owner=owner), line) for line in told)

    assert wait_for(named, until=bool, within_s=_TOLD_WITHIN_S), told
    now = look()
    assert wait_for(look, until=lambda rounds: rounds >= now + 2, within_s=_COMMITS_WITHIN_S) >= now + 2, told


def test_every_ledger_is_whole_after_all_that(consortium: Consortium) -> None:
    for hospital in consortium.hospitals:
        found = consortium.site_command(hospital.name, "ledger", "show")
        assert len({entry["round"] for entry in found["entries"]}) == len(found["entries"]), "no round is charged twice"


def test_a_site_whose_node_key_the_server_does_not_know_is_told_so(consortium: Consortium, tmp_path, wait_for, leaves_no_process) -> None:
    home = tmp_path / "stranger"
    shutil.copytree(_site_at_rest(consortium), home)
    key = ec.generate_private_key(ec.SECP384R1())
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption())
    (home / "keys" / "flower").write_bytes(pem)
    log = tmp_path / "start.log"
    with log.open("wb") as file:
        started = subprocess.Popen([str(BIN / "pathfed-site"), "start", "--home", str(home), "--json"], stdout=file, stderr=file)
    try:
        assert "PF402" in wait_for(log.read_text, until=lambda text: "PF402" in text, within_s=_TOLD_WITHIN_S)
        assert started.poll() is None, "it goes on trying"
    finally:
        started.send_signal(signal.SIGINT)
        assert started.wait(_ENDS_WITHIN_S) == 0


def test_a_site_refuses_a_server_whose_certificate_is_not_the_consortiums(consortium: Consortium, tmp_path, leaves_no_process) -> None:
    other = tmp_path / "other"
    done = subprocess.run([str(BIN / "pathfed-server"), "init", "--home", str(other), "--json"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)
    home = tmp_path / "site"
    shutil.copytree(_site_at_rest(consortium), home)
    shutil.copy(other / "ca.pem", home / "ca.pem")
    refused = subprocess.run(
        [str(BIN / "pathfed-site"), "start", "--home", str(home), "--json"], capture_output=True, text=True, timeout=_TOLD_WITHIN_S
    )
    assert refused.returncode == 14
    assert json.loads(refused.stdout.splitlines()[-1])["error"]["code"] == "PF401"


#: phase of the demo -> what is seen in its folder once it has been reached
MOMENTS: dict[str, Callable[[Path], bool]] = {
    "homes are made": lambda out: "pathfed-server init" in _commands(out),
    "sites scan": lambda out: "pathfed-site scan" in _commands(out),
    "sites approve": lambda out: "pathfed-site approve" in _commands(out),
    "server and sites start": lambda out: (out / "server" / "ports.json").exists(),
    "rounds": lambda out: any((out / "server" / "runs").glob("*/record/rounds/*")),
}


def _commands(out: Path) -> str:
    log = out / "commands.log"
    return log.read_text() if log.exists() else ""


@pytest.mark.parametrize(
    ("moment", "how"), [*((moment, "ctrl-c") for moment in MOMENTS), ("sites scan", "terminated"), ("rounds", "terminated")]
)
def test_ending_the_demo_at_any_moment_leaves_no_process(tmp_path, plan_file, hospitals, wait_for, leaves_no_process, moment, how) -> None:
    """Ctrl-C reaches every process of the terminal's group; a service manager's SIGTERM the demo alone.

    With one site, whose processes are of every kind there is; two are ended by Ctrl-C while rounds run.
    """
    out = tmp_path / "out"
    sites = "2" if (moment, how) == ("rounds", "ctrl-c") else "1"
    command = [str(BIN / "pathfed"), "demo", "--out", str(out), "--plan", str(plan_file), "--slides", str(hospitals)]
    command += ["--sites", sites, "--rounds", "30", "--no-reply-slots"]
    demo = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        assert wait_for(lambda: MOMENTS[moment](out) or demo.poll() is not None, until=bool, within_s=_COMMITS_WITHIN_S)
        assert demo.poll() is None
        os.killpg(demo.pid, signal.SIGINT) if how == "ctrl-c" else demo.terminate()
        assert demo.wait(_ENDS_WITHIN_S) == 130
    finally:
        if demo.poll() is None:
            demo.kill()
            demo.wait()


def test_a_demo_killed_without_a_word_while_its_sites_scan_leaves_no_process(
    tmp_path, plan_file, hospitals, wait_for, leaves_no_process
) -> None:
    out = tmp_path / "out"
    command = [str(BIN / "pathfed"), "demo", "--out", str(out), "--plan", str(plan_file), "--slides", str(hospitals), "--sites", "1"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as demo:
        assert wait_for(lambda: MOMENTS["sites scan"](out), until=bool, within_s=_COMMITS_WITHIN_S)
        demo.kill()
