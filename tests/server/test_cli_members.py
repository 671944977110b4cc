"""Invitations, admissions, operators and the authority as commands, with their errors."""

import pytest
from command_fixtures import Done
from control_peer import Peer, enroll

from pathfed_common.errors import PathfedError
from pathfed_common.protocol.invitation import Invitation
from pathfed_common.provenance.keys import SigningKey
from pathfed_server.control import start_control
from pathfed_server.db.sql_store import SqlStore

STATUS = {kind.family: kind.exit_status for kind in PathfedError.__subclasses__()}


def fails(done: Done, code: str) -> None:
    assert (done.code, done.status) == (code, STATUS[code[:3]]), done


@pytest.fixture
def serving(server_home):
    with SqlStore(server_home.database_url) as store:
        listening = start_control(server_home, store)
        try:
            yield server_home
        finally:
            listening.stop(0)


def test_an_operator_goes_from_an_invitation_to_a_revocation(server_cli, serving):
    home, north = ("--home", serving.root, "--json"), Peer.make("north")
    invited = server_cli("invite", "north", *home).json
    assert Invitation.from_text(invited["invitation"]).site == "north"
    assert server_cli("sites", "pending", *home).json == []
    enroll(serving, north.request(invited["invitation"]))
    (waiting,) = server_cli("sites", "pending", *home).json
    assert (waiting["site"], waiting["fingerprint"], waiting["software"]) == ("north", north.fingerprint, "0.1.0")
    fails(server_cli("sites", "admit", "north", "0000 " * 8, *home), "PF421")
    assert server_cli("sites", "admit", "north", north.fingerprint, *home).json["site"] == "north"
    fails(server_cli("sites", "admit", "north", north.fingerprint, *home), "PF521")
    fails(server_cli("sites", "refuse", "north", *home), "PF521")
    (row,) = server_cli("sites", "list", *home).json
    assert (row["state"], row["reports"]) == ("enrolled", None)
    assert row["certificate_until_at"] > row["enrolled_at"]
    assert server_cli("sites", "revoke", "north", *home).status == 0
    fails(server_cli("invite", "north", *home), "PF518")
    actions = [event["action"] for event in server_cli("audit", "--subject", "north", *home).json]
    assert actions == ["site.invited", "site.asked", "site.enrolled", "site.admitted", "site.revoked"]
    for command in (("sites", "list"), ("sites", "pending"), ("audit",), ("ca", "show"), ("operators", "list")):
        people = server_cli(*command, *home[:2])
        assert (people.status, bool(people.out)) == (0, True)


@pytest.mark.parametrize("name", ["North", "../etc", "a/b", "", "a" * 64, "north\n"])
@pytest.mark.parametrize("command", [("invite",), ("sites", "admit"), ("sites", "refuse"), ("sites", "revoke")])
def test_a_name_that_is_none_reaches_neither_files_nor_database(server_cli, server_home, command, name):
    more = ("0000",) if command[-1] == "admit" else ()
    fails(server_cli(*command, name, *more, "--home", server_home.root, "--json"), "PF905")
    assert list((server_home.root / "sites").iterdir()) == []


@pytest.mark.parametrize("hours", ["0", "-1", "10000", "nan"])
def test_an_invitation_has_a_term_within_bounds(server_cli, server_home, hours):
    assert server_cli("invite", "north", "--hours", hours, "--home", server_home.root).status == 2


def test_the_authority_is_shown_renewed_and_replaced(server_cli, server_home):
    home = ("--home", server_home.root, "--json")
    first = server_cli("ca", "show", *home).json
    assert (first["rotating"], first["issues"]) == (False, first["server_certificate_from"])
    before = server_home.tls_certificate.read_bytes()
    assert server_cli("ca", "renew", *home).json["issues"] == first["issues"]
    assert server_home.tls_certificate.read_bytes() != before
    fails(server_cli("ca", "finish", *home), "PF420")
    rotating = server_cli("ca", "rotate", *home).json
    assert (rotating["rotating"], rotating["server_certificate_from"]) == (True, first["issues"])
    assert rotating["issues"] != first["issues"]
    for command in ("rotate", "renew"):
        fails(server_cli("ca", command, *home), "PF420")
    done = server_cli("ca", "finish", *home).json
    assert (done["rotating"], done["issues"], done["server_certificate_from"]) == (False, rotating["issues"], rotating["issues"])
    actions = [event["action"] for event in server_cli("audit", "--subject", "server", *home).json]
    assert actions == ["ca.server_renewed", "ca.rotation_begun", "invitations.withdrawn", "ca.rotation_finished"]


def test_a_finished_rotation_ends_invitations_that_pinned_the_old_authority(server_cli, serving):
    home = ("--home", serving.root, "--json")
    server_cli("ca", "rotate", *home)
    invitation = server_cli("invite", "north", *home).json["invitation"]
    server_cli("ca", "finish", *home)
    with SqlStore(serving.database_url) as store:
        assert [row.withdrawn_at is None for row in store.invitations()] == [False]
    fresh = Invitation.from_text(server_cli("invite", "north", *home).json["invitation"])
    assert fresh.ca_pin != Invitation.from_text(invitation).ca_pin


@pytest.mark.parametrize("missing", ["keys/ca.key", "ca.pem", "tls.pem"])
def test_an_authority_with_a_part_missing_says_which(server_cli, server_home, missing):
    (server_home.root / missing).unlink()
    done = server_cli("ca", "show", "--home", server_home.root, "--json")
    fails(done, "PF906" if missing.startswith("keys") else "PF904")
    assert done.json["error"]["where"].endswith(missing)


def test_an_authority_whose_parts_do_not_fit_is_told(server_cli, server_home):
    from control_peer import new_key

    from pathfed_server.transport.certificates import key_pem

    (server_home.root / "keys" / "ca.key").write_bytes(key_pem(new_key()))
    fails(server_cli("ca", "show", "--home", server_home.root, "--json"), "PF420")
    (server_home.root / "keys" / "ca.key").write_bytes(SigningKey.generate().to_pem())
    fails(server_cli("ca", "show", "--home", server_home.root, "--json"), "PF906")
