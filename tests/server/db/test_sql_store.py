"""One contract for the store on SQLite and on PostgreSQL: what it keeps, what it refuses, and that each method is one transaction."""

import hashlib
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from pathfed_common import digest
from pathfed_common.errors import ErrorCode, RoundError
from pathfed_common.ids import RunName, SiteName
from pathfed_common.provenance.documents import REJECTION, REVOCATION, Approval
from pathfed_common.provenance.keys import SigningKey, VerifyKey
from pathfed_common.provenance.log_leaves import PlanDecided
from pathfed_common.units import UtcSeconds
from pathfed_server.db import rounds_store, transitions
from pathfed_server.db.rows import ApprovalRow, DecisionRow
from pathfed_server.db.sql_store import SqlStore
from pathfed_server.rounds.machine import RoundEvent
from pathfed_server.rounds.ports import RoundStore
from pathfed_server.rounds.state import (
    Checkpoint,
    Participation,
    ParticipationState,
    Quarantined,
    RoundOpening,
    RoundResult,
    RoundState,
    RoundTimes,
    RunState,
    SiteState,
)

A, B, C = SiteName("a-hospital"), SiteName("b-hospital"), SiteName("c-hospital")
RUN = RunName("run-1")
SITE_KEY = SigningKey.generate()
PLAN = digest.of_bytes(b"plan")
# Not a whole number of anything: a time that a rounding column would change.
AT = 1_795_460_462.123457


def key_of(name: str) -> str:
    """A site's public evidence key, as text."""
    return VerifyKey(hashlib.sha256(name.encode()).digest()).to_text()


def name_of(index: int) -> digest.Digest:
    return digest.of_value(["state", index])


def checkpoint(index: int) -> Checkpoint:
    return Checkpoint(
        round_index=index,
        state=name_of(index),
        state_path=f"runs/{index}.safetensors",
        state_bytes=5_000_000_000 + index,
        optimiser=digest.of_value(["optimiser", index]),
        optimiser_path=f"runs/{index}.optimiser.safetensors",
        optimiser_bytes=7,
    )


def approved(site: SiteName, *, patients: int = 40, reply_slots: bool = True) -> ApprovalRow:
    return ApprovalRow(
        site=site, plan=PLAN, declared_patients=patients, reply_slots=reply_slots, envelope=f"{site} {patients}".encode(), approved_at=AT
    )


def enrol(store: SqlStore, *names: SiteName) -> None:
    for name in names:
        store.add_site(name, evidence_key=key_of(name), flower_key=f"ecdsa {name}", at=AT)


@pytest.fixture
def planned(store: SqlStore) -> SqlStore:
    """Three sites, two of which have approved the run's plan."""
    enrol(store, B, A, C)
    store.add_plan(PLAN, name="p", canonical=b"{}", signed=b"signed", at=AT)
    for name in (A, B):
        store.add_approval(approved(name), at=AT)
    store.create_run(RUN, plan_digest=PLAN, sites=[B, A, C], at=AT)
    return store


@pytest.fixture
def running(planned: SqlStore) -> SqlStore:
    """The same, taken up once, with its initial state."""
    planned.begin_attempt(RUN, at=AT)
    planned.commit_initial(RUN, 1, checkpoint(0), at=AT)
    return planned


def participations(state: ParticipationState = ParticipationState.OFFERED) -> tuple[Participation, ...]:
    first = Participation(site=A, state=state, offered_at=AT)
    second = Participation(site=B, state=ParticipationState.SILENT, code="PF515", offered_at=AT)
    third = Participation(site=C, state=ParticipationState.EXCLUDED, code="PF407")
    if state is ParticipationState.ADMITTED:
        first = admitted(A)
    return first, second, third


def admitted(site: SiteName) -> Participation:
    return Participation(
        site=site,
        state=ParticipationState.ADMITTED,
        update=digest.of_bytes(site.encode()),
        update_bytes=4_000_000_000,
        statement=digest.of_bytes(b"envelope of " + site.encode()),
        epsilon_plan=0.123456789012345,
        epsilon_total=1 / 3,
        rounding=2 / 7,
        figures={"loss_sum": -1.5, "loss_sum_std": 0.1, "patients": 7.25, "patients_std": 2.0},
        reply_slot_s=5.0,
        offered_at=AT,
        received_at=AT + 1 / 3,
        transfer_s=0.1,
    )


