"""A server whose disk fills at any write of a run: PF901, nothing half-written, and with space again the end of an undisturbed run."""

import shutil
from pathlib import Path

import pytest
from full_disk import FULL, WITHIN_S, full_disk, tried
from tests.server.rounds.consortium import KEYS, NAMES, RUN, Consortium, FakeClock, FakeSites, Make, make_plan

from pathfed_common import digest
from pathfed_common.errors import HostError
from pathfed_common.ids import SiteName
from pathfed_common.provenance import record
from pathfed_common.provenance.documents import SiteCard
from pathfed_server.provenance.recorder import Recorder
from pathfed_server.rounds.loop import run_rounds
from pathfed_server.rounds.state import RunState

pytestmark = pytest.mark.timeout(WITHIN_S)
PLAN = make_plan(rounds=2 if FULL else 1, quorum=2)
SITES = NAMES[:2]
SERVER = KEYS[SiteName("server")]
CARDS = {name: SiteCard(site=name, evidence_key=KEYS[name].public, flower_key=f"ssh-ed25519 {name}").to_bytes(KEYS[name]) for name in SITES}


def drive(made: Consortium) -> None:
    """What a process does: a recorder and sites of its own, on the folder and database as they are."""
    clock = FakeClock()
    run_rounds(
        made.settings(),
        sites=FakeSites(PLAN, clock),
        store=made.store,
        recorder=Recorder(made.home / "record", SERVER, CARDS, retain_updates=True),
        clock=clock,
    )


def end_of(made: Consortium) -> object:
    """All that must not depend on a full disk; times and the number of attempts may."""
    files = sorted(
        path.relative_to(made.home).as_posix() for path in made.home.rglob("*") if path.is_file() and "server.db" not in path.name
    )
    whole = {path: digest.of_bytes((made.home / path).read_bytes()) for path in files if path.startswith("runs/")}
    return (
        files,
        whole,
        made.store.checkpoints(RUN),
        [(row.round_index, row.site, row.digest) for row in made.store.statements(RUN)],
        made.store.log_leaves(0, made.store.log_size()),
        made.store.run(RUN).state,
        made.store.quarantined(RUN),
    )


def check_record(made: Consortium) -> None:
    """What the manifest lists is there as it says, whatever was under way."""
    manifest = made.home / "record" / record.MANIFEST
    if manifest.exists():
        listed = record.Manifest.from_bytes(manifest.read_bytes()).files
        assert all(digest.of_bytes((made.home / "record" / each.path).read_bytes()) == each.digest for each in listed)


@pytest.mark.parametrize("once", [False, True], ids=["full from then on", "full for a moment"])
def test_a_disk_that_fills_at_any_write_of_a_run_costs_nothing_but_time(consortium: Make, tmp_path: Path, once: bool) -> None:
    with full_disk(tmp_path) as disk:
        made = consortium(PLAN, sites=SITES)
        snapshot = tmp_path / "snapshot"
        shutil.copytree(made.home, snapshot)
        disk.fill(None)
        drive(made)
        writes, undisturbed = list(disk.seen), end_of(made)
        assert len(writes) > 80
        wrong = {}
        for number, write in tried(writes, once=once):
            if "-hospital.part" in write:
                continue  # the test's own transport
            shutil.rmtree(made.home)
            shutil.copytree(snapshot, made.home)
            disk.fill(number, once=once)
            said = "finished"
            try:
                drive(made)
            except HostError as error:
                said = error.code.value
            except Exception as error:
                said = repr(error)
            disk.free()
            halves = [path.name for path in made.home.rglob("*.part") if path.parent.name != "incoming"]
            check_record(made)
            if made.store.run(RUN).state is not RunState.FINISHED:
                drive(made)
            # One name for two files is tried first, and where that fails for a moment there is a copy.
            expected = ("PF901", "finished") if once else ("PF901",)
            if said not in expected or (halves, end_of(made)) != ([], undisturbed):
                wrong[f"{number} {write}"] = (said, halves, end_of(made) == undisturbed)
        assert wrong == {}
