"""The loop with honest sites: what it computes, and how it fails, retries, stops and cleans up."""

import math
from collections.abc import Callable
from functools import partial
from itertools import permutations
from pathlib import Path

import pytest
import torch
from tests.server.rounds.consortium import (
    NAMES,
    RUN,
    SHAPES,
    Answer,
    Consortium,
    Make,
    honest_update,
    initial_state,
    make_plan,
    send,
    travelling,
)
from torch import Tensor

from pathfed_common import digest
from pathfed_common.encoder import weights
from pathfed_common.errors import ErrorCode, RoundError
from pathfed_common.ids import SiteName
from pathfed_common.plan import Plan
from pathfed_common.protocol.messages import RoundOffer
from pathfed_server.rounds.ports import Offer, Reply
from pathfed_server.rounds.progress import Progress, Stage
from pathfed_server.rounds.state import ParticipationState, RoundState, RunState, SiteState

A, B, C = NAMES


def arrived(plan: Plan, offer: RoundOffer) -> dict[str, Tensor]:
    """What an honest update is read as, computed the plain way."""
    tensors = weights.load(travelling(plan, honest_update(plan, offer)))
    if plan.wire.dtype != "int8":
        return {name: tensor.float() for name, tensor in tensors.items()}
    scales = {name: tensors[f"{name}.scale"].repeat_interleave(256)[: tensors[name].numel()] for name in SHAPES}
    return {name: tensors[name].float() * scales[name].view(SHAPES[name]) for name in SHAPES}


def expected_states(plan: Plan, sites: tuple[SiteName, ...] = NAMES) -> list[dict[str, Tensor]]:
    """The states of a run with plain SGD, computed the plain way: descend the weighted mean with momentum."""
    states = [initial_state()]
    velocity = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    total = sum(plan.site_weights.get(site, 1.0) for site in sites)
    for index in range(1, plan.rounds.count + 1):
        base = digest.of_bytes(weights.dump(states[-1], {}))
        offers = [
            RoundOffer(
                run=RUN, site=site, round_index=index, plan=plan.digest, base_state=base, base_state_bytes=1, offered_at=1.0, deadline=2.0
            )
            for site in sites
        ]
        after = {}
        for name in SHAPES:
            summed = sum(arrived(plan, offer)[name].double() * plan.site_weights.get(offer.site, 1.0) for offer in offers)
            assert isinstance(summed, Tensor)
            mean = (summed / total).float()
            velocity[name] = (velocity[name].double() * plan.server_optimiser.momentum + mean.double()).float()
            after[name] = (states[-1][name].double() - plan.server_optimiser.learning_rate * velocity[name].double()).float()
        states.append(after)
    return states


@pytest.mark.parametrize(("wire", "steps"), [("float32", 1), ("bfloat16", 1), ("int8", 1), ("float32", 3), ("int8", 3)])
def test_run_descends_the_weighted_mean_of_all_sites(consortium: Make, wire: str, steps: int) -> None:
    plan = make_plan(rounds=3, quorum=3, wire=wire, steps=steps, optimiser="sgd", site_weights={"b-hospital": 2.5})
    made = consortium(plan)
    outcome = made.drive()
    assert outcome.state is RunState.FINISHED
    assert [digest.of_bytes(weights.dump(state, {})) for state in expected_states(plan)] == [
        each.state for each in made.store.checkpoints(RUN)
    ]
    assert outcome.last == made.store.checkpoints(RUN)[-1]
    assert made.store.run(RUN).state is RunState.FINISHED


def test_each_round_is_recorded_and_committed_alike(consortium: Make) -> None:
    made = consortium()
    made.drive()
    assert [row.state for row in made.store.rounds(RUN)] == [RoundState.COMMITTED] * 2
    for row in made.store.rounds(RUN):
        result, statements, approvals = made.recorder.rounds[row.round_index]
        assert made.store.participations(RUN, row.round_index) == list(result.participations)
        assert {each.site: each.envelope for each in made.store.statements(RUN) if each.round_index == row.round_index} == statements
        assert approvals == {each.site: each.envelope for each in made.store.approvals(made.plan.digest)}
        assert result.weights == pytest.approx(dict.fromkeys(NAMES, 1 / 3))
        assert row.times == result.times
        assert result.times.transfer_s == pytest.approx(0.75)
        assert min(result.times.admission_s, result.times.aggregation_s, result.times.step_s, result.times.exchange_s) > 0
    plan, candidates, state = made.recorder.begun[0]
    assert (plan, [each.site for each in candidates], weights.load(state).keys()) == (made.plan, list(NAMES), SHAPES.keys())
    assert made.recorder.finished == [(2, made.store.checkpoints(RUN)[-1].state)]


