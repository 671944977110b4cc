"""A consortium whose processes are killed one after another goes on, and says what happened. Bad keys and certificates are named."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from pathfed_local.consortium import Consortium, find_hospitals

BIN = Path(sys.executable).parent
RUN = "faults"
#: process -> words of its command
VICTIMS = {
    "runner": ("pathfed_client.app",),
    "supernode": ("pathfed_client.transport.supernode",),
    "site": ("pathfed-site", "start"),
    "fleet door": ("pathfed_server.transport.path_filter",),
    "superlink": ("pathfed_server.transport.superlink",),
    "superexec": ("flower-superexec",),
    "round loop": ("flwr-serverapp",),
    "server": ("pathfed-server", "start"),
}


@pytest.fixture(scope="module")
def consortium(tmp_path_factory, plan_file, hospitals) -> Iterator[Consortium]:
    """A running consortium with a run of many rounds, set up through the commands."""
    out = tmp_path_factory.mktemp("faults")
    made = Consortium(out, find_hospitals(hospitals, 3))
    plan = out / "plan.toml"
    text = plan_file.read_text().replace("count = 2", "count = 1000").replace("epsilon_limit = 8.0", "epsilon_limit = 900.0")
    plan.write_text(text.replace("noise_multiplier = 4.0", "noise_multiplier = 20.0").replace("deadline_s = 120", "deadline_s = 25"))
    made.server_command("init")
    for hospital in made.hospitals:
        options: list[str | Path] = [
            "--name",
            hospital.name,
            "--slides",
            hospital.slides,
            "--patients",
            hospital.patients,
            "--no-reply-slots",
        ]
        made.site_command(
            hospital.name, "init", *options, "--server-card", made.server / "server-card.dsse", "--max-epsilon", "900", "--delta", "1e-5"
        )
        made.server_command("sites", "add", made.site(hospital.name) / "site-card.dsse")
    signed = out / "plan.dsse"
    digest = made.server_command("plan", "publish", plan, "--out", signed)["plan"]
    for hospital in made.hospitals:
        made.site_command(hospital.name, "scan", signed)
        made.site_command(hospital.name, "approve", signed, "--patients-at-least", "6", "--out", out / f"{hospital.name}.dsse")
        made.server_command("sites", "approval", out / f"{hospital.name}.dsse")
    # Copied while nothing writes to it: the folder of a running site changes under a copy's hands.
    shutil.copytree(made.site(made.hospitals[0].name), _site_at_rest(made))
    try:
        made.start_server()
        made.start_sites()
        made.server_command("run", "start", digest, "--name", RUN)
        yield made
    finally:
        made.stop()


def _site_at_rest(consortium: Consortium) -> Path:
    """The first site's folder as it was before the site was started."""
    return consortium.out / "site-at-rest"


def _committed(consortium: Consortium) -> int:
    rows = consortium.server_command("rounds", RUN)
    return sum(row["state"] == "committed" for row in rows)


def _victim(consortium: Consortium, words: tuple[str, ...]) -> psutil.Process:
    for owner in consortium.pids().values():
        tree = [psutil.Process(owner), *psutil.Process(owner).children(recursive=True)]
        for process in tree:
            if all(any(word in part for part in process.cmdline()) for word in words):
                return process
    raise AssertionError(f"no process with {words}")


@pytest.mark.timeout(400)
@pytest.mark.parametrize("victim", VICTIMS)
def test_a_killed_process_is_named_and_rounds_go_on(consortium: Consortium, victim: str, wait_for) -> None:
    told: list[str] = []

    def look() -> int:
        consortium.watch(told.append)
        return _committed(consortium)

    before = wait_for(look, until=lambda rounds: rounds >= 1, within_s=150)
    assert before >= 1, told
    told.clear()
    _victim(consortium, VICTIMS[victim]).send_signal(signal.SIGKILL)
    time.sleep(1.5)
    now = look()
    after = wait_for(look, until=lambda rounds: rounds >= now + 2, within_s=200)
    assert after >= now + 2, told
    assert any("PF903" in line or "PF402" in line for line in told), told


def test_every_ledger_is_whole_after_all_that(consortium: Consortium) -> None:
    for hospital in consortium.hospitals:
        found = consortium.site_command(hospital.name, "ledger")
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
        assert "PF402" in wait_for(log.read_text, until=lambda text: "PF402" in text, within_s=60)
    finally:
        started.send_signal(signal.SIGINT)
        assert started.wait(30) == 0


def test_a_site_refuses_a_server_whose_certificate_is_not_the_consortiums(consortium: Consortium, tmp_path, leaves_no_process) -> None:
    other = tmp_path / "other"
    done = subprocess.run([str(BIN / "pathfed-server"), "init", "--home", str(other), "--json"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)
    home = tmp_path / "site"
    shutil.copytree(_site_at_rest(consortium), home)
    shutil.copy(other / "ca.pem", home / "ca.pem")
    refused = subprocess.run(
        [str(BIN / "pathfed-site"), "start", "--home", str(home), "--json"], capture_output=True, text=True, timeout=60
    )
    assert refused.returncode == 14
    assert json.loads(refused.stdout.splitlines()[-1])["error"]["code"] == "PF401"


@pytest.mark.parametrize("after_s", [2.0, 7.0, 30.0])
def test_ctrl_c_at_any_moment_of_the_demo_leaves_no_process(tmp_path, plan_file, hospitals, after_s: float, leaves_no_process) -> None:
    command = [
        str(BIN / "pathfed"),
        "demo",
        "--out",
        str(tmp_path / "out"),
        "--plan",
        str(plan_file),
        "--slides",
        str(hospitals),
        "--rounds",
        "30",
    ]
    demo = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    time.sleep(after_s)
    assert demo.poll() is None
    os.killpg(demo.pid, signal.SIGINT)
    assert demo.wait(40) == 130
