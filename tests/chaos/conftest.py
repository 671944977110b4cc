"""What the kill matrix runs on: three tiny hospitals, and a consortium that can be put back to its beginning."""

import os
from pathlib import Path

import pytest
from kill_cases import matrix, rounds_for, short
from kill_conductor import Case, Conductor
from kill_world import Ended, World, matrix_plan
from tests.end_to_end.conftest import PLAN, _processes_of_fixture, hospitals

from pathfed_local.consortium import find_hospitals

__all__ = ["_processes_of_fixture", "hospitals"]

#: `make chaos`: every case ("full"), or each kind of process once ("short").
CHAOS = os.environ.get("CHAOS", "")
FULL = CHAOS == "full"
SEED = int(os.environ.get("SEED", "0"))
#: Rounds of a run; 0: as many as its cases need.
ROUNDS = int(os.environ.get("ROUNDS", "0"))
#: Bounds a hang.
WITHIN_S = 7200.0 if FULL else 1800.0
#: A file that each case's result is appended to, one JSON object a line.
RESULTS = Path(os.environ["CHAOS_RESULTS"]) if os.environ.get("CHAOS_RESULTS") else None


@pytest.fixture(scope="session")
def cases(hospitals: Path) -> list[Case]:
    """Whom to kill at which instant."""
    sites = [one.name for one in find_hospitals(hospitals, 3)]
    return matrix(sites, SEED) if FULL else short(sites)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory, hospitals: Path, cases: list[Case]) -> World:
    """A consortium at rest, whose run has rounds for every case, all of them with every site."""
    plan = matrix_plan(ROUNDS or rounds_for(cases))
    made = World(out=tmp_path_factory.mktemp("matrix") / "consortium", hospitals=find_hospitals(hospitals, 3), plan_text=plan)
    made.set_up()
    return made


@pytest.fixture(scope="session")
def undisturbed(world: World) -> Ended:
    """How the run ends when nothing is killed."""
    with world.again() as made:
        Conductor(world, made, []).drive(WITHIN_S)
        return world.ended(made)


@pytest.fixture(scope="session")
def demo_plan_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quick plan of the end-to-end tests, with rounds enough to be killed in."""
    path = tmp_path_factory.mktemp("demo") / "plan.toml"
    path.write_text(PLAN.replace("count = 2", "count = 6").replace("epsilon_limit = 8.0", "epsilon_limit = 60.0"), encoding="utf-8")
    return path
