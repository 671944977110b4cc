"""Replays, late updates, turns, enough updates, suspension, release from quarantine, and sites that join and leave: in the real loop."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from tests.server.rounds.consortium import NAMES, RUN, Answer, Consortium, Make, make_plan, send
from torch import Tensor

from pathfed_common.encoder import weights
from pathfed_common.errors import ErrorCode, RoundError
from pathfed_common.ids import SiteName
from pathfed_common.plan import Plan
from pathfed_server.rounds.ports import Reply
from pathfed_server.rounds.progress import Progress, Stage
from pathfed_server.rounds.state import ParticipationState, RunState

A, B, C = NAMES


def plan_of(*, rounds: int = 1, quorum: int = 2, **keys: object) -> Plan:
    plan = make_plan(rounds=rounds, quorum=quorum)
    return plan.model_copy(update={"rounds": plan.rounds.model_copy(update=keys)})


def silent(answer: Answer, folder: Path, at: float) -> list[Reply]:
    return []


def late(answer: Answer, folder: Path, at: float) -> list[Reply]:
    return [answer.reply(folder, at + 61.0)]


def over_budget(answer: Answer, folder: Path, at: float) -> list[Reply]:
    return [Reply(site=answer.offer.site, code="PF301", statement=None, update=None, received_at=at, transfer_s=0.0)]


def too_long(answer: Answer, folder: Path, at: float) -> list[Reply]:
    tensors = weights.load(answer.update)
    for tensor in tensors.values():
        tensor.mul_(10)
    return [answer.signed_again(weights.dump(tensors, {"kind": "pathfed-update"})).reply(folder, at)]


def with_nan(answer: Answer, folder: Path, at: float) -> list[Reply]:
    tensors: dict[str, Tensor] = weights.load(answer.update)
    tensors["encoder.norm"][3] = float("nan")
    return [answer.signed_again(weights.dump(tensors, {"kind": "pathfed-update"})).reply(folder, at)]


def when(made: Consortium, wanted: tuple[Stage, int], work: Callable[[], object], *, site: SiteName | None = None) -> None:
    """Do something the first time that a stage of a round is told."""
    done: list[bool] = []

    def watch(told: Progress) -> None:
        if (told.stage, told.round_index) == wanted and site in (None, told.site) and not done:
            done.append(True)
            work()

    made.told = type("Watch", (list,), {"append": lambda _, told: watch(told)})()


def actions(made: Consortium, prefix: str) -> list[tuple[str, str]]:
    return [(event.action, event.subject) for event in made.store.audit_events() if event.action.startswith(prefix)]


# ---- replays and words that come in between


def test_the_same_reply_again_changes_nothing(consortium: Make) -> None:
    calm = consortium(plan_of())
    calm.drive()

    def twice(answer: Answer, folder: Path, at: float) -> list[Reply]:
        one = answer.reply(folder, at)
        assert one.update is not None
        kept = one.update.rename(folder / "first.part")
        return [replace(one, update=kept), answer.reply(folder, at)]

    made = consortium(plan_of())
    made.sites.conduct = dict.fromkeys(NAMES, twice)
    made.drive()
    assert made.store.quarantined(RUN) == []
    assert made.store.checkpoints(RUN)[-1].state == calm.store.checkpoints(RUN)[-1].state
    assert not list((made.home / "runs" / RUN / "spool").rglob("*.part"))
    assert len(actions(made, "site.admitted")) == 3


@pytest.mark.parametrize("conduct", [too_long, with_nan])
def test_the_same_refused_reply_again_changes_nothing(consortium: Make, conduct: Callable[..., list[Reply]]) -> None:
    def twice(answer: Answer, folder: Path, at: float) -> list[Reply]:
        (one,) = conduct(answer, folder, at)
        assert one.update is not None
        kept = one.update.rename(folder / "first.part")
        return [replace(one, update=kept), *conduct(answer, folder, at)]

    made = consortium(plan_of())
    made.sites.conduct[B] = twice
    made.drive()
    assert len(made.store.quarantined(RUN)) == 1


def test_update_of_a_site_that_is_revoked_while_it_trains_does_not_count(consortium: Make) -> None:
    made = consortium(plan_of())

    def revoked(answer: Answer, folder: Path, at: float) -> list[Reply]:
        made.store.revoke_site(B, at=at)
        return send(answer, folder, at)

    made.sites.conduct[B] = revoked
    made.drive()
    assert made.codes(1) == {A: None, B: "PF518", C: None}
    assert [row.code for row in made.store.quarantined(RUN)] == ["PF518"]


# ---- late


def test_late_update_is_discarded_where_the_plan_says_so(consortium: Make) -> None:
    made = consortium(plan_of(quorum=3))
    made.sites.conduct[B] = late
    with pytest.raises(RoundError, match="PF561"):
        made.drive()
    assert {row.code for row in made.store.quarantined(RUN)} == {"PF561"}
    assert actions(made, "site.late") == [("site.late", B)] * 2


def test_late_update_counts_at_the_next_attempt_on_the_same_base(consortium: Make) -> None:
    calm = consortium(plan_of(quorum=3, late="same_base"))
    calm.drive()
    made = consortium(plan_of(quorum=3, late="same_base"))
    made.sites.conduct[B] = late
    assert made.drive().state is RunState.FINISHED
    assert made.sites.asked == [(A, 1), (B, 1), (C, 1)], "nobody is asked again: what was sealed and charged is used"
    assert made.store.checkpoints(RUN)[-1].state == calm.store.checkpoints(RUN)[-1].state
    assert made.store.quarantined(RUN) == []


def test_late_update_does_not_count_in_a_round_that_does_without_it(consortium: Make) -> None:
    made = consortium(plan_of(rounds=2, late="same_base"))
    made.sites.conduct[B] = lambda answer, folder, at: (late if answer.offer.round_index == 1 else send)(answer, folder, at)
    made.drive()
    assert made.codes(1) == {A: None, B: "PF561", C: None}
    assert made.codes(2) == dict.fromkeys(NAMES)


def test_late_update_that_fails_a_check_is_refused_for_that(consortium: Make) -> None:
    made = consortium(plan_of(late="same_base"))
    made.sites.conduct[B] = lambda answer, folder, at: with_nan(answer, folder, at + 61.0)
    made.drive()
    assert made.codes(1)[B] == "PF507"


def test_late_update_of_a_round_that_is_over_is_refused(consortium: Make) -> None:
    first: list[Answer] = []

    def replay(answer: Answer, folder: Path, at: float) -> list[Reply]:
        first.append(answer)
        return [] if len(first) == 1 else send(first[0], folder, at)

    made = consortium(plan_of(rounds=2, late="same_base"))
    made.sites.conduct[B] = replay
    made.drive()
    assert [made.codes(index)[B] for index in (1, 2)] == ["PF515", "PF509"]


# ---- turns, and enough


def test_sites_take_turns_where_the_plan_asks_fewer(consortium: Make) -> None:
    made = consortium(plan_of(rounds=3, ask_at_most=2))
    made.drive()
    assert sorted(site for site, _ in made.sites.asked) == sorted([*NAMES] * 2)
    for index in (1, 2, 3):
        codes = list(made.codes(index).values())
        assert sorted(codes, key=str) == [None, None, "PF562"]


def test_round_is_closed_once_it_has_enough(consortium: Make) -> None:
    made = consortium(plan_of(enough=2))
    made.drive()
    assert made.sites.asked == [(A, 1), (B, 1)], "the transport is closed; the third site was not reached"
    assert made.codes(1) == {A: None, B: None, C: "PF563"}
    assert made.store.participations(RUN, 1)[2].state is ParticipationState.SILENT
    assert actions(made, "site.not_needed") == [("site.not_needed", C)]


def test_round_with_enough_kept_from_an_attempt_before_asks_nobody(consortium: Make) -> None:
    made = consortium(plan_of(enough=2))

    def die() -> None:
        raise KeyboardInterrupt

    when(made, (Stage.COLLECTED, 1), die)
    with pytest.raises(KeyboardInterrupt):
        made.drive()
    made.sites.asked.clear()
    made.told = []
    made.drive()
    assert made.sites.asked == []
    assert made.codes(1) == {A: None, B: None, C: "PF563"}


# ---- suspension


def test_site_refused_round_after_round_is_suspended_and_asked_again_when_reinstated(consortium: Make) -> None:
    made = consortium(plan_of(rounds=5))
    made.sites.conduct[B] = with_nan
    when(made, (Stage.COMMITTED, 4), lambda: made.store.reinstate_site(B, at=made.clock.now()))
    made.drive()
    assert [made.codes(index)[B] for index in range(1, 6)] == ["PF507", "PF507", "PF507", "PF565", "PF507"]
    assert actions(made, "site.suspended") == [("site.suspended", B)]
    assert made.store.site(B).suspended_at is None, "its refusals before count no more"
    assert [site for site, index in made.sites.asked if index == 4] == [A, C]


def test_one_good_update_in_between_keeps_a_site_in(consortium: Make) -> None:
    made = consortium(plan_of(rounds=5))
    made.sites.conduct[B] = lambda answer, folder, at: (send if answer.offer.round_index == 3 else with_nan)(answer, folder, at)
    made.drive()
    assert [made.codes(index)[B] for index in range(1, 6)] == ["PF507", "PF507", None, "PF507", "PF507"]


@pytest.mark.parametrize("conduct", [silent, late, over_budget])
def test_what_is_no_fault_of_the_site_suspends_nobody(consortium: Make, conduct: Callable[..., list[Reply]]) -> None:
    made = consortium(plan_of(rounds=5))
    made.sites.conduct[B] = conduct
    made.drive()
    assert made.codes(5)[B] not in (None, "PF565")


@pytest.mark.parametrize(("after", "codes"), [(0, ["PF507"] * 4), (1, ["PF507", *["PF565"] * 3])])
def test_the_server_says_after_how_many_rounds(consortium: Make, after: int, codes: list[str]) -> None:
    made = consortium(plan_of(rounds=4))
    made.sites.conduct[B] = with_nan
    made.drive(suspend_after=after)
    assert [made.codes(index)[B] for index in range(1, 5)] == codes


# ---- release


def release(made: Consortium, number: int = 1) -> None:
    made.store.release_quarantined(number, reason="known scanner change", at=made.clock.now(), by="operator:ann")


def test_released_update_counts_while_its_round_is_open(consortium: Make) -> None:
    made = consortium(plan_of(quorum=3))
    made.sites.conduct[B] = too_long
    when(made, (Stage.DECIDED, 1), lambda: release(made), site=B)
    made.drive()
    row = made.store.participations(RUN, 1)[1]
    assert (row.state, row.code, row.released) == (ParticipationState.ADMITTED, None, "PF508")
    assert made.store.quarantine_entry(1).released_by == "operator:ann"
    assert [each.released for each in made.recorder.rounds[1][0].participations] == [None, "PF508", None]


def test_update_released_while_the_round_is_being_admitted_counts_or_is_not_released(consortium: Make) -> None:
    made = consortium(plan_of())
    made.sites.conduct[B] = too_long
    when(made, (Stage.COLLECTED, 1), lambda: release(made))
    with pytest.raises(RoundError, match="PF566"):
        made.drive()


def test_released_update_counts_at_the_next_attempt(consortium: Make) -> None:
    made = consortium(plan_of(quorum=3))
    made.sites.conduct[B] = too_long
    with pytest.raises(RoundError, match="PF508"):
        made.drive()
    release(made)
    made.store.reopen_run(RUN, at=made.clock.now())
    made.sites.asked.clear()
    assert made.drive().state is RunState.FINISHED
    assert made.sites.asked == []
    assert made.store.participations(RUN, 1)[1].released == "PF508"


def test_release_survives_a_kill_after_it_was_taken_up(consortium: Make) -> None:
    made = consortium(plan_of(quorum=3))
    made.sites.conduct[B] = too_long
    when(made, (Stage.FAILED, 1), lambda: release(made))

    def die() -> None:
        raise KeyboardInterrupt

    with pytest.raises(RoundError) as caught:
        made.drive(attempts=1)
    assert caught.value.code is ErrorCode.QUORUM_LOST
    made.store.reopen_run(RUN, at=made.clock.now())
    when(made, (Stage.STEPPED, 1), die)
    with pytest.raises(KeyboardInterrupt):
        made.drive()
    made.told = []
    assert made.drive().state is RunState.FINISHED
    assert made.store.participations(RUN, 1)[1].released == "PF508"


def test_release_of_a_file_that_has_changed_since_counts_nothing(consortium: Make) -> None:
    made = consortium(plan_of(quorum=3))
    made.sites.conduct[B] = too_long
    with pytest.raises(RoundError):
        made.drive()
    release(made)
    path = made.home / made.store.quarantine_entry(1).aside.path
    kept = path.read_bytes()
    path.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    made.sites.conduct[B] = silent
    made.store.reopen_run(RUN, at=made.clock.now())
    with pytest.raises(RoundError, match="PF515"):
        made.drive()


def test_late_update_is_released_with_every_check_again(consortium: Make) -> None:
    made = consortium(plan_of(quorum=3))
    made.sites.conduct[B] = late
    when(made, (Stage.FAILED, 1), lambda: release(made))
    assert made.drive().state is RunState.FINISHED
    assert made.store.participations(RUN, 1)[1].released == "PF561"


def test_release_of_a_late_update_waives_no_norm(consortium: Make) -> None:
    made = consortium(plan_of(quorum=3))
    made.sites.conduct[B] = lambda answer, folder, at: too_long(answer, folder, at + 61.0)
    when(made, (Stage.FAILED, 1), lambda: release(made))
    with pytest.raises(RoundError, match="PF503"):
        made.drive()
    assert made.store.participations(RUN, 1)[1].state is ParticipationState.REFUSED


def test_release_of_the_norm_waives_no_finiteness(consortium: Make) -> None:
    made = consortium(plan_of(quorum=3))
    made.sites.conduct[B] = with_nan
    with pytest.raises(RoundError):
        made.drive()
    with pytest.raises(RoundError, match="PF566"):
        release(made)


# ---- joining and leaving


def test_site_that_leaves_is_asked_no_more_from_the_next_round_on(consortium: Make) -> None:
    made = consortium(plan_of(rounds=3))
    leave = lambda: made.store.change_run_sites(RUN, remove=[B], quorum=2, at=made.clock.now())  # noqa: E731
    when(made, (Stage.OPENED, 2), leave)
    made.drive()
    assert [made.codes(index)[B] for index in (1, 2, 3)] == [None, None, "PF564"]


def test_site_joins_at_the_next_round(consortium: Make) -> None:
    made = consortium(plan_of(rounds=3))
    made.store.change_run_sites(RUN, remove=[C], quorum=2, at=made.clock.now())
    when(made, (Stage.OPENED, 2), lambda: made.store.change_run_sites(RUN, add=[C], quorum=2, at=made.clock.now()))
    made.drive()
    assert [made.codes(index)[C] for index in (1, 2, 3)] == ["PF564", "PF564", None]
    assert [event for event, _ in actions(made, "run.site_")] == ["run.site_removed", "run.site_added"]
