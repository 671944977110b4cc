"""Suspension, release from quarantine, and who is in a run: one contract on SQLite and on PostgreSQL."""

from dataclasses import replace

import pytest
from tests.server.db.test_sql_store import (
    AT,
    PLAN,
    RUN,
    A,
    B,
    C,
    admitted,
    approved,
    checkpoint,
    collected,
    enrol,
    envelopes,
    opening,
    participations,
    quarantined,
    refusal,
    result,
)

from pathfed_common.errors import ErrorCode
from pathfed_common.ids import RunName, SiteName
from pathfed_server.db.rows import OutcomeRow
from pathfed_server.db.sql_store import SqlStore
from pathfed_server.rounds.machine import RoundEvent
from pathfed_server.rounds.state import Participation, ParticipationState, Quarantined


@pytest.fixture
def running(store: SqlStore) -> SqlStore:
    """Three sites in a run, taken up once, with its initial state; two have approved."""
    enrol(store, A, B, C)
    store.add_plan(PLAN, name="p", canonical=b"{}", signed=b"signed", at=AT)
    for name in (A, B):
        store.add_approval(approved(name), at=AT)
    store.create_run(RUN, plan_digest=PLAN, sites=[A, B, C], at=AT)
    store.begin_attempt(RUN, at=AT)
    store.commit_initial(RUN, 1, checkpoint(0), at=AT)
    return store


def round_with(store: SqlStore, index: int, b_code: str | None) -> None:
    """Commit a round in which A is admitted and B refused with a code, or admitted."""
    at = AT + index
    store.open_round(replace(opening(index), offered_at=at))
    second = admitted(B)
    if b_code is not None:
        second = Participation(site=B, state=ParticipationState.REFUSED, code=b_code, offered_at=at)
    rows = (replace(admitted(A), offered_at=at), replace(second, offered_at=at), participations()[2])
    store.note_participation(RUN, 1, index, rows[0], at=at)
    store.advance_round(RUN, 1, index, RoundEvent.ADMIT, at=at)
    given = envelopes(index) if b_code is not None else {**envelopes(index), B: b"of b"}
    weights = {name: 1 / len(given) for name in given}
    store.commit_round(replace(result(index), participations=rows, weights=weights), given)


# ---- suspension


def test_site_is_suspended_after_so_many_faults_running_and_once(running: SqlStore) -> None:
    for index, code in enumerate(("PF507", None, "PF508", "PF504", "PF509"), start=1):
        assert running.suspend_sites(RUN, 1, after=3, at=AT) == []
        round_with(running, index, code)
    assert running.suspend_sites(RUN, 1, after=0, at=AT) == []
    assert running.suspend_sites(RUN, 1, after=4, at=AT) == []
    assert running.suspend_sites(RUN, 1, after=3, at=AT + 50) == [B]
    assert running.suspend_sites(RUN, 1, after=3, at=AT + 51) == []
    assert running.site(B).suspended_at == AT + 50
    assert {each.site: each.suspended for each in running.candidates(RUN)} == {A: False, B: True, C: False}
    (event,) = [event for event in running.audit_events() if event.action == "site.suspended"]
    assert (event.subject, event.detail["codes"]) == (B, ["PF509", "PF504", "PF508"])


@pytest.mark.parametrize("code", ["PF561", "PF563", "PF301", "PF518"])
def test_other_refusals_neither_count_nor_break_the_row(running: SqlStore, code: str) -> None:
    for index, each in enumerate(("PF507", code, "PF507"), start=1):
        round_with(running, index, each)
    assert running.suspend_sites(RUN, 1, after=3, at=AT) == []
    round_with(running, 4, "PF507")
    assert running.suspend_sites(RUN, 1, after=3, at=AT) == [B]


def test_reinstated_site_begins_anew(running: SqlStore) -> None:
    for index in (1, 2, 3):
        round_with(running, index, "PF507")
    running.suspend_sites(RUN, 1, after=3, at=AT + 3.5)
    for _ in range(2):
        running.reinstate_site(B, at=AT + 3.75, by="operator:ann")
    assert (running.site(B).suspended_at, running.site(B).reinstated_at) == (None, AT + 3.75)
    assert [event.actor for event in running.audit_events() if event.action == "site.reinstated"] == ["operator:ann"]
    for index in (4, 5):
        round_with(running, index, "PF507")
        assert running.suspend_sites(RUN, 1, after=3, at=AT) == []
    round_with(running, 6, "PF507")
    assert running.suspend_sites(RUN, 1, after=3, at=AT + 7) == [B]


def test_suspension_is_the_loops_and_names_are_checked(running: SqlStore) -> None:
    with refusal(ErrorCode.RUN_STATE):
        running.suspend_sites(RUN, 2, after=3, at=AT)
    with refusal(ErrorCode.SITE_UNKNOWN):
        running.reinstate_site(SiteName("none"), at=AT)


# ---- quarantine


def aside(code: str = "PF508", index: int = 1) -> Quarantined:
    return replace(quarantined(), code=code, round_index=index)


