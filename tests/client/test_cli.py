"""`pathfed-site` as a hospital's IT meets it: exit statuses, JSON, and nothing half-written."""

import csv
import io
import json
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import typer
from answering_site import LocalBulk
from control_server import ControlServer

from pathfed_client import cli
from pathfed_client.egress.entry import EgressKind, Outgoing
from pathfed_client.io.egress_log import EgressLog
from pathfed_client.io.ledger_head import site_ledger
from pathfed_client.io.site_store import SiteStore
from pathfed_common import digest
from pathfed_common.errors import PathfedError
from pathfed_common.ids import run_name
from pathfed_common.privacy.accounting import PrivacyEvent
from pathfed_common.protocol import control_pb2 as pb
from pathfed_local.generator import slide_bytes

STATUS = {kind.family: kind.exit_status for kind in PathfedError.__subclasses__()}
COMMANDS = (
    *("init", "doctor", "patients", "scan", "inspect", "start", "status", "ledger", "withdraw", "egress", "enroll", "keys"),
    *("plans", "show", "approve", "reject", "revoke", "stop", "resume", "approvers"),
)
GROUPS = {"ledger": ("show", "verify"), "approvers": ("add", "list", "remove"), "keys": ("show", "rotate")}


def fails(done, code: str) -> None:
    """The code as one JSON value, and its family's exit status."""
    assert (done.code, done.status) == (code, STATUS[code[:3]]), done


def init_arguments(world, home: Path, **changes: object) -> list[object]:
    options = {
        "--name": "site-a",
        "--slides": world.slides,
        "--patients": world.patients,
        "--server-card": world.card,
        "--home": home,
        **{f"--{key.replace('_', '-')}": value for key, value in changes.items()},
    }
    return ["init", *(part for pair in options.items() for part in pair), "--json"]


@pytest.fixture
def own_slides(world, tmp_path):
    """A world of its own whose slides and list a test may change."""
    from dataclasses import replace

    mine = replace(world, root=tmp_path / "world")
    shutil.copytree(world.root, mine.root)
    return mine


