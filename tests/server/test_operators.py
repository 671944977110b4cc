"""Who runs a command: nobody by name at first, then people with keys and roles, each in the audit trail."""

import stat
from pathlib import Path

import pytest
import typer

from pathfed_common.errors import PathfedError
from pathfed_common.provenance.keys import SigningKey
from pathfed_server import cli
from pathfed_server.operators import OPERATOR_VARIABLE

STATUS = {kind.family: kind.exit_status for kind in PathfedError.__subclasses__()}
#: Each command that somebody must be known for, with the least role; the arguments are such that it gets as far as asking who it is.
NEEDS = {
    "admin": (
        ("operators", "add", "new", SigningKey.generate().public.to_text()),
        ("operators", "remove", "ann"),
        ("ca", "renew"),
        ("ca", "rotate"),
        ("ca", "finish"),
    ),
    "operator": (
        ("invite", "north"),
        ("sites", "add", "CARD"),
        ("sites", "admit", "north", "0000"),
        ("sites", "refuse", "north"),
        ("sites", "approval", "PLAN"),
        ("sites", "revoke", "north"),
        ("plan", "publish", "PLAN"),
        ("plan", "collect", "PLAN"),
        ("run", "start", "00", "--name", "run-1"),
        ("run", "pause", "run-1"),
        ("run", "stop", "run-1"),
        ("run", "drain", "run-1"),
        ("run", "sites", "run-1", "--add", "south"),
        ("sites", "reinstate", "south"),
        ("quarantine", "release", "1", "--reason", "r"),
        ("run", "resume", "run-1"),
        ("notify", "test", "pager"),
        ("release", "create", "run-1", "--out", "OUT"),
        ("encoder", "import", "PLAN", "--preset", "vit_tiny_patch16_224"),
    ),
    "auditor": (
        ("sites", "pending"),
        ("sites", "list"),
        ("plan", "list"),
        ("run", "status"),
        ("run", "report", "run-1"),
        ("rounds", "run-1"),
        ("events",),
        ("notify", "status"),
        ("release", "list"),
        ("lineage",),
        ("quarantine", "list"),
        ("quarantine", "show", "1"),
        ("log", "show"),
        ("log", "checkpoint"),
        ("log", "leaves"),
        ("log", "verify"),
        ("operators", "list"),
        ("ca", "show"),
        ("audit",),
    ),
}
#: Nobody need be known for these: they make the home, run the service, or touch no server.
FREE = {("init",), ("start",), ("operators", "key"), ("plan", "check"), ("plan", "key"), ("plan", "cosign")}
RANK = ["auditor", "operator", "admin"]
ROLES = {"ada": "auditor", "otto": "operator"}


def fails(done, code: str) -> None:
    assert (done.code, done.status) == (code, STATUS[code[:3]]), done


@pytest.fixture
def people(server_cli, server_home, tmp_path, monkeypatch):
    """Ann the admin, Otto the operator, Ada the auditor; `people("otto")` makes the next commands his."""
    home = ("--home", server_home.root, "--json")
    keys = {name: tmp_path / f"{name}.pem" for name in ("ann", "otto", "ada", "stranger")}

    def become(name: str | None) -> None:
        if name is None:
            monkeypatch.delenv(OPERATOR_VARIABLE, raising=False)
        else:
            monkeypatch.setenv(OPERATOR_VARIABLE, str(keys[name]))

    become(None)
    public = {name: server_cli("operators", "key", path, "--json").json["public_key"] for name, path in keys.items()}
    for name, role in (("ann", "admin"), ("otto", "operator"), ("ada", "auditor")):
        assert server_cli("operators", "add", name, public[name], "--role", role, *home).status == 0
        become("ann")
    become(None)
    return become


@pytest.fixture
def given(server_home, plan_file, member, tmp_path):
    """Arguments with files in the place of their names."""
    place = {"PLAN": plan_file, "CARD": member("north").card, "OUT": tmp_path / "out"}
    return lambda command: (*(place.get(word, word) for word in command), "--home", server_home.root, "--json")


@pytest.mark.parametrize("role", NEEDS)
def test_every_command_asks_who_runs_it_and_whether_that_person_may(server_cli, people, given, role):
    for name in (None, "stranger", "ada", "otto"):
        people(name)
        for command in NEEDS[role]:
            done = server_cli(*given(command))
            if name not in ROLES:
                fails(done, "PF522")
            elif RANK.index(ROLES[name]) < RANK.index(role):
                fails(done, "PF523")
            else:
                # It may; what comes of it is another matter.
                assert done.status == 0 or done.code not in ("PF522", "PF523"), command


def test_the_table_above_has_every_command():
    def names(group, path=()):
        for name, command in group.commands.items():
            yield from names(command, (*path, name)) if hasattr(command, "commands") else [(*path, name)]

    asked = [words for commands in NEEDS.values() for words in commands]
    for name in set(names(typer.main.get_command(cli.app))) - FREE:
        assert any(words[: len(name)] == name for words in asked), f"{name}: open the store with operators.opened_by, and add it here"


