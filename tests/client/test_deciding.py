"""The hospital's veto on the command line: plans listed, shown, approved, rejected, revoked; and who may sign."""

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from pathfed_client import app, deciding
from pathfed_client.home import SiteHome
from pathfed_client.io.site_store import SiteStore
from pathfed_client.plan_summary import differences, milestones
from pathfed_common import digest, wire_format
from pathfed_common.model import update_shapes
from pathfed_common.provenance import cosigned
from pathfed_common.provenance.documents import Approval, Decision
from pathfed_common.provenance.keys import SigningKey
from pathfed_common.provenance.log_leaves import PlanApproved, PlanDecided, read_leaf


@pytest.fixture
def home(copy_home) -> SiteHome:
    """A site that has approved the plan `tiny`."""
    made: SiteHome = copy_home()
    return made


@pytest.fixture
def fresh(world, tmp_path) -> SiteHome:
    """A site that has scanned and decided nothing."""
    home: SiteHome = world.init(tmp_path / "fresh")
    app.scan(home, world.plan.cohort, lambda done, total: None)
    return home


def variant(world, name: str = "tiny", noise: float = 1.1):
    privacy = world.plan.privacy.model_copy(update={"noise_multiplier": noise})
    return world.plan.model_copy(update={"name": name, "privacy": privacy})


def change_policy(home: SiteHome, key: str, value: str) -> None:
    path = home.root / "policy.toml"
    lines = [line for line in path.read_text().splitlines() if not line.startswith(f"{key} ")]
    path.write_text("\n".join([*lines, f"{key} = {value}", ""]))


def leaves(home: SiteHome) -> list[object]:
    with closing(SiteStore(home.database)) as store:
        return [read_leaf(word.leaf) for word in store.words()]


def test_a_plan_is_listed_shown_and_approved_by_name_or_digest(world, site_cli, fresh):
    here = ["--home", fresh.root, "--json"]
    assert site_cli("plans", *here).json == []
    assert site_cli("show", world.signed_plan, *here).json["state"] == "undecided"  # from now on it is known
    (row,) = site_cli("plans", *here).json
    assert (row["plan"], row["digest"], row["state"]) == ("tiny", world.plan.digest, "undecided")
    for name in ("tiny", world.plan.digest, world.plan.digest[7:15], world.plan.digest[:20]):
        assert site_cli("show", name, *here).json["digest"] == world.plan.digest
    done = site_cli("approve", "tiny", "--patients", 4, *here)
    assert (done.status, done.json["plan"], done.json["declared_patients"]) == (0, world.plan.digest, 4)
    envelope = Path(done.json["approval"]).read_bytes()
    assert Approval.from_bytes(envelope, fresh.evidence_key.public).declared_patients == 4
    assert leaves(fresh) == [PlanApproved(site=fresh.name, plan=world.plan.digest, approval=digest.of_bytes(envelope))]
    (row,) = site_cli("plans", *here).json
    assert (row["state"], row["declared_patients"]) == ("approved", 4)
    again = site_cli("approve", "tiny", "--patients-at-least", 4, *here)
    assert Path(again.json["approval"]).read_bytes() == envelope, "a site says a thing once"
    assert len(leaves(fresh)) == 1
    assert site_cli("scan", "tiny", *here).json["slides_read"] == 0
    for command in (["plans"], ["show", "tiny"]):
        people = site_cli(*command, "--home", fresh.root)
        assert people.status == 0
        assert "tiny" in people.out


def test_names_that_are_nobodys_or_of_several_are_refused(world, site_cli, home):
    here = ["--home", home.root, "--json"]
    other = world.sign("other.dsse", variant(world))
    assert site_cli("show", other, *here).status == 0
    for command in (["show", "tiny"], ["reject", "tiny"], ["revoke", "tiny"], ["approve", "tiny", "--patients", 4], ["scan", "tiny"]):
        done = site_cli(*command, *here)
        assert done.code == "PF444", command
        assert world.plan.digest[7:19] in done.json["error"]["remedy"]
    for name in ("none", "sha256:", "", "0" * 64):
        assert site_cli("show", name, *here).code == "PF444"
    assert site_cli("show", "/nowhere.dsse", *here).code == "PF904"
    assert site_cli("show", "nowhere.dsse", *here).code == "PF904"
    assert site_cli("show", world.patients, *here).code == "PF106"