def list_rows(path: Path, rows: list[list[str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def test_the_commands_are_those_the_documentation_names():
    assert tuple(sorted(typer.main.get_command(cli.app).commands)) == tuple(sorted(COMMANDS))  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "command",
    [*(name for name in COMMANDS if name not in GROUPS), *(f"{group} {name}" for group, names in GROUPS.items() for name in names)],
)
def test_every_command_has_help_and_json(site_cli, command):
    done = site_cli(*command.split(), "--help")
    assert done.status == 0
    assert "--json" in done.out
    assert "--home" in done.out


def test_the_installed_command_is_this_one():
    done = subprocess.run([Path(sys.executable).parent / "pathfed-site", "--help"], capture_output=True, text=True, check=True)
    assert all(command in done.stdout for command in COMMANDS)


def test_a_site_goes_from_init_to_approval(world, site_cli, tmp_path):
    home = tmp_path / "home"
    made = site_cli(*init_arguments(world, home))
    assert made.status == 0
    assert Path(made.json["site_card"]).is_file()
    scanned = site_cli("scan", world.signed_plan, "--home", home, "--json")
    assert (scanned.status, scanned.json["patients"], scanned.json["slides_read"]) == (0, 5, 5)
    again = site_cli("scan", world.signed_plan, "--home", home, "--json")
    assert again.json["slides_read"] == 0
    approved = site_cli("approve", world.signed_plan, "--patients-at-least", 4, "--home", home, "--json")
    assert (approved.status, approved.json["plan"]) == (0, world.plan.digest)
    assert Path(approved.json["approval"]).is_file()
    status = site_cli("status", "--home", home, "--json")
    assert (status.status, status.json["plans"][0]["digest"]) == (0, world.plan.digest)
    ledger = site_cli("ledger", "show", "--home", home, "--json")
    assert (ledger.status, ledger.json["epsilon"], ledger.json["entries"]) == (0, 0.0, [])
    for command in (["status"], ["ledger", "show"], ["ledger", "verify"], ["scan", world.signed_plan]):
        people = site_cli(*command, "--home", home)
        assert people.status == 0
        assert people.out


def test_a_site_enrols_with_nothing_but_an_invitation(world, site_cli, tmp_path):
    home = tmp_path / "home"
    arguments = init_arguments(world, home)
    at = arguments.index("--server-card")
    made = site_cli(*arguments[:at], *arguments[at + 2 :])
    assert made.status == 0
    for command in (["start"], ["scan", world.signed_plan], ["approve", world.signed_plan, "--patients-at-least", 4]):
        fails(site_cli(*command, "--home", home, "--json"), "PF430")
    shown = site_cli("keys", "show", "--home", home, "--json")
    with ControlServer().running() as server:
        asked = site_cli("enroll", server.invitation("site-a"), "--no-wait", "--home", home, "--json")
        assert (asked.status, asked.json["admitted"], asked.json["fingerprint"]) == (0, False, shown.json["enrolment"])
        server.state = pb.EnrollReply.ADMITTED
        done = site_cli("enroll", server.invitation("site-a"), "--home", home, "--json")
        assert (done.status, done.json["admitted"]) == (0, True)
        fails(site_cli("enroll", "pathfed1.xyz", "--home", home, "--json"), "PF411")
        fails(site_cli("enroll", server.invitation("site-b"), "--home", home, "--json"), "PF915")
        people = site_cli("enroll", server.invitation("site-a"), "--home", home)
        assert (people.status, "Enrolled" in people.out) == (0, True)
        fails(site_cli("keys", "rotate", "evidence", "--home", tmp_path / "nowhere", "--json"), "PF904")
        assert site_cli("keys", "rotate", "everything", "--home", home).status == 2
        rotated = site_cli("keys", "rotate", "flower", "--home", home, "--json")
        assert (rotated.status, rotated.json["flower"] != shown.json["flower"]) == (0, True)
        assert (rotated.json["tls"], rotated.json["evidence"]) == (shown.json["tls"], shown.json["evidence"])
    after = site_cli("keys", "show", "--home", home, "--json")
    assert [after.json[name] for name in ("tls", "evidence")] == [shown.json[name] for name in ("tls", "evidence")]
    assert after.json["certificate_until_at"] > 0


@pytest.mark.parametrize("command", [["keys", "show"], ["keys", "rotate", "tls"], ["enroll", "pathfed1.xyz"]])
def test_commands_about_keys_need_a_home(site_cli, tmp_path, command):
    fails(site_cli(*command, "--home", tmp_path / "nowhere", "--json"), "PF904")
    assert not (tmp_path / "nowhere").exists()


def test_showing_the_ledger_loads_no_slow_library(copy_home):
    """torch, the accountants and Flower take seconds; a command that answers at once needs none of them."""
    home = copy_home()
    with closing(SiteStore(home.database)) as store:
        ledger = site_ledger(store, home.evidence_key, home.policy, home.run_secrets)
        ledger.charge(
            release_id=digest.of_bytes(b"release"),
            plan=digest.of_bytes(b"plan"),
            run=run_name("a"),
            round_index=1,
            event=PrivacyEvent(sampling_rate=0.1, noise_multiplier=2.0, steps=1),
            plan_delta=1e-6,
            plan_limit=100.0,
            now=1_800_000_000.0,
        )
    program = (
        "import sys; from pathfed_client.cli import app\n"
        f"app(['ledger', 'show', '--json', '--home', {str(home.root)!r}], standalone_mode=False)\n"
        "loaded = {'torch', 'opacus', 'dp_accounting', 'scipy', 'flwr', 'openslide'} & set(sys.modules)\n"
        "assert not loaded, loaded"
    )
    shown = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert '"epsilon"' in shown.stdout


def test_a_ledger_is_verified_against_heads_from_outside(site_cli, copy_home, tmp_path):
    home = copy_home()
    with closing(SiteStore(home.database)) as store:
        ledger = site_ledger(store, home.evidence_key, home.policy, home.run_secrets)
        for number in (1, 2):
            ledger.charge(
                release_id=digest.of_value(number),
                plan=digest.of_value("plan"),
                run=run_name("run"),
                round_index=number,
                event=PrivacyEvent(sampling_rate=0.1, noise_multiplier=2.0, steps=1),
                plan_delta=1e-5,
                plan_limit=10.0,
                now=1.0,
            )
        first = digest.of_bytes(store.entries()[0])
    asked = ["ledger", "verify", "--home", home.root, "--heads", tmp_path / "heads", "--json"]
    (tmp_path / "heads").write_text(f"{home.name} 1 {first}\n", encoding="utf-8")
    done = site_cli(*asked)
    assert (done.status, done.json["releases"], done.json["heads_compared"]) == (0, 2, 1)
    (tmp_path / "heads").write_text(f"{home.name} 3 {first}\n", encoding="utf-8")
    fails(site_cli(*asked), "PF309")
    (tmp_path / "heads").write_text(f"{home.name} 2 {first}\n", encoding="utf-8")
    fails(site_cli(*asked), "PF309")
    (tmp_path / "heads").write_text("", encoding="utf-8")
    fails(site_cli(*asked), "PF905")
    (home.run_secrets / "ledger-head").unlink()
    for command in (["ledger", "verify"], ["ledger", "show"], ["status"], ["start"]):
        fails(site_cli(*command, "--home", home.root, "--json"), "PF310")


@pytest.fixture
def sent(copy_home) -> Path:
    """A home that let a decision and a round's answer out, over one connection that is closed and one that is not."""
    home = copy_home()
    with EgressLog(home.egress, now=lambda: 1_764_490_000.0) as record:
        place, plan = "server.example:9092", digest.of_bytes(b"plan")
        small = Outgoing(destination=place, kind=EgressKind.DECISION, size=100, digest=digest.of_bytes(b"yes"), plan=plan)
        update = replace(small, kind=EgressKind.UPDATE, size=5000, run="run-1", round_index=1, epsilon_charged=0.5)
        opened = Outgoing(destination=place, kind=EgressKind.CONNECTION_OPENED, size=0, digest=digest.of_bytes(b""), connection="1-1")
        record.append(opened, small, update, replace(opened, kind=EgressKind.CONNECTION_CLOSED, size=5321))
        record.append(replace(opened, connection="1-2"))
    return home.root


def test_what_left_is_shown_to_people_as_json_and_as_csv(site_cli, sent):
    done = site_cli("egress", "--home", sent, "--json")
    assert done.status == 0
    assert done.json["bytes_sent"] == {"server.example:9092": 5321}
    assert done.json["messages"] == {"decision": {"messages": 1, "bytes": 100}, "update": {"messages": 1, "bytes": 5000}}
    assert (done.json["epsilon_charged"], done.json["connections_not_closed"], len(done.json["entries"])) == (0.5, 1, 5)
    table = site_cli("egress", "--home", sent, "--csv")
    rows = list(csv.DictReader(io.StringIO(table.out)))
    assert [row["kind"] for row in rows] == [
        *("connection-opened", "decision", "update", "connection-closed", "connection-opened"),
    ]
    assert (rows[2]["time"], rows[2]["epsilon_charged"]) == ("2025-11-30T08:06:40.000+00:00", "0.5")
    people = site_cli("egress", "--home", sent)
    assert people.status == 0
    assert all(word in people.out for word in ("server.example:9092", "update", "decision", "5321", "run-1"))


@pytest.mark.parametrize(
    ("since", "left"),
    [
        *(("2025-11-30", 5), ("2025-11-30T08:06:40", 5), ("2025-11-30T08:06:41", 0), ("2025-11-30T09:06:40+01:00", 5)),
        *(("2025-11-30T08:06:40Z", 5), ("1s", 0), ("999999d", 5)),
    ],
)
def test_what_left_since_a_time_is_shown_alone(site_cli, sent, since, left):
    assert len(site_cli("egress", "--since", since, "--home", sent, "--json").json["entries"]) == left


def test_the_record_is_verified_and_its_head_can_be_noted(site_cli, sent):
    done = site_cli("egress", "--verify", "--home", sent, "--json")
    assert (done.status, done.json["verified"], done.json["entries_in_chain"]) == (0, True, 5)
    head = done.json["head"]
    with EgressLog(sent / "egress.db") as record:
        record.append(next(iter(record.entries())).sent)
    again = site_cli("egress", "--verify", "--head", head, "--home", sent, "--json")
    assert (again.status, again.json["entries_in_chain"]) == (0, 6)
    assert head not in site_cli("egress", "--verify", "--home", sent).out
    fails(site_cli("egress", "--verify", "--head", digest.of_bytes(b"other"), "--home", sent, "--json"), "PF914")
    with closing(sqlite3.connect(sent / "egress.db")) as connection:
        connection.execute("DROP TRIGGER egress_no_update")
        connection.execute("UPDATE egress SET at = 5 WHERE sequence = 2")
        connection.commit()
    fails(site_cli("egress", "--verify", "--home", sent, "--json"), "PF913")


@pytest.mark.parametrize("since", ["yesterday", "", "24", "24y", "-1h", "2025-13-01", "2025-11-30T25:00", "9" * 400 + "d"])
def test_a_time_that_is_none_is_refused(site_cli, sent, since):
    fails(site_cli("egress", f"--since={since}", "--home", sent, "--json"), "PF905")


def test_a_head_that_is_none_is_refused(site_cli, sent):
    fails(site_cli("egress", "--verify", "--head", "abc", "--home", sent, "--json"), "PF905")


@pytest.mark.parametrize("options", [["--csv", "--json"], ["--head", "sha256:" + "0" * 64]])
def test_options_that_do_not_go_together_are_refused(site_cli, sent, options):
    assert site_cli("egress", *options, "--home", sent).status == 2


@pytest.mark.parametrize("content", [None, b"no database" * 200])
def test_a_record_that_is_gone_or_damaged_is_told(site_cli, sent, content):
    for file in sent.glob("egress.db*"):
        file.unlink()
    if content is not None:
        (sent / "egress.db").write_bytes(content)
    fails(site_cli("egress", "--home", sent, "--json"), "PF913")


def test_a_slide_is_inspected_under_a_signed_plan(world, site_cli, copy_home, tmp_path):
    home = copy_home().root
    asked = ["inspect", "Oyelaran_biopsy.tif", "--plan", world.signed_plan, "--home", home, "--out", tmp_path / "look"]
    done = site_cli(*asked, "--json")
    assert (done.status, done.json["usable"], done.json["code"]) == (0, True, None)
    assert Path(done.json["page"]).is_file()
    assert Path(done.json["contact"]).is_file()
    people = site_cli(*asked)
    assert people.status == 0
    assert "stays at this site" in people.out
    fails(site_cli(*[word if word != "Oyelaran_biopsy.tif" else "none.tif" for word in asked], "--json"), "PF212")


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"slides": "/nowhere"}, "PF201"),
        ({"patients": "/nowhere.csv"}, "PF202"),
        ({"server_card": "/nowhere.dsse"}, "PF904"),
        ({"name": "Site A"}, "PF905"),
        ({"max_epsilon": 0}, "PF905"),
        ({"max_epsilon": "nan"}, "PF905"),
        ({"delta": 0.5}, "PF905"),
    ],
)
def test_a_bad_init_makes_nothing(world, site_cli, tmp_path, changes, code):
    fails(site_cli(*init_arguments(world, tmp_path / "home", **changes)), code)
    assert list(tmp_path.iterdir()) == []


