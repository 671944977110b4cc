"""docs/operations.md quotes what the program says: lines, codes, commands, logs and numbers must be those of the code."""

import ast
import re
from functools import cache
from pathlib import Path

import click
import pytest
import typer

from pathfed_client import cli as site_cli
from pathfed_client.transport import site_engine
from pathfed_common.errors import ErrorCode
from pathfed_common.processes import ProcessSpec
from pathfed_local import cli as local_cli
from pathfed_server import cli as server_cli
from pathfed_server import daemon
from pathfed_server.home import ServerSettings
from pathfed_server.transport import certificates

ROOT = Path(__file__).parents[2]
PACKAGES = ("common/pathfed_common", "client/pathfed_client", "server/pathfed_server", "deploy/local/pathfed_local")
COMMANDS = {"pathfed-server": server_cli.app, "pathfed-site": site_cli.app, "pathfed": local_cli.app}
#: What stands for a value: in the page, in a format of `logging`, in a format of `str`.
PLACEHOLDER = re.compile(r"<[\w ]+>")
FORMAT = re.compile(r"%[-\d.]*[sdfg]|\{[^{}]*\}")


@pytest.fixture(scope="module")
def page() -> str:
    return (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")


@cache
def words_of_the_code() -> str:
    """Every text in our packages' code, formats taken apart at what they fill in; docstrings left out."""
    found: list[str] = []
    for package in PACKAGES:
        for file in (ROOT / package).rglob("*.py"):
            tree = ast.parse(file.read_text(encoding="utf-8"))
            said = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
            for node in ast.walk(tree):
                if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in said:
                    found += FORMAT.split(node.value)
    return "\0".join(found)


def quoted(page: str) -> list[str]:
    """Each line that the page says the program says."""
    blocks = re.findall(r"^ *```text\n(.*?)```", page, flags=re.DOTALL | re.MULTILINE)
    return [line.strip() for block in blocks for line in block.splitlines() if line.strip()]


def fragments(line: str) -> list[str]:
    """The parts of a quoted line that are the program's own words: between values, codes left out."""
    parts = PLACEHOLDER.split(re.sub(r"\bPF\d{3}\b", "<code>", line))
    return [part.strip(" :;,()") for part in parts if len(re.findall(r"[a-zA-Z]", part)) > 1]


def strangers(line: str) -> list[str]:
    """Parts of a quoted line that the code never says."""
    return [part for part in fragments(line) if part not in words_of_the_code()]


def test_every_line_that_is_quoted_is_one_that_the_program_says(page) -> None:
    lines = quoted(page)
    assert len(lines) >= 15
    assert {line: strangers(line) for line in lines if strangers(line)} == {}


def test_a_line_that_the_program_does_not_say_is_found() -> None:
    assert strangers("PF903 <process> ended (<status>) and is begun anew; see <log>") == ["and is begun anew; see"]
    assert not strangers("PF903 <process> ended (<status>) and is started again; see <log>")


def test_every_code_is_one_and_links_to_its_own_page(page) -> None:
    codes = set(re.findall(r"\bPF\d{3}\b", page))
    assert len(codes) > 25
    assert codes <= {code.value for code in ErrorCode}
    for shown, linked in re.findall(r"\[(PF\d{3})\]\(errors/(PF\d{3})\.md\)", page):
        assert shown == linked


def commands(page: str) -> list[str]:
    """Each command of ours in the page."""
    return re.findall(r"`((?:pathfed-server|pathfed-site|pathfed) [^`]+)`", page)


def resolved(line: str) -> click.Command:
    """The command that a line gives.

    Raises:
        AssertionError: there is none, or it has not such an option.
    """
    name, *rest = line.split()
    found: click.Command = typer.main.get_command(COMMANDS[name])
    while rest and isinstance(found, click.Group):
        word = rest.pop(0)
        assert word in found.commands, f"{line}: no command {word}"
        found = found.commands[word]
    assert not isinstance(found, click.Group), f"{line} is no command"
    options = {option for parameter in found.params for option in parameter.opts}
    for word in rest:
        assert not word.startswith("--") or word in options, f"{line}: no option {word}"
    return found


def test_every_command_exists_with_its_options(page) -> None:
    found = commands(page)
    assert len(set(found)) > 12
    for line in found:
        resolved(line)


@pytest.mark.parametrize("line", ["pathfed-server run away RUN", "pathfed-server log", "pathfed-server log verify --harder"])
def test_a_command_that_does_not_exist_is_found(line: str) -> None:
    with pytest.raises(AssertionError):
        resolved(line)


def test_every_log_is_one_that_is_written(page) -> None:
    logs = set(re.findall(r"`logs/([\w-]+)\.log`", page))
    assert logs >= {"superlink", "superexec", "server-app", "fleet-door", "control", "runner", "supernode", "agent", "relay"}
    for name in logs:
        assert f"{name}.log" in words_of_the_code() or f"/{name}" in words_of_the_code(), name


def test_every_process_has_its_row(page) -> None:
    rows = {cells[1].strip() for line in page.splitlines() if len(cells := line.split("|")) > 3}
    wanted = {"SuperLink", "superexec", "round loop", "fleet door", "control plane", "`pathfed-server start` itself"}
    wanted |= {"SuperNode", "runner", "agent", "relay", "reading process", "`pathfed-site start` itself"}
    assert wanted <= rows
    assert any(row.startswith("trainer rank") for row in rows)


def test_numbers_are_those_of_the_code(page) -> None:
    assert daemon.ATTEMPTS == 3
    assert "Three attempts in a row" in page
    assert ProcessSpec.steady_s == 300
    assert "lives five minutes" in page
    assert site_engine._SUPERNODE_DELAY_S == 5
    assert "it comes back after 5 s" in page
    assert ServerSettings.model_fields["certificate_days"].default == 30
    assert "| 30 days (`certificate_days`)" in page
    assert (certificates._TLS_DAYS, certificates._CA_DAYS) == (397, 3650)
    assert "| 397 days |" in page
    assert "| ten years |" in page
