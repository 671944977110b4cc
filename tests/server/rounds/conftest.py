"""Fixtures of the round loop's tests; what they are made of is in consortium.py beside it."""

import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

# pytest's importlib mode leaves the import path alone, and the tests of this folder share a module.
sys.path.insert(0, str(Path(__file__).parents[3]))

from tests.server.rounds.consortium import NAMES, Consortium, Make, found, make_plan

from pathfed_common.ids import SiteName
from pathfed_common.plan import Plan
from pathfed_server.db.sql_store import migrate


@pytest.fixture(scope="session")
def migrated_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("migrated") / "server.db"
    migrate(f"sqlite:///{path}")
    return path


@pytest.fixture
def consortium(migrated_file: Path, tmp_path: Path) -> Iterator[Make]:
    torch.set_num_threads(1)
    made: list[Consortium] = []

    def make(plan: Plan | None = None, *, sites: Sequence[SiteName] = NAMES) -> Consortium:
        home = tmp_path / f"server-{len(made)}"
        home.mkdir()
        shutil.copyfile(migrated_file, home / "server.db")
        made.append(found(home, make_plan() if plan is None else plan, sites))
        return made[-1]

    yield make
    for each in made:
        each.store.close()
