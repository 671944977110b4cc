"""`pathfed-server` as an operator meets it: exit statuses, JSON, and nothing half-written."""

import datetime
from pathlib import Path

import pytest
import typer

from pathfed_common import interrupts
from pathfed_common.errors import PathfedError
from pathfed_server import cli
from pathfed_server.transport.certificates import make_tls

STATUS = {kind.family: kind.exit_status for kind in PathfedError.__subclasses__()}
COMMANDS = (
    *(("init",), ("start",), ("rounds",), ("events",), ("invite",), ("audit",)),
    *(("sites", name) for name in ("add", "pending", "admit", "refuse", "approval", "revoke", "reinstate", "list")),
    *(("operators", name) for name in ("key", "add", "remove", "list")),
    *(("ca", name) for name in ("show", "renew", "rotate", "finish")),
    *(("plan", name) for name in ("check", "publish", "list", "key", "cosign", "collect")),
    ("encoder", "import"),
    ("lineage",),
    *(("quarantine", name) for name in ("list", "show", "release")),
    *(("log", name) for name in ("show", "checkpoint", "leaves", "verify")),
    *(("run", name) for name in ("start", "pause", "resume", "stop", "drain", "sites", "status", "report")),
    *(("release", name) for name in ("create", "list")),
    *(("notify", name) for name in ("status", "test")),
)


def fails(done, code: str) -> None:
    assert (done.code, done.status) == (code, STATUS[code[:3]]), done


def names(group) -> set[tuple[str, ...]]:
    found: set[tuple[str, ...]] = set()
    for name, command in group.commands.items():
        found |= {(name, *rest) for rest in names(command)} if hasattr(command, "commands") else {(name,)}
    return found


def test_the_commands_are_those_tested_here():
    assert names(typer.main.get_command(cli.app)) == set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_help_and_json(server_cli, command):
    done = server_cli(*command, "--help")
    assert done.status == 0
    assert "--json" in done.out


def test_an_operator_goes_from_init_to_a_planned_run(server_cli, tmp_path, plan_file, member):
    home = ("--home", tmp_path / "server", "--json")
    made = server_cli("init", "--consortium", "test", *home)
    assert made.status == 0
    assert Path(made.json["server_card"]).is_file()
    assert server_cli("plan", "check", plan_file, "--patients", 40, "--json").json["epsilon_at_1_sites"] > 0
    published = server_cli("plan", "publish", plan_file, *home)
    assert Path(published.json["signed_plan"]).is_file()
    digest = published.json["plan"]
    for name in ("site-a", "site-b"):
        site = member(name)
        assert server_cli("sites", "add", site.card, *home).json["site"] == name
        assert server_cli("sites", "approval", site.approve(digest), *home).json["plan"] == digest
    (plan,) = server_cli("plan", "list", *home).json
    assert plan["approved_by"] == ["site-a", "site-b"]
    assert server_cli("run", "start", digest[:20], "--name", "run-1", *home).json["state"] == "planned"
    fails(server_cli("run", "start", digest, "--name", "run-1", *home), "PF520")
    assert server_cli("run", "stop", "run-1", *home).json["state"] == "stopped"
    assert server_cli("run", "status", *home).json[0]["state"] == "stopped"
    assert server_cli("run", "resume", "run-1", *home).status == 0
    assert server_cli("run", "status", "run-1", *home).json["state"] == "planned"
    assert server_cli("rounds", "run-1", *home).json == []
    assert server_cli("sites", "revoke", "site-b", *home).status == 0
    assert [row["state"] for row in server_cli("sites", "list", *home).json] == ["enrolled", "revoked"]
    for command in (("sites", "list"), ("plan", "list"), ("run", "status"), ("rounds", "run-1")):
        people = server_cli(*command, *home[:2])
        assert people.status == 0
        assert people.out


