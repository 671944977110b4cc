"""Fixtures over the honest record of `record_fixtures`."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from record_fixtures import Scene, sample_statement, small_plan, small_preset, write_files

from pathfed_common.plan import Plan
from pathfed_common.provenance.statement import UpdateStatement


@pytest.fixture(scope="session")
def plan() -> Plan:
    return small_plan()


@pytest.fixture(scope="module")
def small_encoder() -> Iterator[None]:
    with small_preset():
        yield


@pytest.fixture
def scene(plan: Plan, small_encoder: None) -> Scene:
    return Scene(plan)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[dict[str, bytes]], Path]:
    """Writes a record's files into a fresh folder."""
    return lambda files: write_files(tmp_path / "record", files)


@pytest.fixture(scope="session")
def make_statement() -> Callable[..., UpdateStatement]:
    """Makes a statement, honest but for the fields given."""
    return sample_statement