def test_participations_hold_what_each_site_states(consortium: Make) -> None:
    made = consortium(make_plan(wire="int8"))
    made.drive()
    row = made.store.participations(RUN, 2)[0]
    assert (row.state, row.code, row.epsilon_plan, row.epsilon_total, row.reply_slot_s) == (
        ParticipationState.ADMITTED,
        None,
        1.0,
        1.5,
        5.0,
    )
    assert row.figures["loss_sum"] == 6.5
    offer = RoundOffer(
        run=RUN,
        site=A,
        round_index=2,
        plan=made.plan.digest,
        base_state=made.store.checkpoints(RUN)[1].state,
        base_state_bytes=1,
        offered_at=1.0,
        deadline=2.0,
    )
    sent, read = honest_update(made.plan, offer), arrived(made.plan, offer)
    true = math.sqrt(sum(float((sent[name].double() - read[name].double()).square().sum()) for name in SHAPES))
    assert row.rounding is not None
    assert 0.5 * row.rounding < true < row.rounding
    assert row.offered_at is not None
    assert row.received_at is not None
    assert row.received_at > row.offered_at


def in_order(order: tuple[int, ...], offers: list[Offer]) -> list[Offer]:
    return [offers[index] for index in order]


def test_order_of_arrival_changes_no_bit(consortium: Make) -> None:
    ends = set()
    for order in permutations(range(3)):
        made = consortium(make_plan(rounds=1, wire="bfloat16", site_weights={"a-hospital": 0.3, "c-hospital": 7.0}))
        made.sites.arrival = partial(in_order, order)
        made.drive()
        ends.add(made.store.checkpoints(RUN)[-1].state)
    assert len(ends) == 1


def test_watcher_is_told_of_every_step(consortium: Make) -> None:
    made = consortium(make_plan(rounds=1))
    made.drive()
    decided = [(told.site, told.outcome) for told in made.told if told.stage is Stage.DECIDED]
    assert decided == [(name, "admitted") for name in NAMES]
    assert [told.stage for told in made.told if told.stage is not Stage.DECIDED] == [
        Stage.RECORDED,
        Stage.COMMITTED,
        Stage.OPENED,
        Stage.COLLECTED,
        Stage.AVERAGED,
        Stage.STEPPED,
        Stage.RECORDED,
        Stage.COMMITTED,
        Stage.CLEANED,
    ]


def test_only_what_is_needed_stays_on_the_disk(consortium: Make) -> None:
    made = consortium(make_plan(rounds=4))
    made.drive()
    folder = made.home / "runs" / RUN
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    assert files == [
        "optimiser/round-000003.safetensors",
        "optimiser/round-000004.safetensors",
        *(f"states/round-{index:06d}.safetensors" for index in range(5)),
    ]


# ---- quorum


def silent(answer: Answer, folder: Path, at: float) -> list[Reply]:
    return []


def silent_at_first(made: Consortium, times: int = 1) -> None:
    left = [times]

    def conduct(answer: Answer, folder: Path, at: float) -> list[Reply]:
        left[0] -= 1
        return [] if left[0] >= 0 else send(answer, folder, at)

    made.sites.conduct[B] = conduct


def test_round_without_quorum_is_told_and_offered_again(consortium: Make) -> None:
    calm = consortium(make_plan(quorum=3))
    calm.drive()
    made = consortium(make_plan(quorum=3))
    silent_at_first(made)
    made.drive()
    assert made.store.checkpoints(RUN)[-1].state == calm.store.checkpoints(RUN)[-1].state
    failed = [told for told in made.told if told.stage is Stage.FAILED]
    assert [(told.round_index, told.code, told.outcome) for told in failed] == [
        (1, "PF503", "a-hospital admitted, b-hospital PF515, c-hospital admitted")
    ]
    assert [event.detail["sites"] for event in made.store.audit_events() if event.action == "round.failed"] == [
        {A: "admitted", B: "PF515", C: "admitted"}
    ]
    assert [row.attempt for row in made.store.rounds(RUN)] == [2, 1]
    assert made.clock.slept == [5.0]


