"""`run status`, `rounds`, `events` and `sites list` on a real database, followed by real processes."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest
from played_run import BEGIN, RUN, SITES

from pathfed_server.db.sql_store import SqlStore

PROGRAM = Path(sys.executable).parent / "pathfed-server"


@contextmanager
def following(home, tmp_path, *command):
    """A command that follows, and the file that it prints into."""
    out, err = tmp_path / "out", tmp_path / "err"
    argv = [str(PROGRAM), *command, "--follow", "--home", str(home.root), "--json"]
    with out.open("wb") as told, err.open("wb") as aside, subprocess.Popen(argv, stdout=told, stderr=aside) as process:
        try:
            yield process, Told(out, err, process)
        finally:
            process.kill()


class Told:
    """What a following process has printed so far."""

    def __init__(self, out, err, process):
        self._out, self._err, self._process = out, err, process

    def lines(self):
        whole = self._out.read_text().rpartition("\n")[0]
        return [json.loads(line) for line in whole.splitlines()]

    @property
    def aside(self):
        return self._err.read_text()

    def until(self, holds, within_s=60):
        end = time.monotonic() + within_s
        while not holds(self):
            assert time.monotonic() < end, (self.lines(), self.aside)
            assert self._process.poll() is None, (self.lines(), self.aside)
            time.sleep(0.05)


def kinds(told):
    return [line["event"]["kind"] for line in told.lines() if "event" in line]


def test_a_run_at_a_glance(server_cli, home, played):
    played.round(1)
    played.round(2, refused="PF507")
    played.failed(3, BEGIN + 1000)
    told = server_cli("run", "status", RUN, "--home", home.root, "--json").json
    assert (told["committed"], told["planned"], told["round_s"]) == (2, 4, 60.0)
    assert told["epsilon"] == {"least": pytest.approx(0.2), "most": pytest.approx(0.32)}  # what was spent in a failed round is spent
    assert told["round"]["sites"][SITES[0]]["code"] == "PF515"
    assert [(each["round"], each["code"]) for each in told["troubles"]] == [(3, "PF503")]
    people = server_cli("run", "status", RUN, "--home", home.root)
    assert people.status == 0
    assert "2 of 4 committed" in people.out
    assert max(len(line) for line in people.out.splitlines()) <= 100
    assert server_cli("run", "status", "--home", home.root, "--json").json[0]["run"] == RUN


def test_rounds_and_sites_say_what_an_operator_looks_for(server_cli, home, played):
    played.round(1)
    played.round(2, refused="PF507")
    rows = server_cli("rounds", RUN, "--home", home.root, "--json").json
    assert [(row["round"], row["seconds"], row["admitted"], row["asked"]) for row in rows] == [(1, 60.0, 3, 3), (2, 60.0, 2, 3)]
    assert rows[1]["sites"][SITES[2]]["code"] == "PF507"
    assert [row["round"] for row in server_cli("rounds", RUN, "--last", 1, "--home", home.root, "--json").json] == [2]
    assert "PF507" in server_cli("rounds", RUN, "--home", home.root).out
    sites = {row["site"]: row for row in server_cli("sites", "list", "--home", home.root, "--json").json}
    assert [sites[name]["rounds"] for name in SITES] == [2, 2, 1]
    assert sites[SITES[0]]["last_seen_at"] == BEGIN + 119
    assert sites[SITES[0]]["last_refusal"] is None
    assert sites[SITES[2]]["last_refusal"] == {"code": "PF507", "run": RUN, "round": 2, "at": BEGIN + 119}
    assert "PF507" in server_cli("sites", "list", "--home", home.root).out


def test_a_site_whose_enrolment_was_refused_has_no_update_refused(server_cli, home, played):
    with SqlStore(home.database_url) as store:
        store.audit(actor="operator", action="site.refused", subject=SITES[0], at=BEGIN)
    assert server_cli("sites", "list", "--home", home.root, "--json").json[0]["last_refusal"] is None


def test_events_are_printed_in_order_and_resumed_after_any(server_cli, home, played):
    played.round(1)
    played.round(2, refused="PF507")
    every = server_cli("events", "--home", home.root, "--json").json
    assert [each["kind"] for each in every][-4:] == ["run.planned", "round.committed", "site.refused", "round.committed"]
    assert [each["id"] for each in every] == sorted(each["id"] for each in every)
    rest = server_cli("events", "--since", every[-3]["id"], "--home", home.root, "--json").json
    assert rest == every[-2:]
    refused = server_cli("events", "--run", RUN, "--kind", "site", "--home", home.root, "--json").json
    assert [(each["site"], each["round"], each["code"]) for each in refused] == [(SITES[2], 2, "PF507")]
    assert f"{RUN} round 2 {SITES[2]}  PF507" in server_cli("events", "--since", "2026-01-01", "--home", home.root).out
    assert server_cli("events", "--since", "2030-01-01", "--home", home.root).out == "events: none\n"


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (("run", "status", "none"), "PF510"),
        (("run", "status", "none", "--follow"), "PF510"),
        (("run", "status", "--follow"), "PF905"),
        (("rounds", "none"), "PF510"),
        (("events", "--run", "none"), "PF510"),
        (("events", "--since", "yesterday"), "PF905"),
        (("events", "--kind", "*"), "PF905"),
        (("events", "--run", "Not a name"), "PF905"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else value,
)
@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
def test_what_cannot_be_watched_is_told(server_cli, home, command, code):
    done = server_cli(*command, "--home", home.root, "--json")
    assert done.code == code


def test_following_a_run_tells_each_thing_once_and_ends_with_it(home, played, tmp_path):
    with following(home, tmp_path, "run", "status", RUN) as (process, told):
        told.until(lambda told: told.lines())
        assert told.lines()[0]["status"]["state"] == "running"
        played.round(1)
        played.round(2, refused="PF507")
        told.until(lambda told: len(kinds(told)) == 3)
        played.end("finished", BEGIN + 200)
        assert process.wait(60) == 0
    assert kinds(told) == ["round.committed", "site.refused", "round.committed", "run.finished"]
    assert told.lines()[-1]["status"]["state"] == "finished"
    assert told.aside == ""


@pytest.mark.parametrize(("state", "code", "status"), [("failed", "PF503", 15), ("stopped", None, 3)])
@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
def test_how_a_run_ended_is_the_exit_status(server_cli, home, played, state, code, status):
    played.end(state, BEGIN + 1, code)
    done = server_cli("run", "status", RUN, "--follow", "--home", home.root, "--json")
    assert done.status == status
    assert ("PF514" in done.out) == (state == "failed")
    played.end("finished", BEGIN + 2)
    assert server_cli("run", "status", RUN, "--follow", "--home", home.root).status == 0


@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
def test_ctrl_c_ends_following_quietly(home, played, tmp_path):
    with following(home, tmp_path, "events") as (process, told):
        told.until(lambda told: told.lines())
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
    assert "Traceback" not in told.aside


@pytest.mark.parametrize("backend", ["postgresql"], indirect=True)
def test_a_database_that_is_away_is_waited_for_and_nothing_is_missed(home, played, tmp_path, postgres):
    name = home.database_url.rsplit("/", 1)[1]
    with following(home, tmp_path, "events", "--kind", "round") as (_, told):
        played.round(1)
        told.until(lambda told: told.lines())
        played.close()
        with psycopg.connect(postgres.url("postgres"), autocommit=True) as admin:
            admin.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false".encode())
            admin.execute("SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = %s", [name])
            told.until(lambda told: "waiting for it" in told.aside)
            admin.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true".encode())
        played.round(2)
        told.until(lambda told: len(told.lines()) == 2)
    assert [line["round"] for line in told.lines()] == [1, 2]
    assert told.aside.count("PF512") == 1
    assert "answers again" in told.aside


@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
def test_a_reader_that_goes_away_ends_following_without_a_trace(home, played, tmp_path):
    argv = [str(PROGRAM), "events", "--home", str(home.root), "--follow"]
    with (tmp_path / "err").open("wb") as err:
        process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=err, env={**os.environ, "PYTHONUNBUFFERED": "1"})
        assert process.stdout is not None
        assert process.stdout.readline()
        process.stdout.close()
        played.round(1)
        played.round(2)
        assert process.wait(60) in (1, -signal.SIGPIPE)
    assert "Traceback" not in (tmp_path / "err").read_text()
