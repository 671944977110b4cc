"""The stop switch, with a real process that is in the midst of a round: it ends at once, nothing leaves, and the ledger is right."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from answering_site import bytes_of, opened
from stopping_site import WAITING

from pathfed_client import app
from pathfed_client.home import SiteHome
from pathfed_client.io.site_store import SiteStore

SUPPORT = Path(__file__).parents[1] / "support"
CHARGED = {"before the charge": 0}
SEALED = (WAITING,)


@pytest.fixture(scope="module")
def undisturbed(world, ready_home, tmp_path_factory) -> bytes:
    """What a site with the same secrets answers that nobody stops."""
    with opened(SiteHome(shutil.copytree(ready_home, tmp_path_factory.mktemp("undisturbed") / "home"))) as site:
        return bytes_of(site.answer(world.offer(), world.base_state))


def begin(home: SiteHome, world, folder: Path, moment: str) -> subprocess.Popen[str]:
    """A runner that has come to the moment."""
    (folder / "offer").write_bytes(world.offer())
    (folder / "state").write_bytes(world.base_state)
    command = [sys.executable, str(SUPPORT / "stopping_site.py"), str(home.root), str(folder / "offer"), str(folder / "state"), moment]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(SUPPORT), os.environ.get("PYTHONPATH", "")])}
    runner = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True, env=environment)
    assert runner.stdout is not None
    assert runner.stdout.readline() == f"at {moment}\n"
    return runner


#: What the other moments would show is shown in one process, and faster, by test_gating.
@pytest.mark.parametrize("moment", ["before the charge", "while tiles are read", "before the seal", WAITING])
def test_a_stop_at_any_moment_ends_the_round_and_after_resuming_it_is_the_same_release(
    world, copy_home: Callable[..., SiteHome], site_cli, tmp_path, undisturbed, moment
) -> None:
    home = copy_home()
    with begin(home, world, tmp_path, moment) as runner:
        done = site_cli("stop", "--reason", "maintenance", "--home", home.root, "--json")
        assert (done.status, done.json["reason"]) == (0, "maintenance")
        assert runner.wait(30) == -9, "it was ended when the command returned"
        assert runner.stdout is not None
        # Also the processes that read tiles have ended: they held the other end of this pipe.
        assert runner.stdout.read() == "", "nothing was answered"
    with closing(SiteStore(home.database)) as store:
        assert len(app.open_ledger(home, store).verify()) == CHARGED.get(moment, 1)
        assert (store.get_sealed("run-1", 1) is not None) == (moment in SEALED)
        assert [event.detail for event in store.events()][-1:] == ["stopped"]
    with opened(home) as site:
        assert site.answer(world.offer(), world.base_state).code == "PF440"
        assert site_cli("resume", "--home", home.root, "--json").json["was_stopped"]
        assert bytes_of(site.answer(world.offer(), world.base_state)) == undisturbed
        assert site.charges() == 1, "the same release, charged once"


def test_a_stopped_site_says_so_and_does_not_run(site_cli, copy_home) -> None:
    home = copy_home()
    assert site_cli("status", "--home", home.root, "--json").json["stopped"] is False
    done = site_cli("stop", "--reason", "audit", "--home", home.root)
    assert done.status == 0
    said = " ".join(done.out.split())
    assert "no answer to a round leaves" in said
    assert "goes on reporting" in said
    assert "nothing leaves" not in said
    told = site_cli("status", "--home", home.root, "--json").json
    assert (told["stopped"], told["stopped_for"]) == (True, "audit")
    assert told["stopped_at"] > 1e9
    runner = subprocess.run(
        [sys.executable, "-m", "pathfed_client.app", str(home.root), "127.0.0.1:1"], capture_output=True, text=True, check=False
    )
    assert runner.returncode != 0
    assert "PF440" in runner.stderr
    assert site_cli("resume", "--home", home.root).status == 0
    assert site_cli("resume", "--home", home.root, "--json").json["was_stopped"] is False


def test_the_switch_works_with_a_database_that_does_not(site_cli, copy_home) -> None:
    home = copy_home()
    home.database.write_bytes(b"no database" * 1000)
    assert site_cli("stop", "--home", home.root, "--json").status == 0
    assert home.stop_switch.is_on