def test_the_patient_list_is_no_server_card(world, site_cli, tmp_path):
    fails(site_cli(*init_arguments(world, tmp_path / "home", server_card=world.patients)), "PF602")
    assert list(tmp_path.iterdir()) == []


def test_a_home_that_exists_is_not_made_again(world, site_cli, copy_home):
    fails(site_cli(*init_arguments(world, copy_home().root)), "PF904")


@pytest.mark.parametrize(
    "command",
    [
        ["status"],
        ["ledger", "show"],
        ["ledger", "verify"],
        ["egress"],
        ["start"],
        ["patients"],
        ["withdraw", "--slides-from", "PLAN"],
        ["scan", "PLAN"],
        ["approve", "PLAN", "--patients-at-least", 4],
        ["plans"],
        ["show", "PLAN"],
        ["reject", "PLAN"],
        ["revoke", "PLAN"],
        ["stop"],
        ["resume"],
        ["approvers", "list"],
        ["approvers", "add", "anna", "--key", "ed25519:x"],
        ["approvers", "remove", "anna"],
    ],
)
@pytest.mark.parametrize("there", [False, True])
def test_a_home_that_is_missing_is_told_and_not_made(world, site_cli, tmp_path, command, there):
    home = tmp_path / "home"
    if there:
        home.mkdir()
    arguments = [world.signed_plan if word == "PLAN" else word for word in command]
    done = site_cli(*arguments, "--home", home, "--json")
    assert done.code in ("PF904", "PF906")
    assert done.status == 19
    assert (list(home.iterdir()) if there else home.exists()) in ([], False)


