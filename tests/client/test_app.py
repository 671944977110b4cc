import datetime
import sqlite3
from contextlib import closing

import pytest
from tls_listener import listening

from pathfed_client import app, deciding, showing, starting
from pathfed_client.gate.site_policy import SitePolicy
from pathfed_client.home import SiteHome, SiteSettings, hold
from pathfed_client.io.site_store import SiteStore
from pathfed_client.transport.relay import CERTIFICATE_REFUSED
from pathfed_common import digest
from pathfed_common.errors import ErrorCode, HostError, PathfedError, PlanError, PrivacyError, SiteDataError, TransportError
from pathfed_common.ids import RunName, SiteName
from pathfed_common.plan import CohortPlan
from pathfed_common.privacy.accounting import PrivacyEvent, epsilon
from pathfed_common.processes import ProcessEnd
from pathfed_common.provenance.documents import Approval, ServerCard
from pathfed_common.provenance.keys import SigningKey
from pathfed_server.transport.certificates import make_tls


def charge(home: SiteHome, plan: str, count: int) -> None:
    with closing(SiteStore(home.database)) as store:
        ledger = app.open_ledger(home, store)
        for number in range(1, count + 1):
            ledger.charge(
                release_id=digest.of_value([plan, number]),
                plan=digest.of_bytes(plan.encode()),
                run=RunName("run"),
                round_index=number,
                event=PrivacyEvent(sampling_rate=0.1, noise_multiplier=2.0, steps=1),
                plan_delta=1e-5,
                plan_limit=10.0,
                now=1.0,
            )


def test_an_approval_is_signed_stored_and_says_what_it_binds(world, copy_home):
    home = copy_home()
    given = Approval.from_bytes((home.root / "approval.dsse").read_bytes(), home.evidence_key.public)
    assert (given.site, given.plan, given.declared_patients, given.reply_slots) == ("st-elsewhere", world.plan.digest, 4, True)
    with closing(SiteStore(home.database)) as store:
        stored = store.approval(world.plan.digest)
    assert stored is not None
    assert stored.signed_plan == world.signed_plan.read_bytes()


def other_plan(world, **privacy):
    return world.plan.model_copy(update={"name": "other", "privacy": world.plan.privacy.model_copy(update=privacy)})


@pytest.mark.parametrize(
    ("declared", "changes", "kind", "code"),
    [
        (6, {}, PrivacyError, ErrorCode.COHORT_TOO_SMALL),
        (1, {}, PlanError, ErrorCode.PLAN_IMPOSSIBLE),
        (4, {"noise_multiplier": 0.35}, PrivacyError, ErrorCode.POLICY_FORBIDS),
    ],
)
def test_a_plan_that_cannot_be_approved_leaves_no_approval(world, copy_home, tmp_path, declared, changes, kind, code):
    home = copy_home(max_epsilon=20.0)
    plan = other_plan(world, **changes)
    with pytest.raises(kind) as caught:
        deciding.approve(home, world.sign("refused.dsse", plan), declared, tmp_path / "approval.dsse")
    assert caught.value.code is code
    assert not (tmp_path / "approval.dsse").exists()
    with closing(SiteStore(home.database)) as store:
        assert store.approval(plan.digest) is None


def test_a_plan_of_another_server_is_not_authentic(world, copy_home, tmp_path):
    from pathfed_common.provenance.documents import seal_plan

    forged = tmp_path / "forged.dsse"
    forged.write_bytes(seal_plan(world.plan, SigningKey.generate()))
    with pytest.raises(PlanError, match="PF106"):
        deciding.approve(copy_home(), forged, 4, tmp_path / "approval.dsse")


def test_a_plan_with_other_cohort_rules_wants_a_scan_of_its_own(world, copy_home, tmp_path):
    cohort = CohortPlan(tile_px=64, mpp=0.5)
    plan = world.plan.model_copy(update={"cohort": cohort})
    with pytest.raises(SiteDataError, match=r"PF213.*pathfed-site scan"):
        deciding.approve(copy_home(), world.sign("unscanned.dsse", plan), 4, tmp_path / "approval.dsse")


def test_status_and_ledger_tell_what_was_spent(world, copy_home):
    home = copy_home()
    assert showing.status(home)["epsilon_spent"] == 0.0
    charge(home, "a", 3)
    status = showing.status(home)
    expected = epsilon(sampling_rate=0.1, noise_multiplier=2.0, steps=3, delta=1e-6)
    assert status["epsilon_spent"] == pytest.approx(expected)
    assert status["epsilon_left"] == pytest.approx(100.0 - expected)
    (plan,) = status["plans"]
    assert (plan["plan"], plan["patients"], plan["declared_patients"], plan["slides"]) == ("tiny", 5, 4, {"usable": 5})
    with closing(app.open_store(home)) as store:
        report = showing.ledger_report(home, store)
    assert report["epsilon"] == pytest.approx(expected)
    assert [entry["round"] for entry in report["entries"]] == [1, 2, 3]
    with closing(app.open_store(home)) as store:
        verified = showing.verify_ledger(home, store)
    assert (verified["releases"], verified["statements_compared"], verified["heads_compared"]) == (3, 0, 0)
    assert verified["epsilon"] <= verified["epsilon_rdp_bound"]
    low, _, high = verified["epsilon_prv"]
    assert low - 1e-3 <= verified["epsilon"] <= high + 1e-3
    assert {name: report[name] for name in report if name != "entries"}.items() <= verified.items()
    assert showing.glance(home, world.plan.cohort).epsilon_total == pytest.approx(expected)