def opening(index: int = 1, *, attempt: int = 1) -> RoundOpening:
    return RoundOpening(
        run=RUN,
        attempt=attempt,
        round_index=index,
        base_state=name_of(index - 1),
        participations=participations(),
        offered_at=AT,
        deadline=AT + 60,
    )


def result(index: int = 1, *, attempt: int = 1) -> RoundResult:
    return RoundResult(
        run=RUN,
        attempt=attempt,
        round_index=index,
        plan=PLAN,
        base_state=name_of(index - 1),
        checkpoint=checkpoint(index),
        participations=participations(ParticipationState.ADMITTED),
        weights={A: 1.0},
        offered_at=AT,
        deadline=AT + 60,
        committed_at=AT + 61,
        times=RoundTimes(exchange_s=50.5, transfer_s=1.25, admission_s=0.5, aggregation_s=0.25, step_s=0.125),
    )


def envelopes(index: int = 1) -> dict[SiteName, bytes]:
    return {A: f"envelope of a, round {index}".encode()}


def refusal(code: ErrorCode) -> pytest.RaisesExc[RoundError]:
    return pytest.raises(RoundError, check=lambda error: error.code is code)


def collected(store: SqlStore, state: ParticipationState = ParticipationState.ADMITTED) -> None:
    """Round 1 as it stands after its last reply: admitted, or without a quorum."""
    store.open_round(opening())
    quorum = state is ParticipationState.ADMITTED
    store.note_participation(RUN, 1, 1, admitted(A) if quorum else participations()[1], at=AT)
    if quorum:
        store.advance_round(RUN, 1, 1, RoundEvent.ADMIT, at=AT)


def test_store_is_what_the_loop_asks_for(store: SqlStore) -> None:
    port: RoundStore = store
    assert port is store


# ---- sites, plans, approvals


def test_sites_come_back_as_enrolled_in_name_order(store: SqlStore) -> None:
    enrol(store, B, A)
    assert [site.name for site in store.sites()] == [A, B]
    site = store.site(A)
    assert (site.evidence_key, site.flower_key, site.state, site.enrolled_at, site.revoked_at) == (
        key_of(A),
        f"ecdsa {A}",
        SiteState.ENROLLED,
        AT,
        None,
    )


@pytest.mark.parametrize("taken", ["name", "evidence_key", "flower_key"])
def test_name_and_keys_of_a_site_are_never_given_twice(store: SqlStore, taken: str) -> None:
    enrol(store, A)
    store.revoke_site(A, at=AT)
    given = {"name": B, "evidence_key": key_of("new"), "flower_key": "new"}
    given[taken] = {"name": A, "evidence_key": key_of(A), "flower_key": f"ecdsa {A}"}[taken]
    with refusal(ErrorCode.SITE_EXISTS):
        store.add_site(SiteName(given["name"]), evidence_key=given["evidence_key"], flower_key=given["flower_key"], at=AT)
    assert len(store.sites()) == 1


def test_revoked_site_stays_revoked_from_the_first_time_on(store: SqlStore) -> None:
    enrol(store, A)
    store.revoke_site(A, at=AT + 1)
    store.revoke_site(A, at=AT + 2)
    assert (store.site(A).state, store.site(A).revoked_at) == (SiteState.REVOKED, AT + 1)
    assert [event.action for event in store.audit_events()] == ["site.enrolled", "site.revoked"]


def test_unknown_names_are_refused_with_their_code(planned: SqlStore) -> None:
    none = SiteName("none")
    for code, action in (
        (ErrorCode.SITE_UNKNOWN, lambda: planned.site(none)),
        (ErrorCode.SITE_UNKNOWN, lambda: planned.revoke_site(none, at=AT)),
        (ErrorCode.SITE_UNKNOWN, lambda: planned.add_approval(approved(none), at=AT)),
        (ErrorCode.SITE_UNKNOWN, lambda: planned.create_run(RunName("r2"), plan_digest=PLAN, sites=[none], at=AT)),
        (ErrorCode.PLAN_UNKNOWN, lambda: planned.plan(name_of(9))),
        (ErrorCode.PLAN_UNKNOWN, lambda: planned.add_approval(replace(approved(A), plan=name_of(9)), at=AT)),
        (ErrorCode.PLAN_UNKNOWN, lambda: planned.create_run(RunName("r2"), plan_digest=name_of(9), sites=[A], at=AT)),
        (ErrorCode.RUN_UNKNOWN, lambda: planned.run(RunName("none"))),
        (ErrorCode.RUN_UNKNOWN, lambda: planned.progress(RunName("none"))),
        (ErrorCode.RUN_UNKNOWN, lambda: planned.candidates(RunName("none"))),
        (ErrorCode.RUN_UNKNOWN, lambda: planned.begin_attempt(RunName("none"), at=AT)),
        (ErrorCode.RUN_EXISTS, lambda: planned.create_run(RUN, plan_digest=PLAN, sites=[A], at=AT)),
    ):
        with refusal(code):
            action()
    assert len(planned.runs()) == 1


