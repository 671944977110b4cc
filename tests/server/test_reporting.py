import re

import pytest

from pathfed_common import digest
from pathfed_common.encoder import weights
from pathfed_common.errors import RoundError
from pathfed_common.ids import RunName, SiteName
from pathfed_common.model import initial_state
from pathfed_common.plan import DinoPlan, MaePlan
from pathfed_server import app, reporting
from pathfed_server.db.rows import RoundRow
from pathfed_server.rounds.state import Participation, ParticipationState, RoundState, RoundTimes


@pytest.fixture
def planned(server_home, plan_file, member):
    plan = app.publish_plan(server_home.root, plan_file, plan_file.with_suffix(".dsse"))
    for name in ("site-a", "site-b"):
        site = member(name)
        app.add_site(server_home.root, site.card)
        app.add_word(server_home.root, site.approve(plan.digest))
    app.start_run(server_home.root, plan.digest, RunName("run-1"), [])
    return plan


def test_a_run_without_rounds_has_a_report_that_says_so(server_home, planned, tmp_path):
    out = tmp_path / "report.html"
    reporting.write_report(server_home, RunName("run-1"), out)
    text = out.read_text(encoding="utf-8")
    assert "site-a" in text
    assert "no record yet" in text
    assert not re.search(r"""(?:src|href)=["']https?:""", text)
    assert "NaN" not in text


def test_a_run_that_is_not_there_writes_no_page(server_home, tmp_path):
    with pytest.raises(RoundError, match="PF510"):
        reporting.write_report(server_home, RunName("none"), tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("objective", "captions"),
    [
        (MaePlan(), ["what the encoder sees", "predicted from it"]),
        (DinoPlan(local_crop_px=16, prototypes=16, head_dim=16), ["each patch's likeness to the tile as a whole"]),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_the_contact_sheet_shows_synthetic_tiles_and_what_the_model_makes_of_them(planned, tmp_path, objective, captions):
    plan = planned.model_copy(update={"objective": objective})
    state = tmp_path / "state.safetensors"
    state.write_bytes(weights.dump(initial_state(plan), {}))
    rows = reporting._contact_sheet(plan, state)
    assert len(rows) == 4
    assert all([caption for caption, _ in row.made] == captions for row in rows)
    assert all(png.startswith(b"\x89PNG") for row in rows for png in (row.original, *dict(row.made).values()))
    assert reporting._contact_sheet(plan, state) == rows
    assert len({png for row in rows for png in (row.original, *dict(row.made).values())}) == 4 * (1 + len(captions))


def reply(after_s: float | None, slot_s: float | None, transfer_s: float = 0.5) -> Participation:
    received = None if after_s is None else 1000.0 + after_s + transfer_s
    return Participation(
        site=SiteName("site-a"),
        state=ParticipationState.ADMITTED,
        offered_at=1000.0,
        received_at=received,
        transfer_s=transfer_s,
        reply_slot_s=slot_s,
    )


@pytest.mark.parametrize(
    ("after_s", "slot_s", "slot"),
    [(25.4, 25.0, 1), (49.9, 25.0, 1), (50.1, 25.0, 2), (24.9, 25.0, 1), (9.0, None, None), (None, 5.0, None)],
)
def test_the_slot_of_a_reply_is_the_last_that_began_before_it_was_seen(after_s, slot_s, slot):
    assert reporting._slot(reply(after_s, slot_s)) == slot


@pytest.mark.parametrize(
    ("replies", "slots_s", "wait_s"),
    [
        ([reply(10.2, 10.0), reply(20.3, 10.0)], 20.0, 1.5),
        ([reply(12.0, None), reply(11.0, None)], 0.0, 21.5),
        ([reply(30.0, 10.0)], 21.5, 0.0),  # two clocks: never more than there was
    ],
)
def test_the_wait_for_time_slots_is_told_apart_from_other_waiting(replies, slots_s, wait_s):
    row = RoundRow(
        run=RunName("run-1"),
        round_index=1,
        attempt=1,
        state=RoundState.COMMITTED,
        base_state=digest.of_bytes(b"a"),
        next_state=digest.of_bytes(b"b"),
        committed_at=1025.0,
        code=None,
        offered_at=1000.0,
        deadline=1060.0,
        times=RoundTimes(exchange_s=24.0, transfer_s=2.0, admission_s=0.5),
    )
    times = reporting._round(row, replies, 1.0).times
    assert (times.slots_s, times.wait_s) == pytest.approx((slots_s, wait_s))


def test_a_state_that_does_not_fit_the_model_makes_no_contact_sheet(planned, tmp_path):
    tensors = initial_state(planned)
    tensors.pop(next(iter(tensors)))
    state = tmp_path / "state.safetensors"
    state.write_bytes(weights.dump(tensors, {}))
    with pytest.raises(RuntimeError, match="Missing key"):
        reporting._contact_sheet(planned, state)


@pytest.mark.parametrize(("declared", "rate"), [(0, 0.0), (2, 1.0), (4, 1.0), (40, 0.1)])
def test_the_sampling_rate_in_the_report_is_never_above_one(planned, declared, rate):
    assert reporting._rate(planned, declared) == rate