def test_the_summary_says_what_is_trained_what_leaves_and_what_it_costs(world, site_cli, home):
    found = site_cli("show", "tiny", "--home", home.root, "--json").json
    assert (found["trained"]["encoder"], found["trained"]["rounds"]) == ("vit_tiny_patch16_224", 3)
    assert found["trained"]["parameters"] > 5e6
    assert found["trained"]["what_of_it"] == "all of it"
    assert found["cohort"]["patients_here"] == 5
    leaves = found["leaves"]
    assert leaves["update_bytes_a_round"] == wire_format.file_bytes(update_shapes(world.plan), "bfloat16")
    assert 2 * leaves["update_numbers"] < leaves["update_bytes_a_round"] < 2 * leaves["update_numbers"] + 40_000
    assert leaves["update_bytes_a_run"] == 3 * leaves["update_bytes_a_round"]
    assert (leaves["clip_norm"], leaves["noise_std"]) == (1.0, 1.0)
    cost = found["cost"]
    assert [row["after_round"] for row in cost["epsilon_after_round"]] == [1, 2, 3]
    ones = [row["epsilon_at_1_sites"] for row in cost["epsilon_after_round"]]
    assert ones == sorted(ones)
    assert ones[-1] == pytest.approx(app.plan_epsilon(world.plan, 4, 1e-6))
    for row in cost["epsilon_after_round"]:
        assert row["epsilon_at_1_sites"] < row["epsilon_at_2_sites"] < row["epsilon_at_3_sites"]
    assert (cost["epsilon_spent"], cost["epsilon_with_this_plan"]) == (0.0, pytest.approx(ones[-1]))
    assert (found["refused_by_policy"], found["changes"]) == ([], None)
    fewer = site_cli("show", "tiny", "--patients", 400, "--home", home.root, "--json").json
    assert fewer["cost"]["epsilon_after_round"][-1]["epsilon_at_1_sites"] < ones[-1]
    people = site_cli("show", "tiny", "--home", home.root).out
    for word in ("what would be trained", "what leaves", "noise of standard deviation", "epsilon, 3 site(s)", "who has signed"):
        assert word in people


def test_the_summary_names_what_changed_since_the_last_approved_plan_and_what_the_policy_refuses(world, site_cli, copy_home):
    home = copy_home(max_epsilon=1.0)
    other = world.sign("other.dsse", variant(world, "tiny-2", 1.1))
    found = site_cli("show", other, "--home", home.root, "--json").json
    assert found["changes"]["digest"] == world.plan.digest
    assert found["changes"]["keys"] == [
        {"key": "name", "before": "tiny", "now": "tiny-2"},
        {"key": "privacy.noise_multiplier", "before": 1.0, "now": 1.1},
    ]
    assert [one["code"] for one in found["refused_by_policy"]] == ["PF307"]
    people = " ".join(site_cli("show", other, "--home", home.root).out.split())
    assert "privacy.noise_multiplier 1 1.1" in people


def test_differences_and_milestones():
    rows = differences({"a": {"b": 1, "c": 2}, "gone": 1}, {"a": {"b": 1, "c": 3}, "new": [1]})
    assert rows == [
        {"key": "a.c", "before": 2, "now": 3},
        {"key": "new", "before": None, "now": [1]},
        {"key": "gone", "before": 1, "now": None},
    ]
    assert (milestones(1), milestones(4), milestones(25)) == ([1], [1, 2, 3, 4], [1, 2, 3, 5, 10, 20, 25])


