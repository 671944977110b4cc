import pytest
from alembic import command
from sqlalchemy import create_engine

from pathfed_common import digest, files
from pathfed_common.errors import ErrorCode, HostError, PathfedError, RoundError
from pathfed_common.ids import RunName, SiteName
from pathfed_common.privacy.accounting import epsilon
from pathfed_common.provenance.documents import REVOCATION, Decision, SiteCard, open_plan
from pathfed_common.provenance.keys import SigningKey
from pathfed_common.provenance.log_leaves import rotate_key
from pathfed_common.units import UtcSeconds
from pathfed_server import app, orders
from pathfed_server.db import database
from pathfed_server.db.sql_store import SqlStore
from pathfed_server.rounds.state import Checkpoint, RunState
from pathfed_server.words import record_word


def published(home, plan_file):
    return app.publish_plan(home.root, plan_file, plan_file.with_suffix(".dsse"))


def test_a_published_plan_is_signed_and_kept(server_home, plan_file):
    plan = published(server_home, plan_file)
    signed = plan_file.with_suffix(".dsse").read_bytes()
    assert open_plan(signed, server_home.evidence_key.public) == plan
    with SqlStore(server_home.database_url) as store:
        (row,) = store.plans()
    assert (row.digest, row.plan()) == (plan.digest, plan)


def test_sites_approve_and_a_run_is_planned_over_them(server_home, plan_file, member):
    plan = published(server_home, plan_file)
    for name in ("site-a", "site-b", "site-c"):
        site = member(name)
        app.add_site(server_home.root, site.card)
        assert server_home.site_card(site.name) == site.card.read_bytes()
        if name != "site-c":
            app.add_word(server_home.root, site.approve(plan.digest))
    run = app.start_run(server_home.root, plan.digest[:15], RunName("run-1"), [])
    assert (run.state, run.sites, run.plan) == (RunState.PLANNED, ("site-a", "site-b"), plan.digest)


def code(call, *arguments) -> str:
    with pytest.raises(PathfedError) as caught:
        call(*arguments)
    return caught.value.code.value


def test_an_approval_counts_only_with_the_key_of_the_site_it_names(server_home, plan_file, member):
    plan = published(server_home, plan_file)
    known, stranger = member("site-a"), member("site-b")
    app.add_site(server_home.root, known.card)
    add = app.add_word
    assert code(add, server_home.root, stranger.approve(plan.digest)) == "PF501"
    assert code(add, server_home.root, known.approve(plan.digest, key=SigningKey.generate())) == "PF501"
    app.add_site(server_home.root, stranger.card)
    assert code(add, server_home.root, known.approve(plan.digest, site="site-b")) == "PF501"
    assert code(add, server_home.root, known.approve("sha256:" + "0" * 64)) == "PF516"
    changed = known.approve(plan.digest)
    changed.write_bytes(changed.read_bytes().replace(b'"sig":"', b'"sig":"A', 1))
    assert code(add, server_home.root, changed) == "PF602"
    assert code(add, server_home.root, plan_file) == "PF602"
    with SqlStore(server_home.database_url) as store:
        assert store.approvals(plan.digest) == []


def test_a_site_is_enrolled_once(server_home, member, tmp_path):
    site = member("site-a")
    app.add_site(server_home.root, site.card)
    impostor = member("site-a")
    assert code(app.add_site, server_home.root, impostor.card) == "PF502"
    assert server_home.site_card(SiteName("site-a")) != impostor.card.read_bytes()
    assert sorted(path.name for path in (server_home.root / "sites").iterdir()) == ["site-a.dsse"]


def test_a_card_that_cannot_be_kept_enrols_nobody(server_home, member, monkeypatch):
    def full(path, data, **options):
        raise HostError(ErrorCode.DISK_FULL, "the disk is full", where=path)

    site = member("site-a")
    with monkeypatch.context() as patch:
        patch.setattr(files, "write_atomic", full)
        assert code(app.add_site, server_home.root, site.card) == "PF901"
    app.add_site(server_home.root, site.card)


def test_a_database_that_cannot_be_reached_leaves_no_home(tmp_path):
    url = "postgresql+psycopg://nobody@127.0.0.1:1/none?connect_timeout=2"
    with pytest.raises(RoundError, match="PF512"):
        app.init(tmp_path / "home", consortium="test", host="127.0.0.1", listen="127.0.0.1", database=url)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["", "sha256:", "ffff", "sha256:zz"])
def test_a_digest_that_names_no_plan_is_told(server_home, plan_file, text):
    published(server_home, plan_file)
    assert code(app.start_run, server_home.root, text, RunName("run"), []) == "PF516"


def test_a_run_below_its_quorum_is_not_planned(server_home, plan_file, member):
    plan = published(server_home, plan_file)
    assert code(app.start_run, server_home.root, plan.digest, RunName("run"), []) == "PF503"
    app.add_site(server_home.root, member("site-a").card)
    assert code(app.start_run, server_home.root, plan.digest, RunName("run"), [SiteName("site-a"), SiteName("none")]) == "PF501"
    with SqlStore(server_home.database_url) as store:
        assert store.runs() == []


def test_the_card_of_an_enrolled_site_is_put_back_where_its_file_is_missing(server_home, member):
    root, site = server_home.root, member("site-a")
    given = site.card.read_bytes()
    app.add_site(root, site.card)
    assert code(app.add_site, root, site.card) == "PF502"
    server_home.site_card_file(site.name).unlink()
    assert code(app.add_site, root, member("site-a").card) == "PF502", "other keys"
    site.card.write_bytes(given)
    app.add_site(root, site.card)
    assert server_home.site_card(site.name) == given
    server_home.site_card_file(site.name).unlink()
    with SqlStore(server_home.database_url) as store:
        assert [event.action for event in store.audit_events()].count("site.enrolled") == 1
        store.revoke_site(site.name, at=1.0)
    assert code(app.add_site, root, site.card) == "PF502", "revoked"


