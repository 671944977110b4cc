"""Operators sign a plan one after another, each where their key is, and the published plan takes the signatures up."""

import pytest

from pathfed_common.provenance import cosigned
from pathfed_common.provenance.keys import VerifyKey
from pathfed_server.db.sql_store import SqlStore
from pathfed_server.home import ServerHome


@pytest.fixture
def published(server_cli, tmp_path, plan_file):
    """A server's home, and its signed plan's file."""
    home, signed = tmp_path / "server", tmp_path / "plan.dsse"
    assert server_cli("init", "--home", home, "--json").status == 0
    assert server_cli("plan", "publish", plan_file, "--out", signed, "--home", home, "--json").status == 0
    return home, signed


@pytest.fixture
def operator(server_cli, tmp_path):
    """Make an operator's key; its options, and its public half."""

    def make(name: str):
        (tmp_path / "words").write_text("correct horse\n")
        options = ["--passphrase-from", tmp_path / "words"]
        made = server_cli("plan", "key", "--out", tmp_path / f"{name}.pem", *options, "--json")
        return ["--key", tmp_path / f"{name}.pem", *options], VerifyKey.from_text(made.json["key"])

    return make


def test_two_operators_sign_and_the_published_plan_has_both(server_cli, published, operator, tmp_path):
    home, signed = published
    (anna, anna_key), (ben, ben_key) = operator("anna"), operator("ben")
    first = server_cli("plan", "cosign", signed, *anna, "--out", tmp_path / "of-anna.dsse", "--json")
    assert (first.status, first.json["signed_by"]) == (0, anna_key.to_text())
    second = server_cli("plan", "cosign", signed, *ben, "--json")  # each has the operator's file, neither the other's
    assert second.json["file"] == str(signed)
    for file, count in ((tmp_path / "of-anna.dsse", 2), (signed, 3), (signed, 3)):
        done = server_cli("plan", "collect", file, "--home", home, "--json")
        assert (done.status, done.json["signatures"]) == (0, count)
    with SqlStore(ServerHome(home).database_url) as store:
        (row,) = store.plans()
        assert cosigned.parse(row.signed).signed_by([anna_key, ben_key]) == {anna_key.key_id, ben_key.key_id}
        assert [event.action for event in store.audit_events()].count("plan.cosigned") == 2


def test_what_is_no_plan_or_not_published_here_is_refused(server_cli, published, operator, tmp_path, plan_file):
    home, signed = published
    key, _ = operator("anna")
    before = plan_file.read_bytes()
    assert server_cli("plan", "cosign", plan_file, *key, "--json").code == "PF106"
    assert plan_file.read_bytes() == before
    assert server_cli("plan", "cosign", home / "server-card.dsse", *key, "--json").code == "PF106"
    assert server_cli("plan", "cosign", tmp_path / "none", *key, "--json").code == "PF904"
    assert server_cli("plan", "cosign", signed, "--key", signed, "--json").code == "PF906"
    other = tmp_path / "other"
    assert server_cli("init", "--home", other, "--json").status == 0
    assert server_cli("plan", "collect", signed, "--home", other, "--json").code == "PF516"
    (tmp_path / "words").write_text("another horse\n")
    assert server_cli("plan", "cosign", signed, *key, "--json").code == "PF906"
    assert server_cli("plan", "key", "--out", tmp_path / "anna.pem", *key[2:], "--json").code == "PF904"