def test_updates_admitted_before_a_failed_attempt_are_not_asked_for_again(consortium: Make) -> None:
    made = consortium(make_plan(rounds=1, quorum=3))
    silent_at_first(made)
    made.drive()
    assert made.sites.asked == [(A, 1), (B, 1), (C, 1), (B, 1)]


@pytest.mark.parametrize("ending", [".safetensors", ".dsse", ".json"])
def test_damaged_spool_is_not_believed_and_the_site_asked_again(consortium: Make, ending: str) -> None:
    calm = consortium(make_plan(rounds=1, quorum=3))
    calm.drive()
    made = consortium(make_plan(rounds=1, quorum=3))
    silent_at_first(made)

    def damage(told: Progress) -> None:
        if told.stage is Stage.FAILED:
            path = made.home / "runs" / RUN / "spool" / "round-000001" / "admitted" / f"{A}{ending}"
            path.write_bytes(path.read_bytes()[:-1] + b"?")

    made.told = type("Watch", (list,), {"append": lambda _, told: damage(told)})()
    made.drive()
    assert made.sites.asked == [(A, 1), (B, 1), (C, 1), (A, 1), (B, 1)]
    assert made.store.checkpoints(RUN)[-1].state == calm.store.checkpoints(RUN)[-1].state


def test_quorum_lost_too_often_fails_the_run_and_changes_no_state(consortium: Make) -> None:
    made = consortium(make_plan(quorum=3))
    made.sites.conduct[B] = silent
    with pytest.raises(RoundError, match=r"2 of 3 updates, 2 times.*b-hospital PF515") as caught:
        made.drive()
    assert caught.value.code is ErrorCode.QUORUM_LOST
    run = made.store.run(RUN)
    assert (run.state, run.code) == (RunState.FAILED, "PF503")
    assert [each.round_index for each in made.store.checkpoints(RUN)] == [0]
    assert made.recorder.rounds == {}
    assert made.store.rounds(RUN)[0].state is RoundState.FAILED


def test_failed_run_goes_on_when_reopened_as_if_nothing_had_happened(consortium: Make) -> None:
    calm = consortium(make_plan(quorum=3))
    calm.drive()
    made = consortium(make_plan(quorum=3))
    silent_at_first(made, times=3)
    with pytest.raises(RoundError):
        made.drive()
    with pytest.raises(RoundError, match="PF511"):
        made.drive()
    made.store.reopen_run(RUN, at=made.clock.now())
    assert made.drive().last == calm.store.checkpoints(RUN)[-1]


def test_attempts_are_as_many_as_asked_for(consortium: Make) -> None:
    made = consortium(make_plan(rounds=1, quorum=3))
    silent_at_first(made, times=3)
    assert made.drive(attempts=4, retry_pause_s=1.5).state is RunState.FINISHED
    assert made.clock.slept == [1.5] * 3


def test_nobody_is_asked_where_too_few_may_take_part(consortium: Make) -> None:
    made = consortium(make_plan(quorum=3))
    made.store.revoke_site(C, at=made.clock.now())
    with pytest.raises(RoundError) as caught:
        made.drive()
    assert caught.value.code is ErrorCode.QUORUM_LOST
    assert made.sites.asked == []
    assert made.codes(1) == {A: "PF503", B: "PF503", C: "PF518"}


def test_site_revoked_during_a_run_is_left_out_from_the_next_round_on(consortium: Make) -> None:
    made = consortium()

    def revoke(told: Progress) -> None:
        if (told.stage, told.round_index) == (Stage.COMMITTED, 1):
            made.store.revoke_site(B, at=made.clock.now())

    made.told = type("Watch", (list,), {"append": lambda _, told: revoke(told)})()
    made.drive()
    assert made.codes(1) == dict.fromkeys(NAMES)
    assert made.codes(2) == {A: None, B: "PF518", C: None}
    assert made.store.site(B).state is SiteState.REVOKED
    assert (B, 2) not in made.sites.asked