def test_plan_is_published_once(store: SqlStore) -> None:
    for at in (AT, AT + 1):
        store.add_plan(PLAN, name="p", canonical=b"\x00{}", signed=b"\xff", at=at)
    assert store.plans() == [store.plan(PLAN)]
    assert (store.plan(PLAN).canonical, store.plan(PLAN).signed, store.plan(PLAN).published_at) == (b"\x00{}", b"\xff", AT)


def signed(*, patients: int = 40, reply_slots: bool = True, named_as: str = "", at: float = AT) -> ApprovalRow:
    """As `approved` of the third site, with a real envelope."""
    given = Approval(site=C, plan=PLAN, declared_patients=patients, reply_slots=reply_slots, approved_at=UtcSeconds(at), named_as=named_as)
    row = approved(C, patients=patients, reply_slots=reply_slots)
    return replace(row, envelope=given.to_bytes(SITE_KEY), approved_at=at)


def test_approval_stands_and_other_figures_or_names_are_refused(planned: SqlStore) -> None:
    for at in (AT, AT, AT + 1):
        planned.add_approval(signed(named_as="St. Elsewhere", at=at), at=at)
    name = "St. Elsewhere"
    for other in (signed(patients=41, named_as=name), signed(reply_slots=False, named_as=name), signed(), signed(named_as="St. Nowhere")):
        with refusal(ErrorCode.APPROVAL_DIFFERS):
            planned.add_approval(other, at=AT)
    assert planned.approvals(PLAN) == [approved(A), approved(B), signed(named_as="St. Elsewhere")]


def test_revoked_site_approves_nothing(planned: SqlStore) -> None:
    planned.revoke_site(C, at=AT)
    with refusal(ErrorCode.SITE_REVOKED):
        planned.add_approval(approved(C), at=AT)


def against(site: SiteName, kind: str = REVOCATION, approval: ApprovalRow | None = None, word: str = "no") -> DecisionRow:
    revoked = None if approval is None else digest.of_bytes(approval.envelope)
    return DecisionRow(site=site, plan=PLAN, kind=kind, approval=revoked, envelope=f"{site} {kind} {word}".encode(), decided_at=AT)


def test_a_revocation_is_for_good_and_takes_the_site_out_of_the_candidates(planned: SqlStore) -> None:
    word = against(A, approval=approved(A))
    planned.add_decision(word, at=AT + 1)
    planned.add_decision(word, at=AT + 2)  # the same word again
    assert planned.words_against(PLAN) == {A: REVOCATION}
    assert {each.site: each.revoked for each in planned.candidates(RUN)} == {A: True, B: False, C: False}
    assert planned.approvals(PLAN) == [approved(A), approved(B)]  # evidence stays
    with pytest.raises(RoundError, match="PF530"):
        planned.add_approval(approved(A), at=AT + 3)
    told = [event for event in planned.audit_events() if event.action == "plan.revoked"]
    assert [(event.actor, event.subject) for event in told] == [(f"site:{A}", PLAN)]
    assert PlanDecided(site=A, plan=PLAN, decision=digest.of_bytes(word.envelope)).to_bytes() in planned.log_leaves(0, planned.log_size())


def test_a_revocation_may_come_before_the_approval_it_revokes(planned: SqlStore) -> None:
    planned.add_decision(against(C, approval=approved(C)), at=AT)
    with pytest.raises(RoundError, match="PF530"):
        planned.add_approval(approved(C), at=AT)
    assert planned.words_against(PLAN) == {C: REVOCATION}