@pytest.mark.parametrize(
    ("text", "code", "named"),
    [
        ("noise_multiplier = 0", "PF104", "privacy.noise_multiplier"),
        ("noise_multiplier = -1.0", "PF104", "greater than 0"),
        ("noise_multiplier = '1'", "PF103", "privacy.noise_multiplier"),
        ("noise_multiplier = 1.0\nsigma = 1", "PF102", "privacy.sigma"),
        ("noise_multiplier = ", "PF101", "not TOML"),
        ("noise_multiplier = 1.0\nunit = 'tile'", "PF104", "patient"),
    ],
)
def test_a_plan_with_a_fault_is_neither_checked_nor_published(server_cli, server_home, plan_file, text, code, named):
    plan_file.write_text(plan_file.read_text().replace("noise_multiplier = 1.0", text))
    out = plan_file.with_name("out.dsse")
    for command in (("plan", "check", plan_file), ("plan", "publish", plan_file, "--out", out, "--home", server_home.root)):
        done = server_cli(*command, "--json")
        fails(done, code)
        assert named in done.out
    assert not out.exists()
    assert server_cli("plan", "list", "--home", server_home.root, "--json").json == []


def test_a_plan_that_expects_more_patients_than_a_site_has_is_told(server_cli, plan_file):
    fails(server_cli("plan", "check", plan_file, "--patients", 3, "--json"), "PF105")


@pytest.mark.parametrize(
    "command",
    [
        ("start",),
        ("sites", "list"),
        ("plan", "list"),
        ("run", "status"),
        ("rounds", "run"),
        ("run", "report", "run"),
        ("run", "stop", "run"),
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("there", [False, True])
def test_a_home_that_is_missing_is_told_and_not_made(server_cli, tmp_path, command, there):
    home = tmp_path / "home"
    if there:
        home.mkdir()
    done = server_cli(*command, "--home", home, "--json")
    assert done.code in ("PF904", "PF906")
    assert done.status == 19
    assert (list(home.iterdir()) if there else home.exists()) in ([], False)


def test_a_home_that_exists_is_not_made_again(server_cli, server_home):
    fails(server_cli("init", "--home", server_home.root, "--json"), "PF904")


@pytest.mark.parametrize(
    "command",
    [
        ("run", "start", "sha256:", "--name", "Not A Name"),
        ("run", "stop", "../x"),
        ("rounds", "A b"),
        ("sites", "revoke", "Site A"),
        ("run", "report", ""),
    ],
    ids=" ".join,
)
def test_a_name_that_cannot_be_one_is_told(server_cli, server_home, command):
    fails(server_cli(*command, "--home", server_home.root, "--json"), "PF905")


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (("rounds", "none"), "PF510"),
        (("run", "stop", "none"), "PF510"),
        (("run", "report", "none"), "PF510"),
        (("sites", "revoke", "none"), "PF501"),
        (("run", "start", "abcd", "--name", "run"), "PF516"),
        (("sites", "add", "/nowhere.card"), "PF904"),
        (("sites", "approval", "/nowhere.dsse"), "PF904"),
        (("plan", "publish", "/nowhere.toml"), "PF904"),
    ],
)
def test_what_is_not_there_is_told(server_cli, server_home, command, code):
    fails(server_cli(*command, "--home", server_home.root, "--json"), code)


def test_a_key_that_others_may_read_stops_the_command(server_cli, server_home, plan_file):
    for name, command in (("evidence.pem", ("plan", "publish", plan_file)), ("tls.key", ("start",)), ("superexec.secret", ("start",))):
        key = server_home.root / "keys" / name
        key.chmod(0o644)
        fails(server_cli(*command, "--home", server_home.root, "--json"), "PF906")
        key.chmod(0o600)
    assert list(plan_file.parent.glob("*.dsse")) == []


def test_a_server_whose_certificate_has_expired_does_not_start(server_cli, server_home, monkeypatch):
    monkeypatch.setattr(interrupts, "end_on_terminate", lambda: None)  # this process's signals stay as they are
    old = make_tls("test", ["127.0.0.1"], now=datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=500))
    server_home.tls_certificate.write_bytes(old.certificate)
    done = server_cli("start", "--home", server_home.root, "--json")
    assert (done.code, done.status) == ("PF401", 14)
    assert not server_home.ports_file.exists()
    assert not server_home.logs.exists() or not list(server_home.logs.glob("superlink*")), "no process was started"