def test_a_plan_is_rejected_and_may_be_approved_later(world, site_cli, fresh):
    here = ["--home", fresh.root, "--json"]
    done = site_cli("reject", world.signed_plan, "--reason", "not before the board has met", *here)
    assert (done.status, done.json["state"]) == (0, "rejected")
    envelope = Path(done.json["decision"]).read_bytes()
    said = Decision.from_bytes(envelope, fresh.evidence_key.public)
    assert (said.kind, said.approval, said.reason) == ("rejection", None, "not before the board has met")
    assert leaves(fresh) == [PlanDecided(site=fresh.name, plan=world.plan.digest, decision=digest.of_bytes(envelope))]
    assert site_cli("plans", *here).json[0]["state"] == "rejected"
    assert site_cli("revoke", "tiny", *here).code == "PF445"
    assert site_cli("approve", "tiny", "--patients", 4, *here).status == 0
    assert site_cli("reject", "tiny", *here).code == "PF445"


def test_an_approval_is_revoked_once_and_for_good(world, site_cli, home):
    here = ["--home", home.root, "--json"]
    done = site_cli("revoke", "tiny", "--out", home.root / "word.dsse", *here)
    assert (done.status, done.json["state"], done.json["decision"]) == (0, "revoked", str(home.root / "word.dsse"))
    assert Decision.from_bytes((home.root / "word.dsse").read_bytes(), home.evidence_key.public).kind == "revocation"
    for command in (["revoke", "tiny"], ["reject", "tiny"], ["approve", "tiny", "--patients", 4]):
        assert site_cli(*command, *here).code == "PF445", command
    assert site_cli("plans", *here).json[0]["state"] == "revoked"


@pytest.mark.parametrize("reason", ["x" * 201, "two\nlines", "\x1b[31m"])
def test_a_reason_that_cannot_be_public_is_refused_and_nothing_is_said(site_cli, home, reason):
    assert site_cli("revoke", "tiny", "--reason", reason, "--home", home.root, "--json").code == "PF905"
    assert site_cli("plans", "--home", home.root, "--json").json[0]["state"] == "approved"


def test_a_site_is_named_in_public_only_as_it_says(world, site_cli, fresh):
    here = ["--home", fresh.root, "--json"]
    assert site_cli("approve", world.signed_plan, "--patients", 4, "--named-as", "<b>", *here).code == "PF905"
    done = site_cli("approve", world.signed_plan, "--patients", 4, "--named-as", "St. Elsewhere", *here)
    approval = Approval.from_bytes(Path(done.json["approval"]).read_bytes(), fresh.evidence_key.public)
    assert approval.named_as == "St. Elsewhere"


def test_a_plan_that_stands_approved_is_not_approved_with_other_figures_or_another_name(site_cli, home):
    here = ["--home", home.root, "--json"]
    before = site_cli("plans", *here).json, leaves(home)
    for other in (["--patients", 3], ["--patients", 4, "--named-as", "St. Elsewhere"]):
        assert site_cli("approve", "tiny", *other, *here).code == "PF445"
    change_policy(home, "reply_slots", "false")
    assert site_cli("approve", "tiny", "--patients", 4, *here).code == "PF445"
    assert (site_cli("plans", *here).json, leaves(home)) == before
    change_policy(home, "reply_slots", "true")
    assert site_cli("approve", "tiny", "--patients", 4, *here).status == 0
    assert site_cli("revoke", "tiny", *here).status == 0


def test_other_figures_are_refused_before_anybody_signs_them(site_cli, home, tmp_path):
    here = ["--home", home.root, "--json"]
    ben = SigningKey.generate()
    (tmp_path / "ben.pem").write_bytes(ben.to_pem())
    (tmp_path / "ben.pem").chmod(0o600)
    assert site_cli("approvers", "add", "ben", "--key", ben.public.to_text(), *here).status == 0
    change_policy(home, "second_person", "true")
    as_ben = ["--approver", "ben", "--key", tmp_path / "ben.pem"]
    assert site_cli("approve", "tiny", "--patients", 3, *as_ben, *here).code == "PF445"
    assert site_cli("show", "tiny", "--patients", 3, *here).json["approvers"] == []
    assert site_cli("approve", "tiny", "--patients", 4, *as_ben, *here).json["signed_by"] == ["ben"]