def test_a_rejected_plan_may_be_approved_later(planned: SqlStore) -> None:
    planned.add_decision(against(C, REJECTION), at=AT)
    assert planned.words_against(PLAN) == {C: REJECTION}
    planned.add_approval(approved(C), at=AT)
    assert planned.words_against(PLAN) == {}
    assert [each.revoked for each in planned.candidates(RUN)] == [False] * 3


def test_words_that_do_not_follow_the_last_one_are_refused_and_change_nothing(planned: SqlStore) -> None:
    none, size = SiteName("none"), planned.log_size()
    for code, word in (
        ("PF531", against(A, REJECTION)),
        ("PF531", against(A, approval=approved(B))),
        ("PF501", against(none, REJECTION)),
        ("PF516", replace(against(C, REJECTION), plan=name_of(9))),
    ):
        with pytest.raises(RoundError, match=code):
            planned.add_decision(word, at=AT)
    planned.revoke_site(C, at=AT)
    with pytest.raises(RoundError, match="PF518"):
        planned.add_decision(against(C, REJECTION), at=AT)
    assert (planned.words_against(PLAN), planned.log_size()) == ({}, size + 1)  # the site's own revocation


def test_candidates_are_the_listed_sites_with_their_approvals(planned: SqlStore) -> None:
    planned.add_site(SiteName("d"), evidence_key=key_of("d"), flower_key="d", at=AT)
    planned.revoke_site(B, at=AT)
    found = planned.candidates(RUN)
    assert [(each.site, each.state, each.declared_patients, each.reply_slots) for each in found] == [
        (A, SiteState.ENROLLED, 40, True),
        (B, SiteState.REVOKED, 40, True),
        (C, SiteState.ENROLLED, None, None),
    ]
    assert [each.approval for each in found] == [approved(A).envelope, approved(B).envelope, None]


# ---- runs


def test_run_goes_from_planned_over_running_to_finished(planned: SqlStore) -> None:
    assert planned.run(RUN).state is RunState.PLANNED
    assert planned.run(RUN).sites == (A, B, C)
    first = planned.begin_attempt(RUN, at=AT + 1)
    assert (first.state, first.attempt, first.last, first.plan) == (RunState.RUNNING, 1, None, PLAN)
    assert planned.begin_attempt(RUN, at=AT + 2).attempt == 2
    planned.finish_run(RUN, 2, at=AT + 3)
    run = planned.run(RUN)
    assert (run.state, run.started_at, run.ended_at, run.code) == (RunState.FINISHED, AT + 1, AT + 3, None)
    for action in (
        lambda: planned.begin_attempt(RUN, at=AT),
        lambda: planned.stop_run(RUN, at=AT),
        lambda: planned.pause_run(RUN, at=AT),
        lambda: planned.drain_run(RUN, at=AT),
        lambda: planned.reopen_run(RUN, at=AT),
    ):
        with refusal(ErrorCode.RUN_STATE):
            action()


def test_stopped_and_failed_runs_are_taken_up_only_when_reopened(planned: SqlStore) -> None:
    planned.begin_attempt(RUN, at=AT)
    planned.fail_run(RUN, 1, code="PF503", at=AT)
    assert (planned.run(RUN).state, planned.run(RUN).code) == (RunState.FAILED, "PF503")
    with refusal(ErrorCode.RUN_STATE):
        planned.begin_attempt(RUN, at=AT)
    planned.reopen_run(RUN, at=AT)
    assert planned.begin_attempt(RUN, at=AT).attempt == 2
    planned.stop_run(RUN, at=AT)
    planned.stop_run(RUN, at=AT)
    assert planned.progress(RUN).state is RunState.STOPPED
    with refusal(ErrorCode.RUN_STATE):
        planned.begin_attempt(RUN, at=AT)


def trail(store: SqlStore, prefix: str) -> list[tuple[str, str, str | None, str]]:
    """The transitions in the audit trail: who, action, from, to."""
    events = (event for event in store.audit_events() if event.action.startswith(prefix) and "to" in event.detail)
    return [(event.actor, event.action, event.detail["from"], event.detail["to"]) for event in events]