# ---- stop, supersede, damage


@pytest.mark.parametrize("stage", [Stage.OPENED, Stage.DECIDED, Stage.COLLECTED, Stage.STEPPED, Stage.COMMITTED])
def test_stopped_run_ends_and_goes_on_when_reopened(consortium: Make, stage: Stage) -> None:
    calm = consortium()
    calm.drive()
    made = consortium()

    def stop(told: Progress) -> None:
        if (told.stage, told.round_index) == (stage, 1):
            made.store.stop_run(RUN, at=made.clock.now())

    made.told = type("Watch", (list,), {"append": lambda _, told: stop(told)})()
    outcome = made.drive()
    assert outcome.state is RunState.STOPPED
    assert outcome.last == made.store.checkpoints(RUN)[-1]
    assert made.store.run(RUN).state is RunState.STOPPED
    made.store.reopen_run(RUN, at=made.clock.now())
    made.told = []
    assert made.drive().last == calm.store.checkpoints(RUN)[-1]


def told_to(made: Consortium, stage: Stage, order: Callable[[], object], index: int = 1) -> None:
    """Let something happen at a stage of a round, once."""
    done: list[object] = []

    def watch(told: Progress) -> None:
        if (told.stage, told.round_index) == (stage, index) and not done:
            done.append(True)
            order()

    made.told = type("Watch", (list,), {"append": lambda _, told: watch(told)})()


def states_of(made: Consortium) -> list[RoundState]:
    return [row.state for row in made.store.rounds(RUN)]


@pytest.mark.parametrize("stage", [Stage.OPENED, Stage.DECIDED, Stage.COLLECTED, Stage.STEPPED, Stage.COMMITTED])
@pytest.mark.parametrize("order", ["pause", "drain"])
def test_run_that_is_to_rest_ends_its_round_and_begins_no_other(consortium: Make, stage: Stage, order: str) -> None:
    calm = consortium()
    calm.drive()
    made = consortium()
    give = made.store.pause_run if order == "pause" else made.store.drain_run
    told_to(made, stage, lambda: give(RUN, at=made.clock.now()))
    outcome = made.drive()
    assert outcome.state is (RunState.PAUSED if order == "pause" else RunState.STOPPED)
    assert states_of(made) == [RoundState.COMMITTED]
    assert outcome.last == calm.store.checkpoints(RUN)[1]
    made.store.reopen_run(RUN, at=made.clock.now())
    made.told = []
    assert made.drive().last == calm.store.checkpoints(RUN)[-1]
    assert len(made.sites.asked) == 2 * len(NAMES), "no site was asked twice for a round"


@pytest.mark.parametrize("stage", [Stage.OPENED, Stage.DECIDED, Stage.COLLECTED, Stage.AVERAGED, Stage.STEPPED])
def test_run_paused_at_once_begins_its_round_again_with_what_was_admitted(consortium: Make, stage: Stage) -> None:
    calm = consortium()
    calm.drive()
    made = consortium()
    told_to(made, stage, lambda: made.store.pause_run(RUN, now=True, at=made.clock.now()))
    assert made.drive().state is RunState.PAUSED
    assert states_of(made) == [RoundState.PLANNED]
    made.store.reopen_run(RUN, at=made.clock.now())
    made.told = []
    assert made.drive().last == calm.store.checkpoints(RUN)[-1]
    assert made.store.quarantined(RUN) == []


def test_run_that_is_to_rest_offers_no_failed_round_again(consortium: Make) -> None:
    made = consortium(make_plan(quorum=3))
    made.sites.conduct[B] = silent
    told_to(made, Stage.OPENED, lambda: made.store.pause_run(RUN, at=made.clock.now()))
    assert made.drive().state is RunState.PAUSED
    assert states_of(made) == [RoundState.FAILED]
    made.sites.conduct.clear()
    made.store.reopen_run(RUN, at=made.clock.now())
    made.told = []
    assert made.drive().state is RunState.FINISHED


