"""What the real loop leaves in the audit trail is what people are told of, and what a run's status is made from."""

import pytest
from tests.server.rounds.consortium import NAMES, RUN, Consortium, Make
from tests.server.rounds.test_standing import late, plan_of, silent, with_nan

from pathfed_common.errors import RoundError
from pathfed_server.notifying.kinds import KINDS, Notice, notice_of
from pathfed_server.watching.following import view
from pathfed_server.watching.run_text import run_lines

A, B, C = NAMES


def notices(made: Consortium) -> list[Notice]:
    return [told for row in made.store.audit_events() if (told := notice_of(row)) is not None]


def test_a_run_that_fails_is_told_with_every_reason_and_its_status_says_so(consortium: Make) -> None:
    made = consortium(plan_of())
    made.sites.conduct |= {B: with_nan, C: silent}
    with pytest.raises(RoundError):
        made.drive(suspend_after=1)
    told = notices(made)
    by_kind = {notice.kind: notice for notice in reversed(told)}  # the first of each
    assert set(by_kind) == {"site.refused", "site.late", "round.failed", "quorum.lost", "site.suspended", "run.failed"}
    assert all(notice.run == RUN for notice in told)
    assert all(notice.round == 1 for notice in told if notice.kind not in ("site.suspended", "run.failed"))
    assert {notice.site for notice in told if notice.kind == "site.late"} == {C}
    assert [(by_kind[kind].site, by_kind[kind].code) for kind in ("site.refused", "site.late")] == [(B, "PF507"), (C, "PF515")]
    assert by_kind["site.suspended"].site == B
    assert by_kind["round.failed"].code == "PF503"
    found = view(made.store, RUN, now=made.clock.now())
    assert (found.state, found.committed, found.round_s) == ("failed", 0, None)
    assert {trouble.kind for trouble in found.troubles} == {"round.failed", "run.failed"}
    assert max(map(len, run_lines(found, now=made.clock.now()))) <= 100


def test_a_run_that_finishes_is_told_and_so_is_an_update_that_came_too_late(consortium: Make) -> None:
    made = consortium(plan_of(rounds=2))
    made.sites.conduct[C] = late
    made.drive()
    told = notices(made)
    assert [(notice.kind, notice.site, notice.code) for notice in told] == [("site.late", C, "PF561")] * 2 + [("run.finished", None, None)]
    found = view(made.store, RUN, now=made.clock.now())
    assert (found.state, found.committed, found.planned, found.ends_at) == ("finished", 2, 2, None)
    assert found.epsilon is not None
    assert found.round_s is not None


def test_every_kind_but_a_notification_given_up_comes_from_rounds() -> None:
    shown = {"site.refused", "site.late", "round.failed", "quorum.lost", "site.suspended", "run.failed", "run.finished"}
    assert set(KINDS) - shown == {"notification.failed"}
