"""The demo survives kill -9 of anything while it runs, its own commands included, and ends with a release that verifies."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from demo_kills import COMMANDS, killed_while_it_runs
from kill_world import KINDS
from tests.chaos.conftest import CHAOS, SEED

BIN = Path(sys.executable).parent
pytestmark = [pytest.mark.timeout(3000), pytest.mark.skipif(not CHAOS, reason="runs with `make chaos`")]
_KILLS = 7
#: The demo itself starts the server again only so often, as a person would.
_OFTEN = [kind for kind in KINDS if kind not in ("server", "site", "rank")]


@pytest.mark.parametrize("seed", range(3 * SEED, 3 * SEED + 3))
def test_the_demo_survives_kills_and_its_release_verifies(tmp_path, demo_plan_file, hospitals, processes_of, seed) -> None:
    rng = random.Random(seed)
    kinds = [*rng.choices(_OFTEN, k=_KILLS - 2), "server", "site"]
    rng.shuffle(kinds)
    out = tmp_path / "out"
    command = [
        str(BIN / "pathfed"),
        "demo",
        "--out",
        str(out),
        "--plan",
        str(demo_plan_file),
        "--slides",
        str(hospitals),
        "--no-reply-slots",
    ]
    log = tmp_path / "demo.log"
    with log.open("w", encoding="utf-8") as file, subprocess.Popen(command, stdout=file, stderr=file, text=True) as demo:
        try:
            killed = killed_while_it_runs(demo, out, processes_of, kinds, rng, between_s=(4.0, 20.0))
            assert demo.wait(2400) == 0, (killed, log.read_text(encoding="utf-8"))
        finally:
            demo.kill()
    assert len(set(killed) - {*COMMANDS}) >= _KILLS // 2, (killed, log.read_text(encoding="utf-8"))
    assert len({*COMMANDS} & set(killed)) >= len(COMMANDS) - 2, (killed, log.read_text(encoding="utf-8"))
    release, trust, updates = out / "release", out / "trust.json", out / "record" / "updates"
    verify = [str(BIN / "pathfed"), "verify", str(release), "--trust", str(trust), "--replay", str(updates), "--json"]
    done = subprocess.run(verify, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert json.loads(done.stdout)["aggregation_proven"] is True
    assert not processes_of(out)