def test_a_ledger_of_which_one_byte_was_changed_is_damaged(copy_home):
    home = copy_home()
    charge(home, "a", 1)
    with closing(sqlite3.connect(home.database)) as database, database:
        database.execute("DROP TRIGGER ledger_entry_no_update")
        (entry,) = database.execute("SELECT entry FROM ledger_entry").fetchone()
        database.execute("UPDATE ledger_entry SET entry = ?", (entry.replace(b'sig":"', b'sig":"A', 1),))
    with pytest.raises(PrivacyError, match="PF304"):
        showing.status(home)
    with pytest.raises(PrivacyError, match="PF304"):
        starting.start(home, print)


@pytest.mark.parametrize("missing", ["slides", "patients"])
def test_a_site_without_slides_or_list_is_not_made(world, tmp_path, missing):
    from dataclasses import replace

    empty = replace(world, root=tmp_path / "nowhere")
    (tmp_path / "nowhere").mkdir()
    if missing == "patients":
        empty.slides.mkdir()
    empty.card.write_bytes(world.card.read_bytes())
    with pytest.raises(SiteDataError) as caught:
        empty.init(tmp_path / "home")
    assert caught.value.code is (ErrorCode.SLIDE_FOLDER_EMPTY if missing == "slides" else ErrorCode.PATIENT_LIST_UNREADABLE)
    assert not (tmp_path / "home").exists()


def test_a_disk_too_small_for_the_database_leaves_no_home(world, small_disk):
    (small_disk / "ballast").write_bytes(b"x" * 960_000)
    with pytest.raises(HostError, match=r"PF90[14]"):
        world.init(small_disk / "home")
    assert [path.name for path in small_disk.iterdir()] == ["ballast"]


@pytest.mark.parametrize("key", ["flower", "superexec.secret", "evidence.pem"])
def test_a_site_does_not_start_with_a_key_that_others_may_read(copy_home, key):
    home = copy_home()
    (home.root / "keys" / key).chmod(0o644)
    with pytest.raises(HostError, match="PF906"):
        starting.start(home, print)


def test_a_site_does_not_start_against_a_server_whose_certificate_has_expired(world, tmp_path):
    tls = make_tls("test", ["127.0.0.1"], now=datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=500))
    with listening(tmp_path, tls) as port:
        card = ServerCard(
            name="test",
            evidence_key=world.server_key.public,
            ca_pem=tls.ca_certificate.decode(),
            fleet_address=f"127.0.0.1:{port}",
            control_address="127.0.0.1:2",
            enrolment_address="127.0.0.1:3",
        )
        (tmp_path / "card").write_bytes(card.to_bytes(world.server_key))
        settings = SiteSettings(name=SiteName("late"), slides=(str(world.slides),), patients=str(world.patients))
        home = app.init(tmp_path / "home", settings, SitePolicy(max_epsilon=10.0, delta=1e-6), tmp_path / "card")
        with pytest.raises(TransportError, match=r"PF401.*expired"):
            starting.start(home, print)
    assert not list(home.logs.glob("*")), "no process was started"


@pytest.mark.parametrize(
    ("name", "status", "log", "code"),
    [
        ("supernode", 1, "E: refused [code: 2004]", "PF402"),
        ("supernode", 1, "Address already in use", "PF903"),
        ("relay", CERTIFICATE_REFUSED, "", "PF401"),
        ("relay", 1, "", "PF903"),
        ("runner", 1, "E: refused [code: 2004]", "PF903"),
    ],
)
def test_a_process_that_ended_and_is_started_again_is_told_with_its_reason(copy_home, tmp_path, name, status, log, code):
    (tmp_path / "log").write_text(log)
    told: list[str] = []
    starting._tell_end(ProcessEnd(name=name, status=status, restarted=True, log=tmp_path / "log"), copy_home(), told.append)
    assert len(told) == 1
    assert told[0].startswith(f"{code} {name} ended ({status}) and is started again")
    with pytest.raises(PathfedError, match=code):
        starting._tell_end(ProcessEnd(name=name, status=status, restarted=False, log=tmp_path / "log"), copy_home("other"), told.append)


def test_a_second_start_in_the_same_home_is_refused(copy_home):
    home = copy_home()
    with hold(home, "site"), pytest.raises(HostError, match=r"PF904.*another process runs this site"):
        starting.start(home, print)


def test_what_is_no_home_is_left_as_it_is(tmp_path):
    home = SiteHome(tmp_path)
    for command in (showing.status, lambda home: starting.start(home, print), lambda home: showing.glance(home, CohortPlan())):
        with pytest.raises(PathfedError, match=r"PF90[46]"):
            command(home)
    assert list(tmp_path.iterdir()) == []


def test_the_accountants_are_warm_after_warming_up(copy_home):
    app.warm_up(copy_home())


def test_the_module_has_no_other_lazy_name():
    with pytest.raises(AttributeError):
        app.no_such_name  # noqa: B018 - the access is the test
