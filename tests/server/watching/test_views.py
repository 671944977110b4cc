"""What a run's rows say of it: figures, words and lines, without a database."""

import pytest
from played_run import BEGIN, PLAN, RUN, SITES

from pathfed_common import digest
from pathfed_common.errors import HostError
from pathfed_server.db.rows import AuditRow, PlanRow
from pathfed_server.db.watch_rows import Outcome, RoundFacts, RunFacts
from pathfed_server.watching import event_lines, round_rows, run_text, run_view
from pathfed_server.watching.choosing import chosen, start_of
from pathfed_server.watching.spans import duration, typed_moment

ROW = PlanRow(digest=PLAN.digest, name=PLAN.name, canonical=PLAN.canonical_bytes(), signed=b"", published_at=BEGIN)
STATE = digest.of_bytes(b"state")


def outcome(site, state="admitted", code=None, received_at=BEGIN + 9) -> Outcome:
    return Outcome(site=site, state=state, code=code, offered_at=BEGIN, received_at=received_at, rounding=None if code else 0.5)


def round_of(index, state="committed", committed_at=None, **changed) -> RoundFacts:
    values = {
        "index": index,
        "state": state,
        "attempt": 1,
        "code": None,
        "base_state": STATE,
        "next_state": None,
        "offered_at": BEGIN + (index - 1) * 100,
        "deadline": BEGIN + index * 600,
        "committed_at": committed_at,
        "outcomes": tuple(outcome(site) for site in SITES),
    }
    return RoundFacts(**{**values, **changed})


def run_of(*rounds, state="running", epsilon=None, committed=None, **changed) -> RunFacts:
    values = {
        "run": RUN,
        "state": state,
        "code": None,
        "attempt": 1,
        "failures": 0,
        "planned_at": BEGIN,
        "started_at": BEGIN,
        "ended_at": None,
        "plan": ROW,
        "committed": sum(each.committed_at is not None for each in rounds) if committed is None else committed,
        "rounds": rounds,
        "epsilon": epsilon or {},
    }
    return RunFacts(**{**values, **changed})


def event(action, subject=RUN, seq=1, actor="server", **detail) -> AuditRow:
    return AuditRow(seq=seq, at=BEGIN, actor=actor, action=action, subject=subject, detail=detail)


def test_the_pace_is_the_median_from_commit_to_commit_and_gives_the_end():
    done = [round_of(1, committed_at=BEGIN + 100), round_of(2, committed_at=BEGIN + 900), round_of(3, committed_at=BEGIN + 1010)]
    view = run_view.view_of(run_of(*done), [], now=BEGIN + 1020)
    assert (view.committed, view.planned, view.last_commit_at) == (3, 4, BEGIN + 1010)
    assert view.round_s == 110.0  # of 100, 800 and 110
    assert view.ends_at == BEGIN + 1120
    late = run_view.view_of(run_of(*done), [], now=BEGIN + 5000)
    assert late.ends_at == BEGIN + 5000
    assert run_view.view_of(run_of(*done[:1]), [], now=BEGIN + 100).ends_at == BEGIN + 100 + 3 * 100


@pytest.mark.parametrize("state", ["finished", "failed", "stopped", "paused"])
def test_a_run_that_does_not_go_on_has_no_end_ahead(state):
    assert run_view.view_of(run_of(round_of(1, committed_at=BEGIN + 100), state=state), [], now=BEGIN).ends_at is None


def test_before_the_first_commit_nothing_is_guessed():
    view = run_view.view_of(run_of(round_of(1, "collecting")), [], now=BEGIN)
    assert (view.round_s, view.ends_at, view.last_commit_at, view.epsilon) == (None, None, None, None)
    assert run_view.view_of(run_of(), [], now=BEGIN).round is None


def test_the_privacy_spent_is_the_least_and_the_most_that_sites_state():
    view = run_view.view_of(run_of(epsilon=dict(zip(SITES, (0.31, 0.12, 0.2), strict=True))), [], now=BEGIN)
    assert (view.epsilon, view.epsilon_limit, view.delta) == ((0.12, 0.31), 4.0, PLAN.privacy.delta)


def present() -> run_view.RunView:
    outcomes = (
        outcome(SITES[0]),
        outcome(SITES[1], "refused", "PF507"),
        outcome(SITES[2], "offered", received_at=None),
        outcome("university-hospital-far-away", "excluded", "PF518", received_at=None),
    )
    done = round_of(12, committed_at=BEGIN + 1200)
    now = round_of(13, "collecting", attempt=2, offered_at=BEGIN + 1210, deadline=BEGIN + 1810, outcomes=outcomes)
    facts = run_of(done, now, committed=12, epsilon=dict.fromkeys(SITES, 0.25), attempt=3, failures=1)
    trouble = event("round.failed", seq=77, round=13, code="PF503", sites={SITES[0]: "PF515"})
    return run_view.view_of(facts, [trouble], now=BEGIN + 1300)


def test_a_run_is_told_in_lines_that_fit_a_terminal():
    lines = run_text.run_lines(present(), now=BEGIN + 1300)
    text = "\n".join(lines)
    assert max(map(len, lines)) <= 100
    for told in (
        "lung-1: running",
        "12 of 4 committed, the last",
        "(1 min 40 s ago)",
        "epsilon 0.25 of 4 spent",
        "13: collecting, offer 2, deadline in 8 min 30 s",
        "refused     PF507",
        "excluded    PF518",
        "round 13 failed: PF503",
        "do: ",
        "3, failed attempts at this round: 1",
    ):
        assert told in text, told
    assert "past its deadline" in "\n".join(run_text.run_lines(present(), now=BEGIN + 2000))