def test_run_pauses_after_its_round_and_begins_no_other(running: SqlStore) -> None:
    running.open_round(opening())
    assert running.pause_run(RUN, at=AT, by="operator:ann") is RunState.PAUSING
    assert running.pause_run(RUN, at=AT, by="operator:ann") is RunState.PAUSING
    running.note_participation(RUN, 1, 1, admitted(A), at=AT)
    assert running.begin_attempt(RUN, at=AT).state is RunState.PAUSING, "a round under way is ended by whoever takes it up"
    running.open_round(opening(attempt=2))
    running.note_participation(RUN, 2, 1, admitted(A), at=AT)
    running.advance_round(RUN, 2, 1, RoundEvent.ADMIT, at=AT)
    running.commit_round(result(attempt=2), envelopes())
    before = (running.rounds(RUN), running.audit_events())
    with refusal(ErrorCode.RUN_STATE):
        running.open_round(opening(2, attempt=2))
    assert before == (running.rounds(RUN), running.audit_events())
    assert running.rest_run(RUN, 2, at=AT + 70) is RunState.PAUSED
    assert running.run(RUN).ended_at is None
    with refusal(ErrorCode.RUN_STATE):
        running.begin_attempt(RUN, at=AT)
    assert running.reopen_run(RUN, at=AT + 80) is RunState.PLANNED
    assert trail(running, "run.")[-4:] == [
        ("operator:ann", "run.pausing", "running", "pausing"),
        ("server", "run.taken_up", "pausing", "pausing"),
        ("server", "run.paused", "pausing", "paused"),
        ("operator", "run.resumed", "paused", "planned"),
    ]


def test_failed_round_is_not_offered_again_where_the_run_is_to_rest(running: SqlStore) -> None:
    collected(running, ParticipationState.SILENT)
    assert running.drain_run(RUN, at=AT) is RunState.DRAINING
    running.fail_round(RUN, 1, 1, participations(), code="PF503", at=AT)
    with refusal(ErrorCode.RUN_STATE):
        running.open_round(opening())
    assert running.rest_run(RUN, 1, at=AT + 9) is RunState.STOPPED
    assert running.run(RUN).ended_at == AT + 9


@pytest.mark.parametrize("order", ["pause", "stop"])
def test_order_to_end_at_once_puts_the_round_under_way_back(running: SqlStore, order: str) -> None:
    collected(running)
    if order == "pause":
        assert running.pause_run(RUN, now=True, at=AT, by="operator:ann") is RunState.PAUSED
    else:
        running.stop_run(RUN, at=AT, by="operator:ann")
    assert running.rounds(RUN)[0].state is RoundState.PLANNED
    assert trail(running, "round.")[-1] == ("operator:ann", "round.planned", "admitted", "planned")
    running.reopen_run(RUN, at=AT)
    running.begin_attempt(RUN, at=AT)
    running.open_round(opening(attempt=2))
    assert [row.attempt for row in running.rounds(RUN)] == [2]


def test_orders_are_taken_back_and_given_twice_without_a_trace(planned: SqlStore) -> None:
    planned.begin_attempt(RUN, at=AT)
    assert planned.reopen_run(RUN, at=AT) is RunState.RUNNING
    planned.pause_run(RUN, at=AT)
    assert planned.drain_run(RUN, at=AT) is RunState.DRAINING
    assert planned.reopen_run(RUN, at=AT) is RunState.RUNNING
    planned.drain_run(RUN, at=AT)
    seen = len(planned.audit_events())
    planned.drain_run(RUN, at=AT)
    assert len(planned.audit_events()) == seen
    planned.finish_run(RUN, 1, at=AT)
    assert planned.run(RUN).state is RunState.FINISHED


def test_run_that_nobody_has_taken_up_pauses_and_stops_at_once(planned: SqlStore) -> None:
    assert planned.pause_run(RUN, at=AT) is RunState.PAUSED
    assert planned.drain_run(RUN, at=AT) is RunState.STOPPED
    with refusal(ErrorCode.RUN_STATE):
        planned.pause_run(RUN, at=AT)


def test_round_makes_no_step_that_the_table_does_not_have(running: SqlStore) -> None:
    running.open_round(opening())
    before = (running.rounds(RUN), running.audit_events())
    for write in (
        lambda: running.advance_round(RUN, 1, 1, RoundEvent.ADMIT, at=AT),
        lambda: running.commit_round(result(), envelopes()),
        lambda: running.fail_round(RUN, 1, 1, participations(), code="PF503", at=AT),
    ):
        with refusal(ErrorCode.ROUND_STATE):
            write()
    assert before == (running.rounds(RUN), running.audit_events())