def test_two_people_approve_with_keys_of_their_own(world, site_cli, fresh, tmp_path):
    here = ["--home", fresh.root, "--json"]
    (tmp_path / "words").write_text("correct horse\n")
    added = site_cli("approvers", "add", "anna", "--new", tmp_path / "anna.pem", "--passphrase-from", tmp_path / "words", *here)
    assert added.json["key"].startswith("ed25519:")
    ben = SigningKey.generate()
    (tmp_path / "ben.pem").write_bytes(ben.to_pem())
    (tmp_path / "ben.pem").chmod(0o600)
    assert site_cli("approvers", "add", "ben", "--key", ben.public.to_text(), *here).status == 0
    assert [row["approver"] for row in site_cli("approvers", "list", *here).json] == ["anna", "ben"]
    change_policy(fresh, "second_person", "true")

    approve = ["approve", world.signed_plan, "--patients", 4, *here]
    assert site_cli(*approve).code == "PF442"
    as_anna = ["--approver", "anna", "--key", tmp_path / "anna.pem", "--passphrase-from", tmp_path / "words"]
    for _ in range(2):
        once = site_cli(*approve, *as_anna)
        assert (once.status, once.json["signed_by"], once.json["approval"]) == (0, ["anna"], None)
    assert site_cli(*approve, "--approver", "ben", "--key", tmp_path / "anna.pem", "--passphrase-from", tmp_path / "words").code == "PF443"
    assert site_cli(*approve, "--approver", "carla", "--key", tmp_path / "ben.pem").code == "PF443"
    assert leaves(fresh) == []
    assert site_cli("show", "tiny", "--patients", 4, *here).json["approvers"] == ["anna"]
    twice = site_cli(*approve, "--approver", "ben", "--key", tmp_path / "ben.pem")
    assert (twice.json["signed_by"], Path(twice.json["approval"]).is_file()) == (["anna", "ben"], True)
    assert len(leaves(fresh)) == 1
    assert site_cli(*approve, "--approver", "ben").status == 2


def test_approvers_that_cannot_be_are_refused(site_cli, home, tmp_path):
    here = ["--home", home.root, "--json"]
    key = SigningKey.generate().public.to_text()
    assert site_cli("approvers", "add", "anna", "--key", key, *here).status == 0
    assert site_cli("approvers", "add", "anna", "--key", SigningKey.generate().public.to_text(), *here).code == "PF443"
    assert site_cli("approvers", "add", "ben", "--key", key, *here).code == "PF443"
    for name in ("", "Anna", "-a", "a" * 64, "../a"):
        assert site_cli("approvers", "add", "--key", SigningKey.generate().public.to_text(), *here, "--", name).code == "PF905"
    assert site_cli("approvers", "add", "ben", "--key", "ed25519:x", *here).code == "PF905"
    assert site_cli("approvers", "add", "ben", *here).status == 2
    assert site_cli("approvers", "remove", "ben", *here).code == "PF443"
    (tmp_path / "words").write_text("correct horse\n")
    again = site_cli("approvers", "add", "anna", "--new", tmp_path / "anna.pem", "--passphrase-from", tmp_path / "words", *here)
    assert (again.code, (tmp_path / "anna.pem").exists()) == ("PF443", False)
    assert site_cli("approvers", "remove", "anna", *here).json["state"] == "removed"


def test_a_plan_that_too_few_operators_signed_is_not_approved(world, site_cli, fresh, tmp_path):
    operator = SigningKey.generate()
    change_policy(fresh, "operators", f'["{operator.public.to_text()}"]')
    here = ["--home", fresh.root, "--json"]
    assert site_cli("approve", world.signed_plan, "--patients", 4, *here).code == "PF106"
    signed = tmp_path / "signed.dsse"
    signed.write_bytes(cosigned.cosign(world.signed_plan.read_bytes(), operator))
    assert site_cli("show", signed, *here).json["signatures"]["operators"] == [operator.public.to_text()]
    assert site_cli("approve", "tiny", "--patients", 4, *here).status == 0


def test_a_key_shows_in_no_repr():
    signer = deciding.Signer("anna", SigningKey.generate())
    assert "key" not in repr(replace(signer, name="ben"))
