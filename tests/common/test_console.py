"""Command lines as people and scripts meet them: in a process of their own."""

import json
import os
import signal
import subprocess
import sys

import pytest

SCRIPT = """
import sys, time
import typer
from pathfed_common import console, interrupts
from pathfed_common.console import Json, show
from pathfed_common.errors import ErrorCode, PlanError

app = typer.Typer()

@app.command()
def fail(as_json: Json = False) -> None:
    raise PlanError(ErrorCode.PLAN_OUT_OF_BOUNDS, "must be [bold]above[/] 0", where="plan.toml, key [x]", value="0", remedy="raise it")

@app.command()
def result(as_json: Json = False) -> None:
    show({"name": "[red]a[/]", "share": 0.123456789, "none": None, "list": [1, 2]}, as_json=as_json, title="[title]")

@app.command()
def table(as_json: Json = False) -> None:
    show([{"site": "[a]", "epsilon": 1.5}, {"site": "b", "epsilon": None}], as_json=as_json, title="sites")

@app.command()
def empty(as_json: Json = False) -> None:
    show([], as_json=as_json, title="sites")

@app.command()
def bug() -> None:
    raise RuntimeError("a bug")

@app.command()
def wait(as_json: Json = False) -> None:
    interrupts.end_on_terminate()
    console.teller(as_json=as_json)("waiting")
    sys.stdout.flush()
    time.sleep(30)

console.run(app)
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True, check=False)


def test_an_error_ends_with_its_familys_status_and_is_told_on_standard_error():
    done = run("fail")
    assert done.returncode == 11
    assert done.stdout == ""
    for part in ("PF104", "must be [bold]above[/] 0", "plan.toml, key [x]", "value  0", "raise it", "docs/errors/PF104.md"):
        assert part in done.stderr
    assert "Traceback" not in done.stderr


def test_an_error_is_one_json_value_for_scripts():
    done = run("fail", "--json")
    assert done.returncode == 11
    assert json.loads(done.stdout) == {
        "error": {"code": "PF104", "what": "must be [bold]above[/] 0", "where": "plan.toml, key [x]", "value": "0", "remedy": "raise it"}
    }


def test_results_are_lines_for_people_and_one_json_value_for_scripts():
    done = run("result")
    assert done.returncode == 0
    assert "[title]" in done.stdout
    assert "[red]a[/]" in done.stdout
    assert "0.123457" in done.stdout
    assert json.loads(run("result", "--json").stdout) == {"name": "[red]a[/]", "share": 0.123456789, "none": None, "list": [1, 2]}


def test_lists_are_tables_for_people_and_one_json_value_for_scripts():
    told = run("table").stdout
    assert [line.split() for line in told.splitlines()] == [["sites"], ["site", "epsilon"], ["[a]", "1.5"], ["b", "-"]]
    assert json.loads(run("table", "--json").stdout) == [{"site": "[a]", "epsilon": 1.5}, {"site": "b", "epsilon": None}]
    assert run("empty").stdout.strip() == "sites: none"
    assert json.loads(run("empty", "--json").stdout) == []


def test_a_bug_shows_its_trace():
    done = run("bug")
    assert done.returncode == 1
    assert "RuntimeError: a bug" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("arguments", [(), ("--json",)])
def test_ctrl_c_and_being_ended_take_the_same_orderly_way_out(number, arguments):
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT, "wait", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert "waiting" in line
        if arguments:
            assert json.loads(line)["event"] == "waiting"
        os.kill(process.pid, number)
        _, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "stopped by you" in errors
    assert "Traceback" not in errors
