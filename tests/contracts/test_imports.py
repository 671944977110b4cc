"""The import contracts hold, and each of them notices what it is for."""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = {
    "pathfed_common": "common",
    "pathfed_client": "client",
    "pathfed_server": "server",
    "pathfed_local": "deploy/local",
}
CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]["contracts"]

# One forbidden import for each contract: (contract, module that is changed, what it imports)
FAULTS = [
    ("server and client never meet", "pathfed_client/gate/planted.py", "import pathfed_server.rounds"),
    ("common knows neither side", "pathfed_common/planted.py", "from pathfed_client import cohort"),
    ("nobody imports the local consortium", "pathfed_server/provenance/planted.py", "import pathfed_local"),
    ("the pure core reaches no edge", "pathfed_client/budget/planted.py", "def late():\n    import sqlite3"),
    ("a bare GPU host needs torch and numpy alone", "pathfed_client/training/planted.py", "import pathfed_common.plan"),
    ("timm and torchvision are never needed", "pathfed_common/encoder/planted.py", "import timm"),
    ("the server points inward", "pathfed_server/rounds/planted.py", "import pathfed_server.db"),
    ("the client points inward", "pathfed_client/slides/planted.py", "import pathfed_client.budget"),
    ("each edge library has one place", "pathfed_client/io/planted.py", "import openslide"),
]


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    lint_imports = Path(sys.executable).with_name("lint-imports")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(str(folder / place) for place in FOLDERS.values()), "COLUMNS": "300"}
    command = [str(lint_imports), "--no-cache", "--config", str(folder / "pyproject.toml")]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def broken(output: str) -> set[str]:
    return {line.split(" BROKEN")[0].strip() for line in output.splitlines() if " BROKEN" in line}


def copy_source(folder: Path) -> None:
    for package, place in FOLDERS.items():
        shutil.copytree(ROOT / place / package, folder / place / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)


def test_contracts_hold():
    result = lint(ROOT)
    assert result.returncode == 0, result.stdout + result.stderr


def test_every_contract_has_a_planted_fault():
    assert {fault[0] for fault in FAULTS} == {contract["name"] for contract in CONTRACTS}


def test_planted_faults_break_their_contracts(tmp_path):
    copy_source(tmp_path)
    assert len({module for _, module, _ in FAULTS}) == len(FAULTS), "one file each"
    for _, module, statement in FAULTS:
        package = module.split("/", maxsplit=1)[0]
        (tmp_path / FOLDERS[package] / module).write_text(f"{statement}\n", encoding="utf-8")
    result = lint(tmp_path)
    assert result.returncode != 0
    assert broken(result.stdout) == {fault[0] for fault in FAULTS}, result.stdout + result.stderr


@pytest.mark.parametrize(
    "modules",
    [
        "pathfed_common.encoder.vit, pathfed_common.encoder.weights, pathfed_common.objectives.mae",
        "pathfed_common.privacy.mechanism, pathfed_common.privacy.randomness",
        "pathfed_client.training.private_step, pathfed_client.training.local_round",
    ],
)
def test_training_imports_with_torch_and_numpy_alone(modules):
    """As on a GPU host that has no Flower, OpenSlide, database, pydantic or accountant."""
    absent = "pydantic dp_accounting opacus flwr openslide sqlalchemy alembic typer rich cryptography PIL httpx starlette jinja2"
    program = f"import sys\nfor name in {absent.split()!r}:\n    sys.modules[name] = None\nimport torch, numpy\nimport {modules}\n"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