def test_while_nobody_has_a_name_whoever_owns_the_home_acts(server_cli, server_home, monkeypatch):
    monkeypatch.delenv(OPERATOR_VARIABLE, raising=False)
    home = ("--home", server_home.root, "--json")
    assert server_cli("invite", "north", *home).status == 0
    assert [event["actor"] for event in server_cli("audit", *home).json] == ["operator"]


def test_each_action_stands_in_the_trail_with_the_persons_name(server_cli, server_home, people, plan_file, member):
    home = ("--home", server_home.root, "--json")
    people("otto")
    digest = server_cli("plan", "publish", plan_file, *home).json["plan"]
    for name in ("north", "south"):
        site = member(name)
        server_cli("sites", "add", site.card, *home)
        server_cli("sites", "approval", site.approve(digest), *home)
    server_cli("run", "start", digest, "--name", "run-1", *home)
    server_cli("run", "stop", "run-1", *home)
    server_cli("run", "resume", "run-1", *home)
    people("ann")
    server_cli("ca", "renew", *home)
    server_cli("sites", "revoke", "south", *home)
    people("ada")
    trail = server_cli("audit", *home).json
    assert [(event["actor"], event["action"]) for event in trail] == [
        ("operator", "operator.added"),
        ("operator:ann", "operator.added"),
        ("operator:ann", "operator.added"),
        ("operator:otto", "plan.published"),
        ("operator:otto", "site.enrolled"),
        ("operator:otto", "plan.approved"),
        ("operator:otto", "site.enrolled"),
        ("operator:otto", "plan.approved"),
        ("operator:otto", "run.planned"),
        ("operator:otto", "run.stopped"),
        ("operator:otto", "run.resumed"),
        ("operator:ann", "ca.server_renewed"),
        ("operator:ann", "site.revoked"),
    ]
    assert [event["action"] for event in server_cli("audit", "--actor", "operator:ann", "--after", 3, *home).json] == [
        "ca.server_renewed",
        "site.revoked",
    ]


def test_the_first_is_an_admin_and_the_last_admin_stays(server_cli, server_home, tmp_path, monkeypatch):
    home, key = ("--home", server_home.root, "--json"), tmp_path / "key.pem"
    monkeypatch.delenv(OPERATOR_VARIABLE, raising=False)
    public = server_cli("operators", "key", key, "--json").json["public_key"]
    fails(server_cli("operators", "add", "otto", public, *home), "PF523")
    server_cli("operators", "add", "ann", public, "--role", "admin", *home)
    monkeypatch.setenv(OPERATOR_VARIABLE, str(key))
    fails(server_cli("operators", "remove", "ann", *home), "PF523")
    fails(server_cli("operators", "remove", "nobody", *home), "PF522")


def test_a_removed_person_may_nothing_more_and_name_and_key_stay_taken(server_cli, server_home, people):
    home = ("--home", server_home.root, "--json")
    people("ann")
    rows = {row["operator"]: row for row in server_cli("operators", "list", *home).json}
    assert server_cli("operators", "remove", "otto", *home).status == 0
    assert server_cli("operators", "remove", "otto", *home).status == 0
    fails(server_cli("operators", "add", "otto", SigningKey.generate().public.to_text(), *home), "PF524")
    fails(server_cli("operators", "add", "other", rows["otto"]["key"], *home), "PF524")
    people("otto")
    fails(server_cli("sites", "list", *home), "PF522")


@pytest.mark.parametrize(
    ("name", "key"), [("Otto", None), ("../otto", None), ("otto", "no key"), ("otto", "ed25519:AAAA"), ("operator:ann", None)]
)
def test_a_name_or_key_that_is_none_is_refused(server_cli, server_home, name, key):
    public = key or SigningKey.generate().public.to_text()
    fails(server_cli("operators", "add", name, public, "--role", "admin", "--home", server_home.root, "--json"), "PF905")


def test_a_key_file_is_its_owners_alone_and_none_is_written_over(server_cli, tmp_path):
    path = tmp_path / "key.pem"
    made = server_cli("operators", "key", path, "--json").json
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert SigningKey.from_pem(path.read_bytes()).public.to_text() == made["public_key"]
    before = path.read_bytes()
    fails(server_cli("operators", "key", path, "--json"), "PF904")
    assert path.read_bytes() == before


@pytest.mark.parametrize("kind", ["missing", "open to others", "no key"])
def test_a_key_file_that_cannot_be_used_is_told(server_cli, server_home, people, tmp_path, kind):
    path: Path = tmp_path / "ann.pem"
    if kind == "missing":
        path.unlink()
    elif kind == "open to others":
        path.chmod(0o644)
    else:
        path.write_text("no key")
    people("ann")
    fails(server_cli("sites", "list", "--home", server_home.root, "--json"), "PF906")
