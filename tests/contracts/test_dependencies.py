"""What the code imports is declared by the extra that installs it, and nothing is declared that nobody needs."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
#: Which extras each package may count on, beside what everybody gets.
PACKAGES = {
    "common/pathfed_common": (),
    "client/pathfed_client": ("client", "dask"),
    "server/pathfed_server": ("server",),
    "deploy/local/pathfed_local": ("client", "server", "demo", "simulation"),
}
#: Declared without being imported: what they are for.
NOT_IMPORTED = {
    "openslide-bin": "the library that openslide-python loads",
    "psycopg": "SQLAlchemy loads it for postgresql URLs",
    "imagecodecs": "tifffile loads it for JPEG",
    "tzdata": "zoneinfo reads it where the system has no time zones",
}
#: Imported in one function, for which the caller has installed the extra.
LAZY = {"opacus": "the second opinion before a charge: sites alone charge"}


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[\[<>=]", requirement)[0].lower() for requirement in requirements}


def imported(folder: Path) -> set[str]:
    """Distributions whose modules a package imports, anywhere in it."""
    distributions = packages_distributions()
    found: set[str] = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                modules = [node.module]
            else:
                continue
            tops = {module.split(".")[0] for module in modules}
            foreign = {top for top in tops if top not in sys.stdlib_module_names and not top.startswith("pathfed_")}
            found |= {distributions.get(top, [top])[0].lower() for top in foreign}  # not every extra is installed here
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_every_import_is_declared(package):
    declared = names(PROJECT["dependencies"]).union(*(names(PROJECT["optional-dependencies"][extra]) for extra in PACKAGES[package]))
    assert imported(ROOT / package) - declared - set(LAZY) == set()


def test_every_declared_library_is_needed():
    for package, extras in PACKAGES.items():
        used = imported(ROOT / package)
        for extra in ("demo", "simulation") if "demo" in extras else extras:
            assert names(PROJECT["optional-dependencies"][extra]) - used - set(NOT_IMPORTED) - set(LAZY) == set(), extra
    everywhere = set().union(*(imported(ROOT / package) for package in PACKAGES))
    assert names(PROJECT["dependencies"]) - everywhere - {"click"} == set(), "click is held back for typer's sake"


def test_lazily_imported_libraries_are_declared_where_they_are_used():
    assert set(LAZY) <= names(PROJECT["optional-dependencies"]["client"])