def quarantined() -> Quarantined:
    return Quarantined(
        run=RUN, round_index=1, site=A, code="PF507", update=digest.of_bytes(b"u"), update_bytes=5_000_000_000, path="quarantine/x", at=AT
    )


WRITES: list[Callable[[SqlStore], Any]] = [
    lambda store: store.note_participation(RUN, 1, 1, participations()[1], at=AT),
    lambda store: store.advance_round(RUN, 1, 1, RoundEvent.SEND, at=AT),
    lambda store: store.rest_run(RUN, 1, at=AT),
    lambda store: store.note_quarantine(1, quarantined()),
    lambda store: store.open_round(opening()),
    lambda store: store.commit_round(result(), envelopes()),
    lambda store: store.fail_round(RUN, 1, 1, participations(), code="PF503", at=AT),
    lambda store: store.finish_run(RUN, 1, at=AT),
    lambda store: store.fail_run(RUN, 1, code="PF503", at=AT),
]


@pytest.mark.parametrize("why", ["taken up again", "stopped"])
@pytest.mark.parametrize("write", WRITES)
def test_loop_that_lost_its_run_writes_nothing_more(running: SqlStore, why: str, write: Callable[[SqlStore], Any]) -> None:
    running.open_round(opening())
    if why == "stopped":
        running.stop_run(RUN, at=AT)
    else:
        running.begin_attempt(RUN, at=AT)
    before = (running.run(RUN), running.rounds(RUN), running.participations(RUN, 1), running.audit_events())
    with refusal(ErrorCode.RUN_STATE):
        write(running)
    assert before == (running.run(RUN), running.rounds(RUN), running.participations(RUN, 1), running.audit_events())


# ---- rounds


def test_initial_state_is_committed_once(running: SqlStore) -> None:
    assert running.progress(RUN).last == checkpoint(0)
    with refusal(ErrorCode.RUN_STATE):
        running.commit_initial(RUN, 1, checkpoint(0), at=AT)


def test_round_is_offered_collected_and_committed(running: SqlStore) -> None:
    running.open_round(opening())
    assert running.rounds(RUN)[0].state is RoundState.OFFERED
    running.advance_round(RUN, 1, 1, RoundEvent.SEND, at=AT)
    assert running.rounds(RUN)[0].state is RoundState.TRAINING
    running.note_participation(RUN, 1, 1, admitted(A), at=AT)
    assert running.rounds(RUN)[0].state is RoundState.COLLECTING
    assert running.participations(RUN, 1) == [admitted(A), *participations()[1:]]
    running.advance_round(RUN, 1, 1, RoundEvent.ADMIT, at=AT)
    assert running.rounds(RUN)[0].state is RoundState.ADMITTED
    running.commit_round(result(), envelopes())
    done = running.rounds(RUN)[0]
    assert (done.state, done.next_state, done.offered_at, done.deadline, done.committed_at, done.times) == (
        RoundState.COMMITTED,
        name_of(1),
        AT,
        AT + 60,
        AT + 61,
        result().times,
    )
    assert running.participations(RUN, 1) == list(result().participations)
    assert [(row.round_index, row.site, row.envelope, row.digest) for row in running.statements(RUN)] == [
        (1, A, envelopes()[A], digest.of_bytes(envelopes()[A]))
    ]
    assert running.progress(RUN).last == checkpoint(1)
    assert running.checkpoints(RUN) == [checkpoint(0), checkpoint(1)]
    last = running.audit_events()[-1]
    moved = {"attempt": 1, "round": 1, "offer": 1, "event": "commit", "from": "admitted", "to": "committed"}
    assert (last.action, last.at, last.detail) == ("round.committed", AT + 61, {**moved, "state": name_of(1), "sites": [A]})


@pytest.mark.parametrize(("index", "base"), [(2, 1), (2, 0), (1, 1)])
def test_round_that_does_not_follow_the_last_committed_is_refused(running: SqlStore, index: int, base: int) -> None:
    with refusal(ErrorCode.RUN_STATE):
        running.open_round(replace(opening(index), base_state=name_of(base)))
    collected(running)
    with refusal(ErrorCode.RUN_STATE):
        running.commit_round(replace(result(index), base_state=name_of(base)), envelopes())
    assert running.progress(RUN).last == checkpoint(0)