def test_a_scan_of_an_empty_folder_is_refused(own_slides, site_cli, tmp_path):
    home = own_slides.init(tmp_path / "home").root
    for slide in own_slides.slides.iterdir():
        slide.unlink()
    fails(site_cli("scan", own_slides.signed_plan, "--home", home, "--json"), "PF201")
    own_slides.slides.rmdir()
    fails(site_cli("scan", own_slides.signed_plan, "--home", home, "--json"), "PF201")


@pytest.mark.parametrize(
    ("rows", "code"),
    [
        ([["file", "person"], ["a.tif", "1"]], "PF202"),
        ([["slide", "patient"]], "PF202"),
        ([["slide", "case"], ["Oyelaran_biopsy.tif", "1"]], "PF202"),
    ],
)
def test_a_list_that_cannot_be_used_stops_the_scan_before_a_slide_is_read(own_slides, site_cli, tmp_path, rows, code):
    home = own_slides.init(tmp_path / "home")
    list_rows(own_slides.patients, rows)
    fails(site_cli("scan", own_slides.signed_plan, "--home", home.root, "--json"), code)
    with SiteStore(home.database) as store:
        assert store.slides(scan_key(own_slides)) == {}


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("Oyelaran_biopsy.tif,PATIENTID-9,", "PF203"),
        ("Oyelaran_biopsy.tif,PATIENTID-0001-Oyelaran,liver", "PF231"),
        ("Yamashiro_biopsy,,", "PF232"),
    ],
)
def test_a_slide_in_doubt_is_left_out_the_others_are_kept_and_the_command_fails_with_its_report(own_slides, site_cli, tmp_path, line, code):
    home = own_slides.init(tmp_path / "home")
    text = own_slides.patients.read_text(encoding="utf-8").replace("slide,patient", "slide,patient,organ")
    text = text.replace("PATIENTID-0001-Oyelaran", "PATIENTID-0001-Oyelaran,lung")
    own_slides.patients.write_text(text + line + "\n", encoding="utf-8")
    dry = site_cli("patients", "--home", home.root, "--json")
    fails(dry, code)
    with SiteStore(home.database) as store:
        assert store.slides(scan_key(own_slides)) == {}
    done = site_cli("scan", own_slides.signed_plan, "--home", home.root, "--json")
    fails(done, code)
    assert done.json["report"]["patients"] == 4
    assert done.json["report"]["by_reason"] == {code: 1}
    assert done.json["report"]["list_findings"] == dry.json["report"]["list_findings"]
    assert 7 in done.json["report"]["list_findings"][0]["lines"]
    with SiteStore(home.database) as store:
        assert len(store.slides(scan_key(own_slides))) == 5
    for command in (["patients"], ["scan", own_slides.signed_plan]):
        people = site_cli(*command, "--home", home.root)
        assert people.status == 12
        assert code in people.out
        assert code in people.err
        assert "PATIENTID" not in people.out + people.err


