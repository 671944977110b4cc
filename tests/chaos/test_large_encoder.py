"""An encoder of more than 2 GB makes a federated round with three sites on one machine of 24 GB.

The sites are hospitals' machines of their own elsewhere; here they share one, so they train one after another: each is started when the
update of the one before has been admitted, and all stay up. Minutes long: `make chaos`.
"""

import json
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest
from tests.end_to_end.conftest import PLAN, processes_of, wait_for

from pathfed_common.encoder.spec import preset
from pathfed_common.ids import RunName
from pathfed_local.consortium import Consortium, find_hospitals
from pathfed_local.generator import generate_hospitals
from pathfed_server.db.sql_store import SqlStore
from pathfed_server.home import ServerHome
from pathfed_server.rounds.state import ParticipationState, RunState

pytestmark = [
    pytest.mark.skipif(os.environ.get("CHAOS") != "full", reason="takes many minutes and 24 GB: make chaos"),
    pytest.mark.timeout(7200),
]
RUN = RunName("large")
ENCODER = "vit_huge_patch14_reg4_224"
_GB = 1e9
_MACHINE_BYTES = 24 * _GB
_WITHIN_S = 3000.0
_CHANGES = {
    "[objective]": f'[encoder]\npreset = "{ENCODER}"\n[objective]',
    "tile_px = 96": "tile_px = 56",
    "tiles_per_patient = 2": "tiles_per_patient = 1",
    "expected_patients = 2": "expected_patients = 1",
    "count = 2": "count = 1",
    "deadline_s = 120": "deadline_s = 6000",
    "quorum = 2": "quorum = 3",
}


@pytest.fixture
def consortium(tmp_path: Path) -> Iterator[Consortium]:
    """A consortium that is set up for one round of the large encoder; its server runs, its sites do not."""
    data = tmp_path / "hospitals"
    generate_hospitals(data, hospitals=3, patients=4, slides_per_patient=1, seed=3, side_px=(512, 640))
    made = Consortium(tmp_path / "consortium", find_hospitals(data, 3))
    text = PLAN
    for old, new in _CHANGES.items():
        assert old in text, old
        text = text.replace(old, new)
    plan, signed = tmp_path / "plan.toml", tmp_path / "plan.dsse"
    plan.write_text(text)
    made.server_command("init")
    made.start_server()
    try:
        options = ("--no-reply-slots", "--max-epsilon", "20", "--delta", "1e-5")
        made.enrol({one.name: ["--slides", one.slides, "--patients", one.patients, *options] for one in made.hospitals})
        made.server_command("plan", "publish", plan, "--out", signed)
        for one in made.hospitals:
            made.site_command(one.name, "scan", signed)
            approval = tmp_path / f"{one.name}.dsse"
            made.site_command(one.name, "approve", signed, "--patients-at-least", "4", "--out", approval)
            made.server_command("sites", "approval", approval)
        yield made
    finally:
        made.stop()


def test_an_encoder_of_two_gigabytes_makes_a_round_with_three_sites_in_24_gb(consortium: Consortium, tmp_path: Path) -> None:
    assert 4 * preset(ENCODER).parameters >= 2 * _GB
    told: list[str] = []
    peak = {"bytes": 0.0}

    def admitted(store: SqlStore) -> int:
        consortium.watch(told.append)
        peak["bytes"] = max(peak["bytes"], _memory(tmp_path))
        return sum(one.state is ParticipationState.ADMITTED for one in store.participations(RUN, 1))

    def reached(store: SqlStore, number: int) -> bool:
        return admitted(store) >= number

    with SqlStore(ServerHome(consortium.server).database_url) as store:
        plan = store.plans()[0].digest
        consortium.server_command("run", "start", plan, "--name", RUN)
        for number, hospital in enumerate(consortium.hospitals, start=1):
            consortium.start_site(hospital.name)
            assert wait_for(partial(reached, store, number), until=bool, within_s=_WITHIN_S), told
        over = (RunState.FINISHED, RunState.FAILED, RunState.STOPPED)
        wait_for(lambda: (admitted(store), store.run(RUN).state)[1], until=lambda state: state in over, within_s=_WITHIN_S)
        assert store.run(RUN).state is RunState.FINISHED, told
        last = store.checkpoints(RUN)[-1]
    assert last.state_bytes >= 2 * _GB
    print(json.dumps({"state_gb": last.state_bytes / _GB, "memory_peak_gb": peak["bytes"] / _GB}))
    assert peak["bytes"] < _MACHINE_BYTES


def _memory(folder: Path) -> float:
    """Bytes that the consortium's processes hold together; a page that several share counts once (proportional set size)."""
    held = 0.0
    for process in processes_of(folder):
        try:
            held += process.memory_full_info().pss
        except psutil.Error:
            continue
    return held