@pytest.mark.parametrize("code", ["PF508", "PF561"])
def test_release_is_noted_with_who_and_why_and_only_once(running: SqlStore, code: str) -> None:
    running.open_round(opening())
    running.note_quarantine(1, aside(code))
    (entry,) = running.quarantine(RUN)
    assert (entry.aside, entry.released_at, entry.released_by, entry.release_reason) == (aside(code), None, None, None)
    assert running.released(RUN, 1) == []
    for at in (AT + 1, AT + 2):
        row = running.release_quarantined(entry.number, reason="why", at=at, by="operator:ann")
        assert (row.released_at, row.released_by, row.release_reason) == (AT + 1, "operator:ann", "why")
    assert running.quarantine_entry(entry.number) == row
    assert running.released(RUN, 1) == [aside(code)]
    assert running.released(RUN, 2) == []
    events = [event for event in running.audit_events() if event.action == "quarantine.released"]
    assert [(event.actor, event.subject, event.detail["code"], event.detail["reason"]) for event in events] == [
        ("operator:ann", A, code, "why")
    ]


@pytest.mark.parametrize("code", ["PF504", "PF505", "PF506", "PF507", "PF509", "PF517", "PF518", "PF405"])
def test_no_other_refusal_is_ever_released(running: SqlStore, code: str) -> None:
    running.open_round(opening())
    running.note_quarantine(1, aside(code))
    with refusal(ErrorCode.RELEASE_REFUSED):
        running.release_quarantined(running.quarantine(RUN)[0].number, reason="why", at=AT)
    assert running.released(RUN, 1) == []


def test_release_comes_before_the_rounds_admission_or_not_at_all(running: SqlStore) -> None:
    collected(running)
    running.note_quarantine(1, aside())
    number = running.quarantine(RUN)[0].number
    with refusal(ErrorCode.RELEASE_REFUSED):
        running.release_quarantined(number, reason="why", at=AT)
    running.commit_round(result(), envelopes())
    with refusal(ErrorCode.RELEASE_REFUSED):
        running.release_quarantined(number, reason="why", at=AT)
    with refusal(ErrorCode.QUARANTINE_UNKNOWN):
        running.release_quarantined(number + 1, reason="why", at=AT)
    with refusal(ErrorCode.QUARANTINE_UNKNOWN):
        running.quarantine_entry(number + 1)


def test_what_a_failed_round_set_aside_is_released_for_its_next_attempt(running: SqlStore) -> None:
    collected(running, ParticipationState.SILENT)
    running.note_quarantine(1, aside())
    running.fail_round(RUN, 1, 1, participations(), code="PF503", at=AT)
    running.fail_run(RUN, 1, code="PF503", at=AT)
    running.release_quarantined(running.quarantine()[0].number, reason="why", at=AT)
    assert running.released(RUN, 1) == [aside()]


def test_released_update_is_noted_while_the_round_is_being_admitted(running: SqlStore) -> None:
    collected(running)
    late = replace(admitted(B), released="PF508")
    running.note_participation(RUN, 1, 1, late, at=AT)
    assert running.participations(RUN, 1)[1] == late


def test_quarantine_of_an_unknown_run_is_told(running: SqlStore) -> None:
    with refusal(ErrorCode.RUN_UNKNOWN):
        running.quarantine(RunName("none"))


# ---- who is in a run


def test_sites_leave_and_join_and_stay_in_what_was(running: SqlStore) -> None:
    assert running.change_run_sites(RUN, remove=[C], quorum=2, at=AT, by="operator:ann") == (A, B)
    assert running.change_run_sites(RUN, remove=[C], quorum=2, at=AT) == (A, B)
    assert running.run(RUN).sites == (A, B)
    assert {each.site: each.left for each in running.candidates(RUN)} == {A: False, B: False, C: True}
    enrol(running, SiteName("d"))
    assert running.change_run_sites(RUN, add=[C, SiteName("d")], quorum=2, at=AT) == (A, B, C, "d")
    assert {each.left for each in running.candidates(RUN)} == {False}
    events = [event for event in running.audit_events() if event.action.startswith("run.site_")]
    assert [(event.actor, event.action, event.detail["site"]) for event in events] == [
        ("operator:ann", "run.site_removed", C),
        ("operator", "run.site_added", C),
        ("operator", "run.site_added", "d"),
    ]


def test_changes_that_cannot_be_change_nothing(running: SqlStore) -> None:
    before = (running.run(RUN), running.audit_events())
    none = SiteName("none")
    for code, add, remove in (
        (ErrorCode.QUORUM_LOST, [], [A, B]),
        (ErrorCode.SITE_UNKNOWN, [], [A, none]),
        (ErrorCode.SITE_UNKNOWN, [none], []),
    ):
        with refusal(code):
            running.change_run_sites(RUN, add=add, remove=remove, quorum=2, at=AT)
    with refusal(ErrorCode.RUN_UNKNOWN):
        running.change_run_sites(RunName("none"), quorum=2, at=AT)
    assert before == (running.run(RUN), running.audit_events())
    running.revoke_site(C, at=AT)
    running.change_run_sites(RUN, remove=[C], quorum=2, at=AT)
    with refusal(ErrorCode.SITE_REVOKED):
        running.change_run_sites(RUN, add=[C], quorum=2, at=AT)
    running.finish_run(RUN, 1, at=AT)
    with refusal(ErrorCode.RUN_STATE):
        running.change_run_sites(RUN, remove=[B], quorum=1, at=AT)


# ---- what a site is shown


def test_a_site_is_shown_its_last_rounds_the_latest_first(running: SqlStore) -> None:
    for index, code in enumerate((None, "PF508", "PF507"), start=1):
        round_with(running, index, code)
    assert running.outcomes(B, most=2) == [
        OutcomeRow(run=RUN, round_index=3, state="refused", code="PF507", offered_at=AT + 3),
        OutcomeRow(run=RUN, round_index=2, state="refused", code="PF508", offered_at=AT + 2),
    ]
    assert running.outcomes(C, most=5) == [], "it was never asked"