def test_patients_shows_how_a_list_is_read_and_writes_nothing(own_slides, site_cli, tmp_path):
    home = own_slides.init(tmp_path / "home")
    (own_slides.slides / "broken.svs").write_bytes(b"never opened")
    lines = ["Export of the lab;;;;", "Schnitt;Patienten-ID;Organ;Bemerkung;Scandatum"]
    lines += ["Oyelaran_biopsy;P1;Niere;x;4.3.2021", "Muellerova_biopsy.tif;P1;niere;;", "Yamashiro_biopsy;P2;;;", "gone.tif;P3;;;"]
    own_slides.patients.write_text("\r\n".join(lines), encoding="utf-16")
    before = home.database.read_bytes()
    shown = site_cli("patients", "--home", home.root, "--json")
    assert shown.status == 0
    found = shown.json
    assert (found["encoding"], found["separator"], found["header_line"], found["lines"]) == ("UTF-16", "semicolon", 2, 4)
    assert found["columns"] == {"slide": "Schnitt", "patient": "Patienten-ID", "organ": "Organ", "acquired": "Scandatum"}
    assert found["unused_columns"] == ["Bemerkung"]
    assert (found["slides"], found["mapped"], found["patients"]) == (6, 3, 2)
    assert found["unmapped"] == ["Drozdowski_biopsy.tif", "Katzenstein_biopsy.tif", "broken.svs"]
    assert [(one["slide"], one["line"], one["code"]) for one in found["not_found"]] == [("gone.tif", 6, "PF212")]
    assert found["attributes"] == {"organ": {"": 1, "niere": 2}, "acquired": {"": 2, "2021-03-04": 1}}
    assert home.database.read_bytes() == before
    people = " ".join(site_cli("patients", "--home", home.root).out.split())
    for word in ("UTF-16", "semicolon", "Schnitt", "Bemerkung", "niere", "gone.tif", "broken.svs"):
        assert word in people


def test_columns_configured_in_the_settings_are_used(own_slides, site_cli, tmp_path):
    home = own_slides.init(tmp_path / "home")
    text = own_slides.patients.read_text(encoding="utf-8").replace("slide,patient", "Objekt,Fall")
    own_slides.patients.write_text(text, encoding="utf-8")
    fails(site_cli("patients", "--home", home.root, "--json"), "PF202")
    settings = home.root / "site.toml"
    settings.write_text(settings.read_text() + '\n[patient_list]\nslide = "Objekt"\npatient = "Fall"\n')
    assert site_cli("patients", "--home", home.root, "--json").json["patients"] == 5
    assert site_cli("scan", own_slides.signed_plan, "--home", home.root, "--json").json["patients"] == 5
    settings.write_text(settings.read_text() + 'age = "Alter"\n')
    fails(site_cli("patients", "--home", home.root, "--json"), "PF905")


