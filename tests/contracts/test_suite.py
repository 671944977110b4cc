"""The suite itself: nothing is left out, nothing is skipped over."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"


@pytest.fixture(scope="module")
def test_files() -> list[Path]:
    return [path for path in TESTS.rglob("*.py") if "__pycache__" not in path.parts]


def test_every_test_function_lies_in_a_file_that_is_collected(test_files):
    for path in test_files:
        collected = path.name.startswith("test_") and "benchmarks" not in path.parts
        holds_tests = re.search(r"^(?:async )?def test_", path.read_text(encoding="utf-8"), flags=re.MULTILINE) is not None
        assert holds_tests <= collected, f"{path.relative_to(ROOT)} holds tests that nobody runs"
        holds_classes = re.search(r"^(?:class Test|Test\w+ = )", path.read_text(encoding="utf-8"), flags=re.MULTILINE) is not None
        assert collected <= (holds_tests or holds_classes), f"{path.relative_to(ROOT)} holds no test"


def test_source_is_never_told_that_it_is_tested():
    for place in ("common", "client", "server", "deploy"):
        for path in (ROOT / place).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            assert not re.search(r"PYTEST|import pytest|unittest|mock", text), path


def test_committed_text_names_no_path_of_one_machine():
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in listed.stdout.split("\n"):
        path = ROOT / name
        if not path.is_file() or path.suffix in (".png", ".svs", ".tiff", ".whl"):
            continue
        text = path.read_text(encoding="utf-8", errors="ignore")
        assert "/" + "work/" not in text, name
        assert "/" + "root/" not in text, name


@pytest.mark.parametrize(("fault", "outcome"), [("pass", 0), ("warnings.warn('old', DeprecationWarning)", 1), ("open(__file__)", 1)])
def test_warnings_are_errors(tmp_path, fault, outcome):
    """Resource warnings, which show leaked files and sockets, among them."""
    file = tmp_path / "test_planted.py"
    file.write_text(f"import warnings\n\ndef test_planted():\n    {fault}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", "-c", str(ROOT / "pyproject.toml"), str(file)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == outcome, result.stdout


def test_files_and_end_to_end_tests_are_never_torn_apart(tmp_path):
    """With two test processes: each file in one of them, and all that start a consortium in one, before everything else."""
    for name in ("chaos/test_zero", "first/test_one", "first/test_two", "end_to_end/test_three", "end_to_end/test_four"):
        file = tmp_path / f"{name}.py"
        file.parent.mkdir(exist_ok=True)
        lines = ["import pathlib, pytest", "@pytest.mark.parametrize('i', range(3))", "def test_planted(i, worker_id):"]
        lines += [
            f"    with pathlib.Path({str(tmp_path / 'log')!r}).open('a') as log:",
            f"        log.write('{name} ' + worker_id + '\\n')",
        ]
        file.write_text("\n".join(lines), encoding="utf-8")
    shutil.copy(TESTS / "conftest.py", tmp_path)
    options = re.search(r"pytest (-n 2 .*)", (ROOT / "Makefile").read_text(encoding="utf-8"))
    assert options is not None
    command = [sys.executable, "-m", "pytest", *options.group(1).split(), "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml")]
    result = subprocess.run(
        [*command, "--rootdir", str(tmp_path), str(tmp_path)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout
    lines = (tmp_path / "log").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 15
    assert len({line for line in lines if line.startswith("first/")}) == 2, "one process a file"
    assert len({line.split()[1] for line in lines if line.startswith(("end_to_end/", "chaos/"))}) == 1, "one process for all of them"
    by_worker = {worker: [line for line in lines if line.endswith(worker)] for worker in ("gw0", "gw1")}
    for mine in by_worker.values():
        assert mine == sorted(mine, key=lambda line: line.startswith("first/")), "they are the first that a process is given"
