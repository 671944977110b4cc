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

import pytest

from pathfed_local.generator import generate_hospitals

BIN = Path(sys.executable).parent
PAGE = Path(__file__).parents[2] / "docs" / "tutorial.md"
#: What `pathfed verify` ends with when nobody's identity was proven, as the page says.
UNPROVEN = 3
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

    def state_of_run() -> str:
        return json.loads(run("pathfed-server run status first --home by-hand/server --json").stdout)[0]["state"]

    ran = 0
    for language, block in blocks():
        if language == "toml":
            (tmp_path / "by-hand" / "plan.toml").write_text(block)
            continue
        for line in lines(block):
            if line.startswith(". "):
                continue  # the tests' own environment is active
            if shlex.split(line)[1:2] == ["start"]:
                log = (tmp_path / f"start-{len(started)}.log").open("wb")
                started.append(subprocess.Popen(shlex.split(line), cwd=tmp_path, env=environment, stdout=log, stderr=log))
                log.close()
                continue
            if "run start" in line:
                (plan,) = json.loads(run("pathfed-server plan list --home by-hand/server --json").stdout)
                line = line.replace("sha256:DIGEST", plan["plan"][:20])
            if "run report" in line:
                state = wait_for(state_of_run, until=lambda state: state not in ("planned", "running"), within_s=900)
                assert state == "finished", [path.read_text() for path in tmp_path.glob("start-*.log")]
            done = run(line)
            assert done.returncode == (UNPROVEN if line.startswith("pathfed verify") else 0), (line, done.stdout, done.stderr)
            ran += 1
    assert ran >= 15
    assert len(started) == 3
    assert (tmp_path / "by-hand" / "report.html").stat().st_size > 10_000