@pytest.mark.parametrize("by", ["file", "standard input"])
def test_withdraw_takes_patients_and_slides_from_a_file_or_standard_input(world, site_cli, copy_home, tmp_path, monkeypatch, by):
    home = copy_home().root
    patients, slides = tmp_path / "patients.txt", tmp_path / "slides.txt"
    patients.write_text("PATIENTID-0001-Oyelaran\n")
    slides.write_text("Yamashiro_biopsy\n")
    source: object = patients
    if by == "standard input":
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(patients.read_bytes())))
        source = "-"
    done = site_cli("withdraw", "--patients-from", source, "--slides-from", slides, "--home", home, "--json")
    assert (done.status, done.json) == (0, {"patients": 1, "slides": 2, "new": True})
    status = site_cli("status", "--home", home, "--json").json
    assert (status["withdrawn_patients"], status["withdrawn_slides"]) == (1, 2)
    assert (status["plans"][0]["patients"], status["plans"][0]["reasons"]) == (3, {"PF234": 2})
    assert site_cli("scan", world.signed_plan, "--home", home, "--json").json["patients"] == 3
    again = site_cli("withdraw", "--patients-from", patients, "--home", home)
    assert again.status == 0
    assert "before" in again.out
    assert "PATIENTID" not in again.out + again.err + done.out + done.err


def test_a_withdrawal_with_an_unknown_line_does_nothing(site_cli, copy_home, tmp_path):
    home = copy_home().root
    given = tmp_path / "given.txt"
    given.write_text("PATIENTID-0001-Oyelaran\nPATIENTID-77\n")
    done = site_cli("withdraw", "--patients-from", given, "--home", home, "--json")
    fails(done, "PF235")
    assert "lines 2" in done.json["error"]["value"]
    assert "PATIENTID" not in done.out + done.err
    assert site_cli("status", "--home", home, "--json").json["withdrawn_patients"] == 0
    fails(site_cli("withdraw", "--patients-from", tmp_path / "none", "--home", home, "--json"), "PF904")


@pytest.mark.parametrize("options", [[], ["--patients-from", "-", "--slides-from", "-"], ["PATIENTID-0001-Oyelaran"]])
def test_identifiers_are_no_arguments_and_come_from_somewhere(site_cli, copy_home, options):
    assert site_cli("withdraw", *options, "--home", copy_home().root).status == 2


def test_a_patient_can_be_withdrawn_while_list_and_slides_are_away(own_slides, site_cli, tmp_path):
    home = own_slides.init(tmp_path / "home")
    site_cli("scan", own_slides.signed_plan, "--home", home.root, "--json")
    own_slides.patients.unlink()
    shutil.rmtree(own_slides.slides)
    given = tmp_path / "given.txt"
    given.write_text("PATIENTID-0001-Oyelaran\n")
    assert site_cli("withdraw", "--patients-from", given, "--home", home.root, "--json").json["slides"] == 1
    given.write_text("nobody\n")
    fails(site_cli("withdraw", "--patients-from", given, "--home", home.root, "--json"), "PF235")
    given.write_text("Yamashiro_biopsy\n")
    assert site_cli("withdraw", "--slides-from", given, "--home", home.root, "--json").json["slides"] == 1


def scan_key(world):
    from pathfed_client.slides import tiling

    return tiling.scan_key(world.plan.cohort)


def test_a_scan_names_everything_that_needs_a_look(own_slides, site_cli, tmp_path):
    """A bad slide, an unmapped one, a line without a slide, a patient without a tile, and a slide that two patients share."""
    home = own_slides.init(tmp_path / "home")
    slides = own_slides.slides
    (slides / "Oyelaran_biopsy.tif").write_bytes(b"not a slide")
    shutil.copy(slides / "Yamashiro_biopsy.tif", slides / "copied.tif")
    shutil.copy(slides / "Yamashiro_biopsy.tif", slides / "stranger.tif")
    with own_slides.patients.open("a", encoding="utf-8") as file:
        file.write("copied.tif,PATIENTID-9\nabsent.tif,PATIENTID-10\n")
    done = site_cli("scan", own_slides.signed_plan, "--home", home.root, "--json")
    assert done.status == 0
    assert done.json["patients"] == 3
    assert done.json["by_reason"] == {"PF205": 1, "PF204": 1, "PF219": 2}
    assert [entry["slide"] for entry in done.json["not_found"]] == ["absent.tif"]
    assert [entry["code"] for entry in done.json["patients_without_tile"]] == ["PF210"] * 4
    assert done.json["same_content"] == [["Yamashiro_biopsy.tif", "copied.tif"]]
    people = site_cli("scan", own_slides.signed_plan, "--home", home.root)
    told = " ".join(people.out.split())
    for word in ("PF204", "stranger.tif", "PF205", "absent.tif", "PF210", "WARNING", "copied.tif"):
        assert word in told
    assert "PATIENTID" not in told


