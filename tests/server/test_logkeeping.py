"""`pathfed-server log`: what an operator is shown, and that a changed database is told with its code."""

import sqlite3
from pathlib import Path

import pytest

from pathfed_common.provenance.log_checkpoint import cosign_checkpoint, log_key, open_checkpoint, origin_of
from pathfed_common.provenance.note import Note
from pathfed_server import app, logkeeping
from pathfed_server.db.sql_store import SqlStore


@pytest.fixture
def members(server_home, plan_file, member):
    """Three enrolled sites that approved the plan."""
    plan = app.publish_plan(server_home.root, plan_file, plan_file.with_suffix(".dsse"))
    found = [member(name) for name in ("site-a", "site-b", "site-c")]
    for site in found:
        app.add_site(server_home.root, site.card)
        app.add_word(server_home.root, site.approve(plan.digest))
    return found


def cosign(home, *sites) -> None:
    with SqlStore(home.database_url) as store:
        log = logkeeping.log_keeper(home, store)
        served = log.checkpoint(0)
        checkpoint = open_checkpoint(Note.from_bytes(served.note), log.key)
        for site in sites:
            log.cosign(site.name, served.size, cosign_checkpoint(checkpoint, site.name, site.key, at=1_700_000_000).to_line().encode())


def test_the_operator_sees_who_is_lacking_for_a_quorum(server_cli, server_home, members):
    home = ("--home", server_home.root, "--json")
    shown = server_cli("log", "show", *home).json
    assert (shown["leaves"], shown["enrolled"], shown["needed"]) == (7, ["site-a", "site-b", "site-c"], "2 of 3")
    assert (shown["quorum"], shown["quorum_up_to"], shown["cosigned"]) == (False, None, {})
    assert shown["lacking"][-1] == "checkpoint of 7: 0 of the 2 needed; not yet: site-a, site-b, site-c"
    cosign(server_home, members[0])
    shown = server_cli("log", "show", *home).json
    assert (shown["quorum"], shown["cosigned"]) == (False, {"site-a": 7})
    assert shown["lacking"][-1] == "checkpoint of 7: 1 of the 2 needed; not yet: site-b, site-c"
    cosign(server_home, members[1])
    shown = server_cli("log", "show", *home).json
    assert (shown["quorum"], shown["quorum_up_to"], shown["lacking"]) == (True, 7, [])
    assert server_cli("sites", "revoke", "site-c", *home).status == 0
    shown = server_cli("log", "show", *home).json
    assert (shown["leaves"], shown["quorum"], shown["quorum_up_to"], shown["cosigned"]) == (8, False, 7, {"site-a": 7, "site-b": 7})
    assert [line.split(":")[0] for line in shown["lacking"]] == ["a checkpoint that contains leaf 7", "checkpoint of 8"]
    people = server_cli("log", "show", *home[:2])
    assert "site-a 7, site-b 7" in people.out


def test_the_checkpoint_is_a_note_that_anybody_can_verify(server_cli, server_home, members, tmp_path):
    cosign(server_home, *members)
    file = tmp_path / "checkpoint.note"
    done = server_cli("log", "checkpoint", "--out", file, "--home", server_home.root)
    assert done.out.encode() == file.read_bytes()
    signed = Note.from_bytes(file.read_bytes())
    origin = origin_of("test")
    assert open_checkpoint(signed, log_key(origin, server_home.evidence_key.public)).size == 7
    assert len(signed.signatures) == 4
    assert server_cli("log", "checkpoint", "--home", server_home.root, "--json").json["checkpoint"] == done.out


def test_leaves_are_listed(server_cli, server_home, members):
    rows = server_cli("log", "leaves", "--start", "1", "--count", "3", "--home", server_home.root, "--json").json
    assert [(row["leaf"], row["kind"]) for row in rows] == [(1, "site-admitted"), (2, "plan-approved"), (3, "site-admitted")]
    assert rows[0]["says"]["evidence_key"] == members[0].key.public.to_text()
    assert "plan-approved" in server_cli("log", "leaves", "--home", server_home.root).out


def test_an_empty_log_is_told(server_cli, server_home):
    home = ("--home", server_home.root, "--json")
    assert server_cli("log", "show", *home).json["leaves"] == 0
    assert server_cli("log", "leaves", *home).json == []
    assert server_cli("log", "verify", *home).json == {"leaves": 0, "checkpoints": 0, "cosignatures": 0, "rows": 0}
    assert server_cli("log", "checkpoint", *home).code == "PF609"


@pytest.mark.parametrize("command", [("leaves", "--start", "-1"), ("leaves", "--count", "0"), ("leaves", "--count", "x")])
def test_numbers_out_of_bounds_are_refused(server_cli, server_home, command):
    assert server_cli("log", *command, "--home", server_home.root).status == 2


def test_a_home_that_is_not_there_is_told(server_cli, tmp_path):
    for command in ("show", "checkpoint", "leaves", "verify"):
        assert server_cli("log", command, "--home", tmp_path / "none", "--json").code == "PF904"


def changed(home, statement: str) -> None:
    with sqlite3.connect(Path(home.root) / "pathfed.db") as connection:
        for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
            connection.execute(f"DROP TRIGGER {name}")
        connection.execute(statement)


@pytest.mark.parametrize(
    ("statement", "code", "row"),
    [
        ("UPDATE approval SET declared_patients = 9 WHERE site = 'site-b'", "PF606", "approval site-b"),
        ("UPDATE site SET evidence_key = 'ed25519:x' WHERE name = 'site-a'", "PF606", "site site-a"),
        ("DELETE FROM approval WHERE site = 'site-c'", "PF606", "log_entry"),
        ("UPDATE log_entry SET kind = 'released' WHERE leaf_index = 3", "PF607", "log_entry 3"),
        ("UPDATE log_checkpoint SET note = x'00'", "PF607", "log_checkpoint 7"),
    ],
)
def test_a_changed_database_is_told_with_its_code(server_cli, server_home, members, statement, code, row):
    home = ("--home", server_home.root)
    cosign(server_home, members[0])
    done = server_cli("log", "verify", *home, "--json")
    assert (done.status, done.json) == (0, {"leaves": 7, "checkpoints": 1, "cosignatures": 1, "rows": 13})
    changed(server_home, statement)
    done = server_cli("log", "verify", *home, "--json")
    assert done.code == code
    assert row in done.json["error"]["where"]
    people = server_cli("log", "verify", *home)
    assert people.status == 16
    assert row.split(" ")[0] in people.out


def test_a_log_that_was_changed_after_it_was_signed_gets_no_further_checkpoint(server_cli, server_home, members):
    cosign(server_home, members[0])
    changed(server_home, "DELETE FROM log_entry WHERE leaf_index = 6")
    for command in ("show", "checkpoint"):
        assert server_cli("log", command, "--home", server_home.root, "--json").code == "PF607"
