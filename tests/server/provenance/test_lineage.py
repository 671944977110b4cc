"""Lineage: which states carry a site's updates, through runs that start from other runs, and what is said about undoing it."""

from typing import Any

from pathfed_common import digest
from pathfed_common.ids import RunName, SiteName
from pathfed_server.provenance.lineage import RunLine, can_be_undone, cannot_be_undone, sites_in, touched_by

A, B, C = SiteName("a"), SiteName("b"), SiteName("c")


def encoder(name: str) -> digest.Digest:
    return digest.of_bytes(name.encode())


def line(name: str, **changes: Any) -> RunLine:
    made: dict[str, Any] = {
        "run": RunName(name),
        "plan": digest.of_bytes(b"plan"),
        "open": False,
        "quorum": 2,
        "listed": (A, B, C),
        "committed": 4,
        "contributions": {A: (1, 2, 4), B: (1, 2, 3, 4)},
        "encoder": encoder(name),
        "starts_from": None,
        "releases": (),
    }
    return RunLine(**{**made, **changes})


def test_update_is_in_every_state_from_its_round_on() -> None:
    late = line("late", contributions={A: (3,), B: (1, 2, 3, 4)})
    (found,) = touched_by(A, [late])
    assert (found.rounds, found.first_state, found.states, found.through) == ((3,), 3, 2, None)
    assert touched_by(C, [late]) == []


def test_run_from_an_encoder_carries_all_that_is_in_it() -> None:
    first = line("first")
    second = line("second", starts_from=encoder("first"), contributions={B: (1,), C: (1,)}, releases=(encoder("r2"),))
    third = line("third", starts_from=encoder("second"), contributions={C: (1, 2)})
    other = line("other", starts_from=encoder("somebody else's"), contributions={C: (1,)})
    lines = [first, second, third, other]
    found = touched_by(A, lines)
    assert [(each.line.run, each.rounds, each.through, each.first_state, each.states) for each in found] == [
        ("first", (1, 2, 4), None, 1, 4),
        ("second", (), "first", 0, 5),
        ("third", (), "second", 0, 5),
    ]
    assert [each.line.run for each in touched_by(C, lines)] == ["second", "third", "other"]
    within = sites_in(second, lines)
    assert {site: [each.line.run for each in runs] for site, runs in within.items()} == {
        A: ["first"],
        B: ["first", "second"],
        C: ["second"],
    }
    assert list(sites_in(other, lines)) == [C]


def test_run_that_names_its_own_encoder_is_no_endless_story() -> None:
    strange = line("strange", starts_from=encoder("strange"))
    assert list(sites_in(strange, [strange])) == [A, B]
    assert touched_by(A, [strange])[0].through is None


def test_what_can_be_undone_is_that_it_goes_no_further() -> None:
    going = line("going", open=True, encoder=None)
    told = can_be_undone(A, revoked=False, lines=[going])
    assert told[0].startswith("Revoke the site")
    assert "going" in told[1]
    assert "has 2 sites, and a round needs 2: its rounds can still count" in told[2]
    assert "not released (going)" in told[3]
    told = can_be_undone(A, revoked=True, lines=[line("going", open=True, quorum=3), line("done", releases=(encoder("r"),))])
    assert "it was revoked" in told[0]
    assert "no longer count" in told[1]
    assert can_be_undone(C, revoked=True, lines=[line("done")]) == ["No further round asks the site: it was revoked."]


def test_what_cannot_be_undone_names_states_and_releases() -> None:
    told = cannot_be_undone(touched_by(A, [line("one", releases=(encoder("r1"), encoder("r2"))), line("two")]))
    assert told[0].startswith("8 committed states of 2 runs")
    assert told[1].startswith("2 releases")
    assert cannot_be_undone([]) == ["Nothing: no committed state has an update of the site in it."]
