"""What the kill matrix runs on: three tiny hospitals, and a consortium that can be put back to its beginning."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from kill_world import World
from tests.end_to_end.conftest import PLAN, _processes_of_fixture, hospitals, wait_for

from pathfed_local.consortium import find_hospitals

__all__ = ["_processes_of_fixture", "hospitals"]

#: `make chaos`: every case ("full"), or each kind of process once ("short").
CHAOS = os.environ.get("CHAOS", "")
FULL = CHAOS == "full"
SEED = int(os.environ.get("SEED", "0"))
#: Rounds of a run; 0: as many as its cases need.
ROUNDS = int(os.environ.get("ROUNDS", "0"))
#: A file that each case's result is appended to, one JSON object a line.
RESULTS = Path(os.environ["CHAOS_RESULTS"]) if os.environ.get("CHAOS_RESULTS") else None


@pytest.fixture(scope="session")
def make_world(tmp_path_factory: pytest.TempPathFactory, hospitals: Path) -> Callable[[int], World]:
    """A consortium at rest whose run has so many rounds, all of them with every site: `make_world(rounds)`."""
    made: dict[int, World] = {}

    def make(rounds: int) -> World:
        if rounds not in made:
            text = PLAN
            for old, new in _OF_THE_MATRIX.items():
                assert old in text, old
                text = text.replace(old, new)
            world = World(
                out=tmp_path_factory.mktemp("matrix") / "consortium",
                hospitals=find_hospitals(hospitals, 3),
                plan_text=text.replace("count = 2", f"count = {rounds}"),
            )
            world.set_up(wait_for)
            made[rounds] = world
        return made[rounds]

    return make


#: Enough budget for many rounds; every round needs every site, and time for whatever is killed in it to come back.
_OF_THE_MATRIX: dict[str, Any] = {
    "noise_multiplier = 4.0": "noise_multiplier = 20.0",
    "epsilon_limit = 8.0": "epsilon_limit = 900.0",
    "quorum = 2": "quorum = 3",
    "deadline_s = 120": "deadline_s = 900",
}
