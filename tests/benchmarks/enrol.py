"""Commands and seconds from an invitation to a first committed round, for one hospital that follows docs/how-to/hospital-it.md.

    .venv/bin/python tests/benchmarks/enrol.py [--quick]

The server runs and the plan is published. Then, as people would give them: `pathfed-server invite`; at the site `init`, `enroll` (which
waits, while the operator admits it by the fingerprint), `start`, `plans`, `scan`, `approve`; and `pathfed-server run start`. A command that
is given again until something has come counts once. Seconds are the machine's: reading, telephoning and thinking come on top. `--quick` has
fewer patients; the commands are the same.
"""

import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# A script's import path holds its own folder alone; benchmarks share modules.
sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.benchmarks._harness import Target, arguments, end_on_terminate, finish, machine, tell

from pathfed_common.digest import Digest
from pathfed_common.ids import RunName
from pathfed_local.consortium import Consortium, find_hospitals
from pathfed_local.generator import generate_hospitals
from pathfed_server.db.sql_store import SqlStore
from pathfed_server.home import ServerHome

_TARGETS = {"commands_at_the_site": Target("<=", 6)}
_RUN = RunName("first")
_POLL_S = 0.2
_WITHIN_S = 600.0
_PLAN = """
name = "enrol"
[objective]
decoder_dim = 32
decoder_depth = 1
decoder_heads = 2
[cohort]
tile_px = 96
tiles_per_patient = 2
[privacy]
expected_patients = 2
noise_multiplier = 4.0
clip_norm = 1.0
delta = 1e-5
epsilon_limit = 8.0
[rounds]
count = 1
deadline_s = 240
quorum = 1
reply_slot_s = 1
"""


@dataclass
class _Clock:
    """Seconds of each step, in order."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - began, 1)
        tell(f"{name}: {self.seconds[name]:.1f} s")


def main() -> int:
    """Measure and print."""
    given = arguments(__doc__)
    end_on_terminate()
    root = Path(tempfile.mkdtemp(prefix="pathfed-enrol-"))
    generate_hospitals(root / "data", hospitals=1, patients=6 if given.quick else 40, slides_per_patient=1, side_px=(512, 768))
    (root / "plan.toml").write_text(_PLAN, encoding="utf-8")
    before, clock = machine(), _Clock()
    consortium = Consortium(root / "out", find_hospitals(root / "data", 1))
    try:
        consortium.server_command("init")
        consortium.start_server()
        digest: Digest = consortium.server_command("plan", "publish", root / "plan.toml", "--out", root / "plan.dsse")["plan"]
        given_before = len(_commands(consortium))
        _enrol(consortium, clock)
        _first_round(consortium, clock, digest)
    finally:
        consortium.stop()
    given_after = _commands(consortium)[given_before:]
    shutil.rmtree(root)
    # `start` runs under the consortium's supervisor, which writes no line.
    figures: dict[str, Any] = {
        "commands_at_the_site": 1 + len(_kinds("pathfed-site", given_after)),
        "commands_at_the_server": len(_kinds("pathfed-server", given_after)),
        "total_s": round(sum(clock.seconds.values()), 1),
        "steps_s": clock.seconds,
        "quick": given.quick,
        "machine_before": before,
    }
    return finish("enrol", figures, _TARGETS)


def _enrol(consortium: Consortium, clock: _Clock) -> None:
    (hospital,) = consortium.hospitals
    with clock.step("invite"):
        invitation = consortium.server_command("invite", hospital.name)["invitation"]
    with clock.step("init"):
        paths: list[str | Path] = ["--slides", hospital.slides, "--patients", hospital.patients]
        consortium.site_command(hospital.name, "init", "--name", hospital.name, *paths, "--max-epsilon", "8", "--delta", "1e-5")
    with clock.step("enroll and admit"):
        enrolling = consortium.begin_site(hospital.name, "enroll", "-", secret=invitation)
        (asked,) = _until(lambda: consortium.server_command("sites", "pending"))
        consortium.server_command("sites", "admit", hospital.name, asked["fingerprint"])
        consortium.finish(enrolling)


def _first_round(consortium: Consortium, clock: _Clock, digest: Digest) -> None:
    (hospital,) = consortium.hospitals
    with SqlStore(ServerHome(consortium.server).database_url) as store:
        with clock.step("start, until the plan has come"):
            consortium.start_sites()
            _until(lambda: consortium.site_command(hospital.name, "plans"))
        with clock.step("scan"):
            consortium.site_command(hospital.name, "scan", "enrol")
        with clock.step("approve, until the server has it"):
            consortium.site_command(hospital.name, "approve", "enrol", "--patients", "6")
            _until(lambda: store.approvals(digest))
        with clock.step("first round"):
            consortium.server_command("run", "start", digest, "--name", _RUN)
            _until(lambda: len(store.checkpoints(_RUN)) > 1)


def _commands(consortium: Consortium) -> list[str]:
    return (consortium.out / "commands.log").read_text(encoding="utf-8").splitlines()


def _kinds(program: str, lines: list[str]) -> set[str]:
    """What was given: the first words after the program's name."""
    return {" ".join(word for word in line.split()[1:3] if word.isalpha()) for line in lines if line.startswith(program)}


def _until(look: Callable[[], Any]) -> Any:
    """What comes, once something has.

    Raises:
        TimeoutError: nothing did.
    """
    end = time.monotonic() + _WITHIN_S
    while time.monotonic() < end:
        if found := look():
            return found
        time.sleep(_POLL_S)
    raise TimeoutError("what was waited for did not come")


if __name__ == "__main__":
    sys.exit(main())