def test_round_commits_only_once_and_only_when_opened(running: SqlStore) -> None:
    with refusal(ErrorCode.RUN_STATE):
        running.commit_round(result(), envelopes())
    collected(running)
    running.commit_round(result(), envelopes())
    with refusal(ErrorCode.RUN_STATE):
        running.commit_round(result(), envelopes())
    assert len(running.statements(RUN)) == 1


@pytest.mark.parametrize("fails_at", ["change_round", "_write_participations", "add_event", "append_leaves"])
def test_commit_that_fails_half_way_leaves_nothing_behind(running: SqlStore, fails_at: str, monkeypatch: pytest.MonkeyPatch) -> None:
    collected(running)
    before = (running.rounds(RUN), running.participations(RUN, 1), running.checkpoints(RUN), running.audit_events(), running.log_size())

    def fail(*_: object, **__: object) -> None:
        raise OSError("the plug is pulled here")

    monkeypatch.setattr(transitions if fails_at == "add_event" else rounds_store, fails_at, fail)
    with pytest.raises(OSError, match="plug"):
        running.commit_round(result(), envelopes())
    monkeypatch.undo()
    after = (running.rounds(RUN), running.participations(RUN, 1), running.checkpoints(RUN), running.audit_events(), running.log_size())
    assert before == after
    assert running.statements(RUN) == []
    running.commit_round(result(), envelopes())
    assert running.progress(RUN).last == checkpoint(1)


def test_statements_must_be_those_of_the_admitted_sites(running: SqlStore) -> None:
    running.open_round(opening())
    for statements in ({}, {**envelopes(), B: b"another"}):
        with pytest.raises(ValueError, match="admitted sites"):
            running.commit_round(result(), statements)


def test_failed_round_is_told_counted_and_offered_again(running: SqlStore) -> None:
    collected(running, ParticipationState.SILENT)
    assert running.fail_round(RUN, 1, 1, participations()[1:], code="PF503", at=AT) == 1
    row = running.rounds(RUN)[0]
    assert (row.state, row.code, row.attempt) == (RoundState.FAILED, "PF503", 1)
    failed, lost = running.audit_events()[-2:]
    sites = {B: "PF515", C: "PF407"}
    moved = {"attempt": 1, "round": 1, "offer": 1, "event": "fail", "from": "collecting", "to": "failed"}
    assert (failed.action, failed.detail) == ("round.failed", {**moved, "code": "PF503", "failures": 1, "sites": sites})
    assert (lost.action, lost.detail) == ("quorum.lost", {"round": 1, "failures": 1, "sites": sites})
    running.open_round(opening())
    assert running.rounds(RUN)[0].attempt == 2
    assert running.begin_attempt(RUN, at=AT).failures == 1
    running.open_round(opening(attempt=2))
    running.note_participation(RUN, 2, 1, participations()[1], at=AT)
    assert running.fail_round(RUN, 2, 1, participations(), code="PF503", at=AT) == 2
    running.fail_run(RUN, 2, code="PF503", at=AT)
    running.reopen_run(RUN, at=AT)
    assert running.begin_attempt(RUN, at=AT).failures == 0


def test_commit_forgets_the_failed_attempts(running: SqlStore) -> None:
    collected(running, ParticipationState.SILENT)
    running.fail_round(RUN, 1, 1, participations(), code="PF503", at=AT)
    collected(running)
    running.commit_round(result(), envelopes())
    assert running.progress(RUN).failures == 0
    assert running.rounds(RUN)[0].code is None


def test_quarantined_update_is_noted_once(running: SqlStore) -> None:
    running.open_round(opening())
    running.note_quarantine(1, quarantined())
    running.note_quarantine(1, replace(quarantined(), at=AT + 5))
    assert running.quarantined(RUN) == [quarantined()]


def test_audit_trail_goes_on_from_a_number(store: SqlStore) -> None:
    for subject in ("x", "y", "z"):
        store.audit(actor="operator", action="test", subject=subject, at=AT, detail={"n": 1})
    events = store.audit_events()
    assert [event.subject for event in events] == ["x", "y", "z"]
    assert store.audit_events(after=events[1].seq) == events[2:]


# ---- several writers


def in_threads(count: int, work: Callable[[int], object]) -> list[BaseException]:
    failed: list[BaseException] = []
    start = threading.Barrier(count)

    def run(index: int) -> None:
        start.wait()
        try:
            work(index)
        except RoundError as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return failed