def test_for_scripts_everything_is_a_json_value_and_a_site_is_found_by_its_name():
    told = run_view.for_scripts(present())
    assert told["epsilon"] == {"least": 0.25, "most": 0.25}
    assert told["round"]["sites"][SITES[1]] == {
        "state": "refused",
        "code": "PF507",
        "offered_at": BEGIN,
        "received_at": BEGIN + 9,
        "rounding": None,
    }
    assert told["troubles"][0]["code"] == "PF503"
    assert told["troubles"][0]["do"]


def test_a_round_is_a_row_with_what_it_took_and_why_sites_are_missing():
    outcomes = (
        outcome(SITES[0]),
        outcome(SITES[1], "refused", "PF507"),
        outcome(SITES[2], "refused", "PF507"),
        outcome("x", "excluded", "PF518"),
    )
    ((facts, took),) = round_rows.timed([round_of(1, committed_at=BEGIN + 90, outcomes=outcomes)])
    row = round_rows.for_people(facts, took, 200.0)
    assert (row["took"], row["admitted"], row["not"]) == ("1 min 30 s", "1 of 3", "PF507 x2")
    assert row["rounding"] == "0.0025"
    told = round_rows.for_scripts(facts, took, 200.0)
    assert (told["round"], told["seconds"], told["asked"], told["admitted"]) == (1, 90.0, 3, 1)
    assert told["wire_rounding"] == 0.0025
    assert told["sites"]["x"]["code"] == "PF518"
    assert round_rows.timed([round_of(1, "failed")])[0][1] is None


@pytest.mark.parametrize(
    ("row", "run", "round_", "site", "code"),
    [
        (event("round.failed", round=4, code="PF503"), RUN, 4, None, "PF503"),
        (event("site.refused", SITES[0], run=RUN, round=4, code="PF507"), RUN, 4, SITES[0], "PF507"),
        (event("site.admitted", SITES[0]), None, None, SITES[0], None),
        (event("plan.published", "sha256:00", name="x"), None, None, None, None),
        (event("quorum.lost", round=True, code=7, site=["x"]), RUN, None, None, None),
    ],
)
def test_an_event_has_the_same_fields_whatever_its_kind(row, run, round_, site, code):
    facts = event_lines.facts_of(row)
    assert (facts.id, facts.kind, facts.run, facts.round, facts.site, facts.code) == (1, row.action, run, round_, site, code)
    assert event_lines.for_scripts(row)["detail"] == row.detail


def test_an_event_is_one_line_with_its_number_first():
    line = event_lines.for_people(event("site.refused", SITES[1], seq=153, run=RUN, round=4, code="PF507"))
    assert line.split()[0] == "153"
    assert f"{RUN} round 4 {SITES[1]}  PF507" in line
    assert len(line) <= 100
    assert "PF507 An update" in event_lines.for_people(event("run.failed", code="PF507"))
    assert "by operator:ann" in event_lines.for_people(event("run.stopped", actor="operator:ann"))
    assert "PF999" in event_lines.for_people(event("run.failed", code="PF999"))
    assert f"{SITES[0]} PF515" in event_lines.for_people(event("round.failed", round=1, code="PF503", sites={SITES[0]: "PF515"}))


@pytest.mark.parametrize(
    ("seconds", "told"), [(0.25, "0.2 s"), (59.4, "59 s"), (61, "1 min 1 s"), (3600, "1 h 0 min"), (90_000, "1 d 1 h")]
)
def test_a_length_of_time_is_told_in_its_two_largest_units(seconds, told):
    assert duration(seconds) == told


@pytest.mark.parametrize(
    ("text", "at"),
    [
        ("90s", 9_910.0),
        ("2h", 2_800.0),
        ("1970-01-01T01:00", 3_600.0),
        ("1970-01-01T01:00:00+01:00", 0.0),
        ("1970-01-02", 86_400.0),
    ],
)
def test_a_time_is_typed_as_a_date_or_as_so_long_ago(text, at):
    assert typed_moment(text, now=10_000.0) == at
    assert start_of(text, now=10_000.0) == (0, at)


def test_a_number_resumes_after_that_event():
    assert start_of("153", now=0.0) == (153, None)
    assert start_of(None, now=0.0) == (0, None)


@pytest.mark.parametrize("text", ["", "yesterday", "-1", "1e3", "5 h", "٣", "99999999999999999999", "2026-13-01"])
def test_a_start_that_is_neither_number_nor_time_is_told(text):
    with pytest.raises(HostError, match="PF905"):
        start_of(text, now=0.0)


@pytest.mark.parametrize("kind", ["", "Round", "round.", "round.failed.x", "*", "round failed"])
def test_a_kind_that_cannot_be_one_is_told(kind):
    with pytest.raises(HostError, match="PF905"):
        chosen(None, [kind], None)


def test_events_are_chosen_by_kind_family_run_and_time():
    rows = [event("round.failed", seq=1), event("run.failed", seq=2), event("round.failed", "other", seq=3)]

    def numbers(*wanted):
        return [row.seq for row in rows if chosen(*wanted)(row)]

    assert numbers(None, [], None) == [1, 2, 3]
    assert numbers(None, ["round"], None) == [1, 3]
    assert numbers(RUN, ["round.failed"], None) == [1]
    assert numbers(RUN, [], BEGIN + 1) == []