def test_slides_may_lie_in_several_folders(own_slides, site_cli, tmp_path):
    archive = tmp_path / "archive"
    archive.mkdir()
    (own_slides.slides / "Oyelaran_biopsy.tif").rename(archive / "Oyelaran_biopsy.tif")
    home = tmp_path / "home"
    inside = site_cli(*init_arguments(own_slides, home), "--slides", own_slides.slides.parent)
    fails(inside, "PF217")
    assert site_cli(*init_arguments(own_slides, home), "--slides", archive).status == 0
    done = site_cli("scan", own_slides.signed_plan, "--home", home, "--workers", 2, "--json")
    assert (done.status, done.json["patients"]) == (0, 5)
    assert done.json["slides"][0]["path"] == "archive//Oyelaran_biopsy.tif"
    shutil.rmtree(archive)
    away = site_cli("scan", own_slides.signed_plan, "--home", home)
    assert away.status == 0
    assert "PF216" in away.out
    done = site_cli("scan", own_slides.signed_plan, "--home", home, "--json")
    assert (done.json["patients"], done.json["unreachable"][0]["folder"]) == (5, "archive//")


def test_a_listed_resolution_reaches_reading_processes_and_inspection(own_slides, site_cli, tmp_path):
    home = own_slides.init(tmp_path / "home").root
    slide = own_slides.slides / "Oyelaran_biopsy.tif"
    slide.write_bytes(slide_bytes(np.random.default_rng(0).integers(0, 255, (256, 256, 3), np.uint8), mpp=28.97))
    asked = ["inspect", slide.name, "--plan", own_slides.signed_plan, "--home", home, "--out", tmp_path / "look", "--json"]
    assert site_cli(*asked).json["code"] == "PF207"
    assert "PF207" in site_cli("scan", own_slides.signed_plan, "--home", home, "--json").json["by_reason"]
    own_slides.patients.write_text(
        own_slides.patients.read_text().replace("slide,patient", "slide,patient,mpp").replace("Oyelaran\n", "Oyelaran,0.4\n")
    )
    done = site_cli("scan", own_slides.signed_plan, "--home", home, "--workers", 2, "--json")
    assert (done.json["slides_read"], "PF207" in done.json["by_reason"]) == (1, False)
    found = site_cli(*asked).json
    assert (found["mpp"], found["code"] == "PF207") == ([0.4, 0.4], False)


def test_patients_looks_into_all_folders_and_tells_which_are_out_of_reach(own_slides, site_cli, tmp_path):
    archive = tmp_path / "archive"
    archive.mkdir()
    (own_slides.slides / "Oyelaran_biopsy.tif").rename(archive / "Oyelaran_biopsy.tif")
    home = tmp_path / "home"
    assert site_cli(*init_arguments(own_slides, home), "--slides", archive).status == 0
    found = site_cli("patients", "--home", home, "--json").json
    assert (found["mapped"], found["unreachable"]) == (5, {})
    shutil.rmtree(archive)
    found = site_cli("patients", "--home", home, "--json").json
    assert (found["mapped"], list(found["unreachable"])) == (4, ["archive//"])
    assert "archive//" in site_cli("patients", "--home", home).out


def test_watching_takes_up_new_slides_until_it_is_ended(own_slides, site_cli, tmp_path):
    home = own_slides.init(tmp_path / "home").root
    late = own_slides.slides / "Yamashiro_biopsy.tif"
    late.rename(tmp_path / "late.tif")
    options = ["--home", str(home), "--workers", "1", "--watch", "--every", "0.1", "--at-rest", "0", "--json"]
    source = "from pathfed_client.cli import main; main()"
    command = [sys.executable, "-c", source, "scan", str(own_slides.signed_plan), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["patients"] == 4
        (tmp_path / "late.tif").rename(late)
        while json.loads(process.stdout.readline())["patients"] != 5:
            pass
        process.terminate()
        assert process.wait() == 0
    assert site_cli("scan", own_slides.signed_plan, "--home", home, "--json").json["slides_read"] == 0


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (["--scheduler", "10.0.0.1:8786"], "PF905"),
        (["--scheduler", "10.0.0.1:8786", "--scheduler-ca", "ca.pem"], "PF905"),
    ],
)
def test_a_scheduler_elsewhere_wants_all_of_tls(world, site_cli, copy_home, options, code):
    fails(site_cli("scan", world.signed_plan, "--home", copy_home().root, *options, "--json"), code)


