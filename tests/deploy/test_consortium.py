"""Commands of a consortium on one machine, run as processes of their own."""

import json
import shlex
import sys
import time
from pathlib import Path

import pytest

from pathfed_common.errors import ErrorCode, HostError, PathfedError, SiteDataError
from pathfed_common.processes import ProcessSpec
from pathfed_local.consortium import Consortium, find_hospitals, program


def hospital(folder, name: str) -> None:
    (folder / name / "slides").mkdir(parents=True)


def test_hospitals_are_found_in_name_order_under_names_that_a_site_can_have(tmp_path):
    for name in ("St. Mary's", "b_clinic", "Charité 2", "-x-"):
        hospital(tmp_path, name)
    (tmp_path / "notes").mkdir()
    (tmp_path / "file.txt").write_text("")
    found = find_hospitals(tmp_path, 10)
    assert [one.name for one in found] == ["x", "charit--2", "st--mary-s", "b-clinic"]
    assert found[0].slides == tmp_path / "-x-" / "slides"
    assert found[0].patients == tmp_path / "-x-" / "patients.csv"
    assert len(find_hospitals(tmp_path, 2)) == 2


@pytest.mark.parametrize("names", [("A b", "a-b"), ("clinic", "Clinic")])
def test_two_hospitals_that_would_be_one_site_are_refused(tmp_path, names):
    for name in names:
        hospital(tmp_path, name)
    with pytest.raises(PathfedError, match=r"PF905.*same site name"):
        find_hospitals(tmp_path, 10)


def test_a_name_too_long_for_a_site_is_cut(tmp_path):
    hospital(tmp_path, "a" * 62 + "-bcd")
    assert find_hospitals(tmp_path, 1)[0].name == "a" * 62


@pytest.mark.parametrize("there", [False, True])
def test_a_folder_without_hospitals_is_told(tmp_path, there):
    folder = tmp_path / "data"
    if there:
        folder.mkdir()
    with pytest.raises(SiteDataError, match="PF201"):
        find_hospitals(folder, 3)


def test_a_commands_result_comes_back_and_the_command_is_written_down(tmp_path):
    consortium = Consortium(tmp_path / "out", [])
    made = consortium.server_command("init", "--consortium", "test")
    assert made["home"] == str(consortium.server)
    (line,) = (tmp_path / "out" / "commands.log").read_text().splitlines()
    assert shlex.split(line) == ["pathfed-server", "init", "--consortium", "test", "--home", str(consortium.server)]


def test_a_commands_own_error_comes_back_as_it_was(tmp_path):
    consortium = Consortium(tmp_path, [])
    with pytest.raises(HostError) as caught:
        consortium.server_command("sites", "list")
    assert caught.value.code is ErrorCode.HOME_UNUSABLE
    assert caught.value.where == str(consortium.server / "server.toml")


def test_a_command_that_ends_without_a_result_is_told_with_its_last_words(tmp_path):
    consortium = Consortium(tmp_path, [])
    with pytest.raises(HostError, match="PF903") as caught:
        consortium.server_command("no-such-command")
    assert "No such command" in (caught.value.value or "")


def test_programs_are_those_beside_this_python():
    assert program("pathfed-site").parent.samefile(sys.prefix + "/bin")
    with pytest.raises(HostError, match="PF907"):
        program("pathfed-nothing")


def test_events_and_ends_of_processes_are_told_once(tmp_path):
    consortium = Consortium(tmp_path, [])
    consortium.logs.mkdir()
    (consortium.logs / "server.log").write_text(json.dumps({"event": "serving"}) + "\nplain line\nhalf a li")
    told: list[str] = []
    consortium.watch(told.append)
    consortium.watch(told.append)
    assert told == ["server: serving", "server: plain line"]
    with (consortium.logs / "server.log").open("a") as file:
        file.write("ne\n")
    consortium.watch(told.append)
    assert told[-1] == "server: half a line"

    log = consortium.logs / "site-a.log"
    consortium._supervisor.start(ProcessSpec(name="site-a", argv=["sh", "-c", "exit 4"], log=log, restarts=1, restart_delay_s=0.0))

    def watch_on() -> None:
        until = time.monotonic() + 60
        while time.monotonic() < until:
            consortium.watch(told.append)
            time.sleep(0.02)

    with pytest.raises(HostError, match=r"PF903.*status 4"):
        watch_on()
    assert sum("is started again" in line for line in told) == 1
    consortium.stop()


def test_a_command_that_was_killed_is_begun_again(tmp_path):
    consortium = Consortium(tmp_path, [])
    begun = consortium.begin("pathfed-server", "init", "--home", consortium.server)
    begun.kill()
    assert consortium.finish(begun)["home"] == str(consortium.server)


def killed_after_its_work(tmp_path: Path, often: int) -> Path:
    """A program that does what it is asked, and is killed before it says so, so many times."""
    script = tmp_path / "killed"
    runs = f'echo run >> "{tmp_path}/runs"; test "$(wc -l < "{tmp_path}/runs")" -gt {often} && exec "$real" "$@"'
    script.write_text(f'#!/bin/sh\nreal="{program("pathfed-server")}"\n{runs}\n"$real" "$@" > /dev/null; kill -9 $$\n')
    script.chmod(0o755)
    return script


def test_a_command_that_was_killed_when_it_was_done_counts_as_done(tmp_path, monkeypatch):
    script = killed_after_its_work(tmp_path, 1)
    monkeypatch.setattr("pathfed_local.consortium.program", lambda name: script)
    consortium = Consortium(tmp_path / "out", [])
    assert consortium.server_command("init")["error"]["code"] == "PF904"
    assert (consortium.server / "server.toml").exists()
    with pytest.raises(HostError, match="PF904"):
        consortium.server_command("init")


def test_a_command_that_is_killed_again_and_again_is_told(tmp_path, monkeypatch):
    script = killed_after_its_work(tmp_path, 100)
    monkeypatch.setattr("pathfed_local.consortium.program", lambda name: script)
    with pytest.raises(HostError, match=r"PF903.*status -9"):
        Consortium(tmp_path / "out", []).server_command("--version")
    assert (tmp_path / "runs").read_text().count("run") == 3


def test_commands_that_were_begun_and_not_finished_end_with_the_consortium(tmp_path, monkeypatch):
    """As when the demo is ended by SIGTERM, or Ctrl-C, while the sites scan."""
    stubborn = tmp_path / "stubborn"
    stubborn.write_text("#!/bin/sh\nexec sleep 60\n")
    stubborn.chmod(0o755)
    monkeypatch.setattr("pathfed_local.consortium.program", lambda name: stubborn)
    consortium = Consortium(tmp_path / "out", [])
    begun = [consortium.begin_site(name, "scan") for name in ("a", "b")]
    assert all(process.poll() is None for process in begun)
    consortium.stop()
    assert [process.returncode for process in begun] == [-15, -15]
