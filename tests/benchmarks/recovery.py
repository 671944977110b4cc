"""Seconds from kill -9 to the round going on, for each kind of process, and the work that was done twice.

    .venv/bin/python tests/benchmarks/recovery.py [--quick]

A consortium of three tiny hospitals; every round needs all three. One process at a time is killed, at the instant of a round that stands
beside it (`tests/support/pathfed_instants.py`), and the seconds until that round is committed are taken. What an undisturbed round takes is
told too. Work done twice: how often a site began to train the round again, and how often it sent the update that it had sealed again.
`everything` is every process of everybody at once. `--quick` kills those of the server alone.

Flower 1.41 alone, measured before (decision 0005 and the notes there): a killed SuperNode or ClientApp gives an error reply after about 52
to 60 s, a SuperNode that was terminated and comes back loses its message until the round's deadline; a killed ServerApp ends the run for
good; a SuperLink that is back within 10 s goes on.
"""

import re
import shutil
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# A script's import path holds its own folder alone; benchmarks share modules, and this one the kill matrix's.
sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from kill_conductor import EVERYTHING, Case, Conductor, Happened, victim_of
from kill_world import World, matrix_plan
from tests.benchmarks._harness import Target, arguments, end_on_terminate, finish, machine, tell

from pathfed_local.consortium import find_hospitals
from pathfed_local.generator import generate_hospitals
from pathfed_server.db.sql_store import SqlStore
from pathfed_server.home import ServerHome
from pathfed_server.rounds.state import RunState

_WITHIN_S = 3600.0
_SERVER = "server"
#: who is killed, at which instant, of whose process: the server's or a site's by number
_AT_SERVER = (
    ("round loop", "averaged", _SERVER),
    ("superexec", "collected", _SERVER),
    ("superlink", "offered", _SERVER),
    ("server", "collecting", _SERVER),
    ("control plane", "offered", _SERVER),
    ("fleet door", "offered", _SERVER),
)
_AT_SITES = (
    ("runner", "training", 0),
    ("runner", "sealed", 1),
    ("supernode", "training", 1),
    ("relay", "update travels", 0),
    ("agent", "training", 0),
    ("site", "training", 1),
    ("rank", "a rank trains", 2),
    (EVERYTHING, "training", 0),
)
#: A round that goes on within two minutes on a machine of its own: what Flower takes to notice a dead SuperNode, and as much again.
_TARGETS = {"slowest_s": Target("<=", 240.0), "rounds_lost": Target("<=", 0)}


def main() -> int:
    """Measure and print."""
    given = arguments(__doc__)
    end_on_terminate()
    root = Path(tempfile.mkdtemp(prefix="pathfed-recovery-"))
    generate_hospitals(root / "hospitals", hospitals=3, patients=6, slides_per_patient=1, seed=3, side_px=(512, 640))
    hospitals = find_hospitals(root / "hospitals", 3)
    before = machine()
    wanted = _AT_SERVER if given.quick else (*_AT_SERVER, *_AT_SITES)
    cases = [_case(each, [one.name for one in hospitals]) for each in wanted]
    world = World(out=root / "consortium", hospitals=hospitals, plan_text=matrix_plan(2 * len(cases) + 9))
    tell("setting the consortium up")
    world.set_up()
    with world.again() as made:
        conductor = Conductor(world, made, cases, one_at_a_time=True)
        state = conductor.drive(_WITHIN_S)
        rows = [_row(found, _logs(world)) for found in conductor.happened]
        with SqlStore(ServerHome(made.server).database_url) as store:
            rounds = store.rounds(conductor.run)
    shutil.rmtree(root)
    disturbed = {found.round_index for found in conductor.happened}
    quiet = [
        row.committed_at - row.offered_at
        for row in rounds
        if row.round_index - 1 not in disturbed
        and row.round_index not in disturbed
        and row.committed_at is not None
        and row.offered_at is not None
    ]
    figures: dict[str, Any] = {
        "processes": rows,
        "undisturbed_round_s": round(statistics.median(quiet), 1),
        "slowest_s": max(row["goes_on_s"] for row in rows),
        "rounds_lost": int(state is not RunState.FINISHED) + len(conductor.left),
        "quick": given.quick,
        "machine_before": before,
    }
    return finish("recovery", figures, _TARGETS)


def _case(wanted: tuple[str, str, str | int], sites: Sequence[str]) -> Case:
    kind, instant, at = wanted
    owner = at if isinstance(at, str) else sites[at]
    return Case(kind, instant, owner, victim_of(kind, owner))


def _logs(world: World) -> str:
    """What all runners said."""
    return "\n".join((world.out / "sites" / one.name / "logs" / "runner.log").read_text(encoding="utf-8") for one in world.hospitals)


def _row(found: Happened, logs: str) -> dict[str, Any]:
    said = re.findall(rf"round {found.round_index} of run \S+: (training|resending)", logs)
    assert found.goes_on_s is not None, found
    row = {
        "killed": found.case.kind,
        "at": found.case.instant,
        "goes_on_s": round(found.goes_on_s, 1),
        "trained_again": max(0, said.count("training") - 3),
        "sent_again": said.count("resending"),
    }
    tell(str(row))
    return row


if __name__ == "__main__":
    sys.exit(main())