def test_loop_killed_while_its_run_drains_ends_the_round_first(consortium: Make) -> None:
    made = consortium()

    def drain_and_die() -> None:
        made.store.drain_run(RUN, at=made.clock.now())
        raise KeyboardInterrupt

    told_to(made, Stage.DECIDED, drain_and_die)
    with pytest.raises(KeyboardInterrupt):
        made.drive()
    assert made.drive().state is RunState.STOPPED
    assert states_of(made) == [RoundState.COMMITTED]


def test_each_step_of_a_round_is_in_the_audit_trail(consortium: Make) -> None:
    made = consortium(make_plan(rounds=1, quorum=3))
    silent_at_first(made, times=1)
    made.drive()
    events = [event for event in made.store.audit_events() if event.action.startswith(("round.", "site.", "quorum."))]
    shown = [(event.action, event.subject if event.subject != RUN else event.detail.get("offer", "")) for event in events]
    first = [("round.planned", 1), ("round.offered", 1), ("round.training", 1), ("round.collecting", 1)]
    enrolled = [("site.enrolled", site) for site in NAMES]
    assert shown == [
        *enrolled,
        *first,
        *(("site.admitted", site) for site in (A, C)),
        ("site.silent", B),
        ("round.failed", 1),
        ("quorum.lost", ""),
        ("round.planned", 2),
        ("round.offered", 2),
        ("round.collecting", 2),
        *(("site.admitted", site) for site in (A, C, B)),  # two were kept
        ("round.admitted", 2),
        ("round.committed", 2),
    ]


def test_loop_that_another_superseded_ends_without_a_trace(consortium: Make) -> None:
    made = consortium()

    def supersede(told: Progress) -> None:
        if (told.stage, told.round_index) == (Stage.STEPPED, 2):
            made.store.begin_attempt(RUN, at=made.clock.now())

    made.told = type("Watch", (list,), {"append": lambda _, told: supersede(told)})()
    with pytest.raises(RoundError, match="later attempt") as caught:
        made.drive()
    assert caught.value.code is ErrorCode.RUN_STATE
    assert [each.round_index for each in made.store.checkpoints(RUN)] == [0, 1]
    assert made.store.run(RUN).state is RunState.RUNNING


@pytest.mark.parametrize("kind", ["states", "optimiser"])
@pytest.mark.parametrize("harm", ["changed", "gone"])
def test_run_does_not_go_on_from_a_damaged_checkpoint(consortium: Make, kind: str, harm: str) -> None:
    made = consortium(make_plan(quorum=3))
    made.sites.conduct[B] = lambda answer, folder, at: send(answer, folder, at) if answer.offer.round_index == 1 else []
    with pytest.raises(RoundError):
        made.drive()
    made.store.reopen_run(RUN, at=made.clock.now())
    path = made.home / "runs" / RUN / kind / "round-000001.safetensors"
    kept = path.read_bytes()
    path.unlink() if harm == "gone" else path.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    with pytest.raises(RoundError, match=str(path)) as caught:
        made.drive()
    assert caught.value.code is ErrorCode.RUN_FAILED
    assert made.store.run(RUN).code == "PF514"


def test_run_is_not_driven_with_another_plan(consortium: Make) -> None:
    made = consortium()
    with pytest.raises(RoundError, match="another plan"):
        made.drive(plan=make_plan(rounds=3))
    assert made.sites.asked == []


def test_step_without_a_finite_result_fails_the_run_before_it_is_committed(consortium: Make) -> None:
    plan = make_plan(optimiser="sgd")
    plan = plan.model_copy(update={"server_optimiser": plan.server_optimiser.model_copy(update={"learning_rate": 1e45})})
    made = consortium(plan)
    with pytest.raises(RoundError) as caught:
        made.drive()
    assert caught.value.code is ErrorCode.RUN_FAILED
    assert made.store.run(RUN).state is RunState.FAILED
    assert [each.round_index for each in made.store.checkpoints(RUN)] == [0]


def test_finished_run_is_not_driven_again(consortium: Make) -> None:
    made = consortium(make_plan(rounds=1))
    made.drive()
    with pytest.raises(RoundError) as caught:
        made.drive()
    assert caught.value.code is ErrorCode.RUN_STATE
