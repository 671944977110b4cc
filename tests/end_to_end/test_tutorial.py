"""The tutorial's part by hand, command by command, as its page shows them."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pathfed_common.digest import Digest
from pathfed_local.generator import generate_hospitals
from pathfed_server.db.sql_store import SqlStore
from pathfed_server.home import ServerHome

BIN = Path(sys.executable).parent
PAGE = Path(__file__).parents[2] / "docs" / "tutorial.md"
#: What `pathfed verify` ends with when neither identities nor aggregation are proven, as the page says.
UNPROVEN = 5
#: Commands that people leave running in a terminal of their own.
STAY = ("start", "enroll")
pytestmark = pytest.mark.timeout(1300)


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen]]:
    """Commands in terminals of their own; each gets its Ctrl-C at the end."""
    running: list[subprocess.Popen] = []
    yield running
    for process in reversed(running):
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
    for process in running:
        process.wait(120)


def blocks() -> list[tuple[str, str]]:
    """Each code block of the part by hand: its language and its text."""
    return re.findall(r"```(sh|toml)\n(.*?)```", PAGE.read_text(encoding="utf-8").split("## By hand")[1], flags=re.DOTALL)


def lines(block: str) -> list[str]:
    return [line for line in block.replace("\\\n", " ").splitlines() if line.strip()]


def test_the_commands_of_the_tutorial_lead_to_a_verified_record(tmp_path, wait_for, leaves_no_process, started) -> None:
    generate_hospitals(tmp_path / "pathfed-demo" / "data", hospitals=2, patients=14, slides_per_patient=1, seed=0, side_px=(768, 1024))
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"}

    def run(line: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["sh", "-c", line], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)

    def asked(line: str) -> Any:
        return json.loads(run(line + " --json").stdout)

    def there(line: str) -> Any:
        """What a command shows once there is something to show."""
        return wait_for(lambda: asked(line), until=bool, within_s=120)

    def prepared(line: str) -> str:
        """The line as a person would give it: with what earlier commands printed, and once what it needs is there."""
        for letter in re.findall(r"(?:INVITATION|FINGERPRINT)-([AB])", line):
            line = line.replace(f"INVITATION-{letter}", invitations.get(f"hospital-{letter.lower()}", ""))
            if "FINGERPRINT" in line:
                there("pathfed-server sites pending --home by-hand/server")
                line = line.replace(f"FINGERPRINT-{letter}", asked(f"pathfed-site keys show --home by-hand/{letter.lower()}")["enrolment"])
        if "sha256:DIGEST" in line:
            (plan,) = asked("pathfed-server plan list --home by-hand/server")
            wait_for(lambda: approvals(plan["plan"]), until=lambda found: found == 2, within_s=120)
            line = line.replace("sha256:DIGEST", plan["plan"][:20])
        if "run report" in line:
            state = wait_for(state_of_run, until=lambda state: state not in ("planned", "running"), within_s=900)
            assert state == "finished", [path.read_text() for path in tmp_path.glob("stay-*.log")]
        return line

    def approvals(plan: str) -> int:
        with SqlStore(ServerHome(tmp_path / "by-hand" / "server").database_url) as store:
            return len(store.approvals(Digest(plan)))

    def state_of_run() -> str:
        return str(asked("pathfed-server run status first --home by-hand/server")["state"])

    def stay(line: str) -> None:
        with (tmp_path / f"stay-{len(started)}.log").open("wb") as log:
            started.append(subprocess.Popen(shlex.split(line), cwd=tmp_path, env=environment, stdout=log, stderr=log))

    invitations: dict[str, str] = {}
    ran = 0
    for language, block in blocks():
        if language == "toml":
            (tmp_path / "by-hand" / "plan.toml").write_text(block)
            continue
        for line in map(prepared, lines(block)):
            words = shlex.split(line)
            if line.startswith(". "):
                continue  # the tests' own environment is active
            if words[1] in STAY:
                if words[:2] == ["pathfed-site", "start"]:
                    assert [process.wait(120) for process in started[1:3]] == [0, 0], "both hospitals were enrolled"
                stay(line)
                if words[0] == "pathfed-server":
                    assert wait_for((tmp_path / "by-hand/server/ports.json").exists, until=bool, within_s=120)
                continue
            if words[1] == "invite":
                invitations[words[2]] = asked(line)["invitation"]
                continue
            if words[:2] == ["pathfed-site", "plans"]:
                there("pathfed-site plans --home by-hand/b")
                there(line)
            done = run(line)
            assert done.returncode == (UNPROVEN if line.startswith("pathfed verify") else 0), (line, done.stdout, done.stderr)
            ran += 1
    assert ran >= 18
    assert len(started) == 5
    assert (tmp_path / "by-hand" / "report.html").stat().st_size > 10_000