def test_a_scan_that_finds_nothing_to_train_on_shows_why_before_it_fails(own_slides, site_cli, tmp_path):
    home = own_slides.init(tmp_path / "home")
    for slide in own_slides.slides.iterdir():
        slide.write_bytes(b"not a slide")
    done = site_cli("scan", own_slides.signed_plan, "--home", home.root, "--json")
    fails(done, "PF211")
    assert done.json["report"]["by_reason"] == {"PF205": 5}
    people = site_cli("scan", own_slides.signed_plan, "--home", home.root)
    assert people.status == 12
    assert "Oyelaran_biopsy.tif" in people.out
    assert "PF211" in people.err


def test_a_plan_of_another_server_is_refused(world, site_cli, copy_home, tmp_path):
    from pathfed_common.provenance.documents import seal_plan
    from pathfed_common.provenance.keys import SigningKey

    forged = tmp_path / "forged.dsse"
    forged.write_bytes(seal_plan(world.plan, SigningKey.generate()))
    home = copy_home()
    fails(site_cli("scan", forged, "--home", home.root, "--json"), "PF106")
    fails(site_cli("approve", forged, "--patients-at-least", 4, "--home", home.root, "--json"), "PF106")
    fails(site_cli("approve", tmp_path / "none.dsse", "--patients-at-least", 4, "--home", home.root, "--json"), "PF904")


@pytest.mark.parametrize(("declared", "code"), [(6, "PF303"), (1, "PF105")])
def test_more_patients_declared_than_found_or_fewer_than_the_plan_expects_are_refused(world, site_cli, copy_home, tmp_path, declared, code):
    out = tmp_path / "approval.dsse"
    done = site_cli("approve", world.signed_plan, "--patients-at-least", declared, "--home", copy_home().root, "--out", out, "--json")
    fails(done, code)
    assert not out.exists()


def test_a_policy_that_forbids_the_plan_is_kept(world, site_cli, copy_home):
    home = copy_home(max_epsilon=0.5)
    fails(site_cli("approve", world.signed_plan, "--patients-at-least", 4, "--home", home.root, "--json"), "PF307")


@pytest.mark.parametrize("text", ["max_epsilon = 'much'", "max_epsilon = 5\ndelta = 1e-6\nsecret_key = 1", "max_epsilon = "])
def test_a_policy_that_cannot_be_read_is_told(site_cli, copy_home, text):
    home = copy_home()
    (home.root / "policy.toml").write_text(text)
    fails(site_cli("status", "--home", home.root, "--json"), "PF905")


def test_a_key_that_others_may_read_stops_the_command(world, site_cli, copy_home, tmp_path):
    home = copy_home()
    (home.root / "keys" / "evidence.pem").chmod(0o644)
    out = tmp_path / "approval.dsse"
    fails(site_cli("approve", world.signed_plan, "--patients-at-least", 4, "--home", home.root, "--out", out, "--json"), "PF906")
    assert not out.exists()


def test_a_disk_that_fills_up_while_scanning_is_told_and_the_scan_goes_on_later(world, site_cli, copy_home, small_disk):
    made = world.init(small_disk / "home")
    ballast = small_disk / "ballast"
    ballast.write_bytes(b"x" * (free(small_disk) - 8192))
    done = site_cli("scan", world.signed_plan, "--home", made.root, "--json")
    fails(done, "PF901")
    ballast.unlink()
    assert site_cli("scan", world.signed_plan, "--home", made.root, "--json").json["patients"] == 5


def free(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def test_a_disk_that_is_full_when_a_round_is_sealed_gives_the_code_and_the_round_can_be_answered_later(world, copy_home, small_disk):
    from pathfed_client.answering import SiteAnswerer

    home = copy_home()
    bulk = LocalBulk(home)
    shutil.rmtree(home.updates)
    home.updates.symlink_to(small_disk)
    with (
        SiteStore(home.database) as store,
        closing(SiteAnswerer(home, store, lambda outlet: bulk, now=lambda: 1_000_001.0, sleep=lambda seconds: None)) as answerer,
    ):
        bulk.holds = world.base_state
        assert answerer(world.offer()).code == "PF901"
        assert list(small_disk.iterdir()) == []
        assert store.get_sealed("run-1", 1) is None
        home.updates.unlink()
        home.updates.mkdir()
        assert answerer(world.offer()).code is None
        assert len(store.entries()) == 1


def test_a_usage_error_is_no_trace(site_cli):
    done = site_cli("scan")
    assert done.status == 2
    assert "Traceback" not in done.err
