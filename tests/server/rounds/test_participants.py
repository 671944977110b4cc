"""Who takes part, and the code of who does not."""

from dataclasses import replace

import pytest
from tests.server.rounds.consortium import KEYS, NAMES, RUN, make_plan

from pathfed_common.errors import PlanError
from pathfed_common.plan import Plan
from pathfed_server.rounds.participants import Choice, choose
from pathfed_server.rounds.state import Candidate, ParticipationState, SiteState

A, B, C = NAMES
PLAN = make_plan(site_weights={"b-hospital": 2.0})


def candidate(site: str, **changes: object) -> Candidate:
    made = Candidate(
        site=NAMES[[*NAMES].index(site)],  # type: ignore[arg-type]
        state=SiteState.ENROLLED,
        evidence_key=KEYS[A].public.to_text(),
        declared_patients=40,
        reply_slots=True,
        approval=b"approval",
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def chosen(plan: Plan, candidates: list[Candidate], round_index: int = 1) -> Choice:
    return choose(plan, candidates, run=RUN, round_index=round_index)


def test_approved_enrolled_sites_take_part_in_name_order_with_their_weights() -> None:
    choice = chosen(PLAN, [candidate(C), candidate(A), candidate(B, declared_patients=80)])
    assert [(each.site, each.weight, each.mechanism.sampling_rate) for each in choice.participants] == [
        (A, 1.0, 0.2),
        (B, 2.0, 0.1),
        (C, 1.0, 0.2),
    ]
    assert choice.participants[0].key == KEYS[A].public
    assert choice.excluded == ()


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"state": SiteState.REVOKED}, "PF518"),
        ({"state": SiteState.REVOKED, "approval": None}, "PF518"),
        ({"approval": None, "declared_patients": None, "reply_slots": None}, "PF407"),
        ({"declared_patients": 7}, "PF303"),
        ({"revoked": True}, "PF530"),
        ({"suspended": True}, "PF565"),
        ({"left": True}, "PF564"),
        ({"left": True, "state": SiteState.REVOKED}, "PF564"),
        ({"suspended": True, "state": SiteState.REVOKED}, "PF518"),
        ({"revoked": True, "approval": None, "declared_patients": None}, "PF530"),
    ],
)
def test_others_are_named_with_the_reason(changes: dict[str, object], code: str) -> None:
    choice = chosen(PLAN, [candidate(A), candidate(B, **changes)])
    assert [each.site for each in choice.participants] == [A]
    assert [(each.site, each.state, each.code, each.offered_at) for each in choice.excluded] == [
        (B, ParticipationState.EXCLUDED, code, None)
    ]


def test_site_with_exactly_the_expected_patients_takes_part_with_rate_one() -> None:
    choice = chosen(PLAN, [candidate(A, declared_patients=8)])
    assert choice.participants[0].mechanism.sampling_rate == 1.0


def test_sites_beyond_the_plans_number_wait_for_their_turn() -> None:
    plan = PLAN.model_copy(update={"rounds": PLAN.rounds.model_copy(update={"ask_at_most": 2})})
    asked: dict[str, int] = dict.fromkeys(NAMES, 0)
    for index in range(1, 7):
        choice = chosen(plan, [candidate(name) for name in NAMES], index)
        assert [(each.site, each.state, each.code) for each in choice.excluded] == [
            (name, ParticipationState.EXCLUDED, "PF562") for name in NAMES if name not in {each.site for each in choice.participants}
        ]
        for each in choice.participants:
            asked[each.site] += 1
    assert set(asked.values()) == {4}
    assert len(chosen(plan, [candidate(A), candidate(B), candidate(C, suspended=True)]).participants) == 2


def test_mechanism_holds_the_plans_constants() -> None:
    made = PLAN.mechanism(40)
    privacy = PLAN.privacy
    assert (made.noise_multiplier, made.clip_norm, made.expected_patients, made.figure_share, made.loss_bound) == (
        privacy.noise_multiplier,
        privacy.clip_norm,
        privacy.expected_patients,
        privacy.figure_share,
        privacy.loss_bound,
    )
    with pytest.raises(PlanError, match="PF105"):
        PLAN.mechanism(7)