def test_a_site_that_replaced_the_key_it_approved_with_is_in_no_run_that_would_not_verify(server_home, plan_file, member):
    """A record holds one key for each site."""
    root, plan = server_home.root, published(server_home, plan_file)
    sites = [member(name) for name in ("site-a", "site-b", "site-c")]
    for site in sites:
        app.add_site(root, site.card)
        app.add_word(root, site.approve(plan.digest))
    app.start_run(root, plan.digest, RunName("run-1"), [SiteName("site-a"), SiteName("site-b")])
    orders.stop_run(root, RunName("run-1"))
    rotate(server_home, sites[0])
    assert code(orders.resume_run, root, RunName("run-1")) == "PF532"
    assert app.start_run(root, plan.digest, RunName("run-2"), []).sites == ("site-b", "site-c")
    assert code(app.start_run, root, plan.digest, RunName("run-3"), [SiteName("site-a"), SiteName("site-b")]) == "PF532"
    rotate(server_home, sites[2])
    assert code(app.start_run, root, plan.digest, RunName("run-4"), []) == "PF532", "too few are left, and it says why"
    with SqlStore(server_home.database_url) as store:
        assert [run.name for run in store.runs()] == ["run-1", "run-2"]
        assert store.run(RunName("run-1")).state is RunState.STOPPED


@pytest.mark.parametrize("gone", ["site", "approval"])
def test_a_site_that_takes_part_no_more_does_not_hold_up_a_resumption(server_home, plan_file, member, gone):
    root, plan, run = server_home.root, published(server_home, plan_file), RunName("run-1")
    sites = [member(name) for name in ("site-a", "site-b", "site-c")]
    for site in sites:
        app.add_site(root, site.card)
        app.add_word(root, site.approve(plan.digest))
    app.start_run(root, plan.digest, run, [])
    orders.stop_run(root, run)
    last = sites[2]
    key = rotate(server_home, last)
    with SqlStore(server_home.database_url) as store:
        if gone == "site":
            store.revoke_site(last.name, at=1.0)
        else:
            approval = digest.of_bytes(last.approve(plan.digest).read_bytes())
            word = Decision(site=last.name, plan=plan.digest, kind=REVOCATION, approval=approval, reason="", decided_at=UtcSeconds(1.0))
            record_word(store, word.to_bytes(key), by="operator")
        assert code(orders.resume_run, root, run) == "PF532", "its record, once begun, would not verify"
        store.reopen_run(run, at=2.0)
        store.begin_attempt(run, at=2.0)
        name = digest.of_bytes(b"state")
        first = Checkpoint(round_index=0, state=name, state_path="s", state_bytes=1, optimiser=name, optimiser_path="o", optimiser_bytes=1)
        store.commit_initial(run, 1, first, at=2.0)
    orders.stop_run(root, run)
    orders.resume_run(root, run)
    orders.stop_run(root, run)
    rotate(server_home, sites[0])
    assert code(orders.resume_run, root, run) == "PF532", "this one still takes part"


def rotate(home, site) -> SigningKey:
    fresh = SigningKey.generate()
    with SqlStore(home.database_url) as store:
        before = store.site(site.name)
        card = SiteCard(site=site.name, evidence_key=fresh.public, flower_key=before.flower_key)
        for run in store.runs():
            if run.state is RunState.PLANNED:
                store.stop_run(run.name, at=1.0)
        leaf = rotate_key(site.name, site.key, fresh, UtcSeconds(60.0))
        store.rotate_keys(card, before=before, continuity=leaf.to_bytes(), leaf=leaf, at=60.0)
    return fresh


def test_a_plan_is_described_with_what_it_costs_patients_of_one_two_and_three_sites(plan_file):
    plan = app.read_plan(plan_file)
    told = app.describe_plan(plan, 40)
    assert told["sampling_rate"] == 0.1
    expected = epsilon(sampling_rate=0.1, noise_multiplier=1.0, steps=3, delta=plan.privacy.delta)
    assert told["epsilon_at_1_sites"] == pytest.approx(expected)
    assert told["epsilon_at_1_sites"] < told["epsilon_at_2_sites"] < told["epsilon_at_3_sites"]
    assert code(app.describe_plan, plan, 3) == "PF105"


def test_a_plan_file_that_is_no_text_is_unreadable(tmp_path):
    (tmp_path / "plan.toml").write_bytes(b"\xff\xfe\x00")
    assert code(app.read_plan, tmp_path / "plan.toml") == "PF101"
    assert code(app.read_plan, tmp_path / "none.toml") == "PF904"


def test_a_server_that_starts_brings_an_older_database_to_its_schema(server_home):
    """It is stopped by a key that others may read, the first thing it looks at afterwards."""
    place = server_home.root / "pathfed.db"
    place.unlink()
    engine = create_engine(server_home.database_url)
    with engine.begin() as connection:
        command.upgrade(database.alembic_config(connection), "0001")
    engine.dispose()
    server_home.tls_key.chmod(0o644)
    with pytest.raises(HostError, match="PF906"):
        app.serve(server_home.root, lambda line: None)
    with SqlStore(server_home.database_url) as store:
        assert store.runs() == []
    place.unlink()
    with pytest.raises(RoundError, match="PF512"):
        app.serve(server_home.root, lambda line: None)
    assert not place.exists()
