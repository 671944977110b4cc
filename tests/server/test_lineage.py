"""`pathfed-server lineage`: a withdrawal's reach, from the database and the records of a server's home."""

import pytest

from pathfed_common import digest
from pathfed_common.ids import RunName, SiteName
from pathfed_common.provenance import record
from pathfed_common.provenance.record import FileEntry, Manifest
from pathfed_server import app
from pathfed_server.db.sql_store import SqlStore
from pathfed_server.rounds.machine import RoundEvent
from pathfed_server.rounds.state import Checkpoint, Participation, ParticipationState, RoundOpening, RoundResult, RoundTimes

AT = 1_700_000_000.5


def state(run: str, index: int) -> Checkpoint:
    return Checkpoint(
        round_index=index,
        state=digest.of_value([run, index]),
        state_path="s",
        state_bytes=1,
        optimiser=digest.of_bytes(b"o"),
        optimiser_path="o",
        optimiser_bytes=1,
    )


def carry_out(home, plan, name: str, rounds: list[list[str]]) -> digest.Digest:
    """A finished run whose rounds admitted these sites, its record's manifest included; the exported encoder's digest."""
    run, encoder = RunName(name), digest.of_bytes(name.encode())
    with SqlStore(home.database_url) as store:
        store.begin_attempt(run, at=AT)
        store.commit_initial(run, 1, state(name, 0), at=AT)
        for index, sites in enumerate(rounds, start=1):
            base = state(name, index - 1).state
            store.open_round(
                RoundOpening(run=run, attempt=1, round_index=index, base_state=base, participations=(), offered_at=AT, deadline=AT)
            )
            envelopes = {SiteName(site): f"{name} {index} {site}".encode() for site in sites}
            result = RoundResult(
                run=run,
                attempt=1,
                round_index=index,
                plan=plan,
                base_state=base,
                checkpoint=state(name, index),
                participations=tuple(
                    Participation(
                        site=site,
                        state=ParticipationState.ADMITTED,
                        update=digest.of_bytes(envelope),
                        update_bytes=1,
                        statement=digest.of_bytes(envelope),
                    )
                    for site, envelope in sorted(envelopes.items())
                ),
                weights={site: 1 / len(sites) for site in sorted(envelopes)},
                offered_at=AT,
                deadline=AT,
                committed_at=AT + index,
                times=RoundTimes(),
            )
            for row in result.participations:
                store.note_participation(run, 1, index, row, at=AT)
            store.advance_round(run, 1, index, RoundEvent.ADMIT, at=AT)
            store.commit_round(result, envelopes)
        store.finish_run(run, 1, at=AT)
    folder = home.record(run)
    folder.mkdir(parents=True)
    files = (FileEntry(path=record.ENCODER, digest=encoder, size=1),)
    manifest = Manifest(run=run, plan=plan, server_key=home.evidence_key.public, rounds=len(rounds), files=files)
    (folder / record.MANIFEST).write_bytes(manifest.to_bytes(home.evidence_key))
    return encoder


@pytest.fixture
def history(server_home, plan_file, member):
    """A released run of sites a and b, and one of a, b and c that starts from its encoder and is not released."""
    members = [member(name) for name in ("site-a", "site-b", "site-c")]
    for site in members:
        app.add_site(server_home.root, site.card)
    first = app.publish_plan(server_home.root, plan_file, plan_file.with_suffix(".dsse"))
    with SqlStore(server_home.database_url) as store:
        store.create_run(RunName("first"), plan_digest=first.digest, sites=[site.name for site in members], at=AT)
    encoder = carry_out(server_home, first.digest, "first", [["site-a", "site-b"], ["site-b"], ["site-a", "site-b"]])
    second = first.model_copy(update={"encoder": first.encoder.model_copy(update={"init_from": encoder})})
    with SqlStore(server_home.database_url) as store:
        store.add_release(digest.of_bytes(b"release"), run=RunName("first"), at=AT)
        store.add_plan(second.digest, name=second.name, canonical=second.canonical_bytes(), signed=b"s", at=AT)
        store.create_run(RunName("second"), plan_digest=second.digest, sites=[site.name for site in members], at=AT + 1)
    carry_out(server_home, second.digest, "second", [["site-b", "site-c"]])
    return ("--home", server_home.root)


def test_a_sites_withdrawal_is_told_with_what_it_can_and_cannot_undo(server_cli, history):
    found = server_cli("lineage", "site-a", *history, "--json").json
    assert (found["site"], found["state"], found["revoked_at"]) == ("site-a", "enrolled", None)
    assert found["runs"] == [
        {
            "run": "first",
            "own_rounds": [1, 3],
            "through": None,
            "first_state": 1,
            "last_state": 3,
            "releases": [digest.of_bytes(b"release")],
        },
        {"run": "second", "own_rounds": [], "through": "first", "first_state": 0, "last_state": 1, "releases": []},
    ]
    assert found["can_be_undone"][0].startswith("Revoke the site")
    revoked = server_cli("sites", "revoke", "site-a", *history, "--json").json
    assert (revoked["state"], revoked["runs"], revoked["states"], len(revoked["releases"])) == ("revoked", ["first", "second"], 5, 1)
    (event,) = [row for row in server_cli("audit", *history, "--json").json if row["action"] == "site.revoked"]
    assert (event["subject"], event["detail"]) == ("site-a", {"updates": {"first": 2}})
    found = server_cli("lineage", "site-a", *history, "--json").json
    assert found["state"] == "revoked"
    assert found["can_be_undone"][0] == "No further round asks the site: it was revoked."
    assert found["cannot_be_undone"][0].startswith("5 committed states of 2 runs")
    assert found["cannot_be_undone"][1].startswith("1 releases")
    people = server_cli("lineage", "site-a", *history)
    for text in ("What can be undone", "What cannot be undone", "first", "5 committed states"):
        assert text in people.out


def test_a_release_names_the_sites_in_it_and_those_that_left(server_cli, history):
    release = digest.of_bytes(b"release")
    server_cli("sites", "revoke", "site-b", *history)
    for name in (release, release[:20], release.removeprefix("sha256:")[:9], "first"):
        found = server_cli("lineage", name, *history, "--json").json
        assert (found["run"], found["goes_back_to"]) == ("first", [])
        assert [(row["site"], row["state"], row["rounds"]) for row in found["sites"]] == [
            ("site-a", "enrolled", {"first": [1, 3]}),
            ("site-b", "revoked", {"first": [1, 2, 3]}),
        ]
    found = server_cli("lineage", "second", *history, "--json").json
    assert (found["release"], found["goes_back_to"]) == (None, ["first"])
    assert {row["site"]: row["rounds"] for row in found["sites"]} == {
        "site-a": {"first": [1, 3]},
        "site-b": {"first": [1, 2, 3], "second": [1]},
        "site-c": {"second": [1]},
    }
    assert "site-c" in server_cli("lineage", "second", *history).out


def test_without_a_name_every_site_is_listed(server_cli, history):
    rows = server_cli("lineage", *history, "--json").json
    assert [(row["site"], row["rounds"], row["runs"], row["states"], len(row["releases"])) for row in rows] == [
        ("site-a", 2, ["first", "second"], 5, 1),
        ("site-b", 4, ["first", "second"], 5, 1),
        ("site-c", 1, ["second"], 1, 0),
    ]
    assert "site-b" in server_cli("lineage", *history).out


@pytest.mark.parametrize("name", ["none", "sha256:", "", "sha256:ffff", "../x"])
def test_a_name_that_nothing_has_is_told(server_cli, history, name):
    assert server_cli("lineage", name, *history, "--json").code == "PF612"