def test_writers_at_once_lose_no_event(store: SqlStore) -> None:
    def work(index: int) -> None:
        for number in range(10):
            store.audit(actor="server", action="test", subject=f"{index}.{number}", at=AT)

    assert in_threads(6, work) == []
    assert len({event.subject for event in store.audit_events()}) == 60


def test_one_of_several_enrolments_of_a_name_wins(store: SqlStore) -> None:
    failed = in_threads(4, lambda index: store.add_site(A, evidence_key=key_of(str(index)), flower_key=f"f{index}", at=AT))
    assert [error.code for error in failed if isinstance(error, RoundError)] == [ErrorCode.SITE_EXISTS] * 3
    assert len(store.sites()) == 1


def test_one_of_several_commits_of_a_round_wins(running: SqlStore) -> None:
    collected(running)
    failed = in_threads(4, lambda _: running.commit_round(result(), envelopes()))
    assert [error.code for error in failed if isinstance(error, RoundError)] == [ErrorCode.RUN_STATE] * 3
    assert len(running.statements(RUN)) == 1


def test_attempts_are_counted_one_by_one(planned: SqlStore) -> None:
    seen: list[int] = []
    assert in_threads(5, lambda _: seen.append(planned.begin_attempt(RUN, at=AT).attempt)) == []
    assert sorted(seen) == [1, 2, 3, 4, 5]


# ---- the bulk plane: which states a site may have, and which updates are wanted from it ----


def test_a_state_is_for_listed_sites_that_have_approved(running: SqlStore) -> None:
    state = name_of(0)
    for asking in (A, B):
        assert running.base_state(asking, state) == (checkpoint(0).state_path, checkpoint(0).state_bytes)
    assert running.base_state(C, state) is None, "listed, and has not approved"
    assert running.base_state(A, digest.of_bytes(b"none")) is None
    assert running.base_state(A, name_of(1)) is None, "not committed"


def test_who_leaves_may_have_nothing(running: SqlStore) -> None:
    running.add_decision(against(A, approval=approved(A)), at=AT)
    assert running.base_state(A, name_of(0)) is None
    running.revoke_site(B, at=AT)
    assert running.base_state(B, name_of(0)) is None


def test_who_was_taken_out_may_have_what_was_committed_until_then(running: SqlStore) -> None:
    running.open_round(opening())
    running.change_run_sites(RUN, remove=[A], quorum=1, at=AT)
    assert running.base_state(A, name_of(0)) is not None, "it may still answer the round that is going on"
    running.advance_round(RUN, 1, 1, RoundEvent.SEND, at=AT)
    running.note_participation(RUN, 1, 1, admitted(A), at=AT)
    running.advance_round(RUN, 1, 1, RoundEvent.ADMIT, at=AT)
    running.commit_round(replace(result(), committed_at=AT + 60), envelopes())
    assert running.base_state(B, name_of(1)) is not None
    assert running.base_state(A, name_of(1)) is None
    running.change_run_sites(RUN, add=[A], quorum=1, at=AT + 70)
    assert running.base_state(A, name_of(1)) is not None


def test_an_update_is_wanted_from_who_is_asked_until_the_outcome_is_known(running: SqlStore) -> None:
    assert not running.update_wanted(A, RUN, 1), "no round is open"
    running.open_round(opening())
    assert running.update_wanted(A, RUN, 1)
    assert not running.update_wanted(A, RUN, 2)
    assert not running.update_wanted(B, RUN, 1), "silent"
    assert not running.update_wanted(C, RUN, 1), "excluded"
    running.note_participation(RUN, 1, 1, Participation(site=A, state=ParticipationState.SILENT, code="PF515", offered_at=AT), at=AT)
    assert not running.update_wanted(A, RUN, 1)


def test_a_round_that_failed_takes_none_until_it_is_offered_again(running: SqlStore) -> None:
    collected(running, ParticipationState.SILENT)
    running.fail_round(RUN, 1, 1, opening().participations, code="PF503", at=AT)
    assert not running.update_wanted(A, RUN, 1)
    running.open_round(replace(opening(), offered_at=AT + 1))
    assert running.update_wanted(A, RUN, 1)


def test_a_revoked_site_is_asked_for_nothing(running: SqlStore) -> None:
    running.open_round(opening())
    running.revoke_site(A, at=AT)
    assert not running.update_wanted(A, RUN, 1)
