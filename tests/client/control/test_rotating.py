"""Rotation of each key, with its continuity, and of what the site had signed before."""

from dataclasses import replace

import pytest
from control_server import Refused

from pathfed_client import app
from pathfed_client.budget.chain import ChainReader
from pathfed_client.budget.entry import LEDGER_TYPE, LedgerEntry
from pathfed_client.control.rotating import rotate
from pathfed_client.egress.outlet import Outlet
from pathfed_client.home import SiteHome, hold
from pathfed_client.io.ledger_head import site_ledger
from pathfed_client.io.site_keys import KeyKind, fingerprints
from pathfed_common import digest, files
from pathfed_common.errors import HostError, PrivacyError, TransportError
from pathfed_common.ids import run_name
from pathfed_common.privacy.accounting import PrivacyEvent
from pathfed_common.provenance import dsse
from pathfed_common.provenance.documents import SiteCard, open_card_change
from pathfed_common.provenance.log_leaves import KeyRotated, read_leaf

KINDS = list(KeyKind)


def turn(site, kind) -> SiteHome:
    home = SiteHome(site.home.root)
    rotate(home, site.store, Outlet(site.record), kind, site.clock[0])
    return SiteHome(home.root)


@pytest.mark.parametrize("kind", KINDS)
def test_one_key_is_new_and_the_others_stay(kind, site, server):
    before = fingerprints(site.home.keys)
    home = turn(site, kind)
    after = fingerprints(home.keys)
    assert {one for one in KeyKind if after[one] != before[one]} == {kind}
    assert not home.keys.is_staged(kind)
    card = SiteCard.from_bytes(home.card_file.read_bytes())
    assert card.evidence_key == home.evidence_key.public
    assert digest.of_bytes(card.flower_key.encode()) == after[KeyKind.FLOWER]
    assert site.reopened().agent.pass_once()


def test_a_new_flower_key_is_handed_over_by_the_evidence_key(site, server):
    home = turn(site, KeyKind.FLOWER)
    request = server.requests[-1]
    assert open_card_change(request.continuity, home.evidence_key.public) == request.site_card == home.card_file.read_bytes()
    assert request.rotation == b""


def test_a_new_evidence_key_is_handed_over_by_both_and_cosigns_from_then_on(site, server):
    assert site.agent.pass_once()
    old = site.home.evidence_key.public
    home = turn(site, KeyKind.EVIDENCE)
    leaf = read_leaf(server.requests[-1].rotation)
    assert isinstance(leaf, KeyRotated)
    assert leaf.authentic
    assert (leaf.old_key, leaf.new_key) == (old, home.evidence_key.public)
    assert home.former_keys == (old,)
    again = site.reopened()
    try:
        assert again.agent.pass_once()
        assert again.codes() == [], "the rotation in the log is this site's own"
        assert server.cosigned[-1][0] == 2
        receipts = {read_leaf(own.leaf).kind: own.receipt for own in again.store.own_leaves()}
        assert receipts["key-rotated"] is not None
    finally:
        again.close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_refused_rotation_leaves_the_key_in_use(kind, site, server):
    before = fingerprints(site.home.keys)

    def refuse(request, honest):
        raise Refused("PF418")

    server.lies = {"RotateKey": refuse, "Renew": refuse}
    with pytest.raises(TransportError, match="PF418"):
        turn(site, kind)
    assert fingerprints(site.home.keys) == before
    assert SiteHome(site.home.root).former_keys == ()


@pytest.mark.parametrize("stopped_at", ["answer", "rotation.leaf", "former-keys.json", "site-card.dsse", "promote"])
def test_an_evidence_rotation_that_was_cut_short_is_finished_with_the_same_key(stopped_at, site, server, monkeypatch):
    write = files.write_atomic

    def killed(path, data, **options):
        if path.name == stopped_at:
            raise KeyboardInterrupt
        write(path, data, **options)

    def lose(request, honest):
        raise Refused("PF419")

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_atomic", killed)
        if stopped_at == "promote":
            patch.setattr("pathfed_client.io.site_keys.FileKeys.promote", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        if stopped_at == "answer":
            server.lies["RotateKey"] = lose
        with pytest.raises((KeyboardInterrupt, TransportError)):
            turn(site, KeyKind.EVIDENCE)
    server.lies.clear()
    staged = site.home.keys.evidence_key(staged=True).public
    home = turn(site, KeyKind.EVIDENCE)
    assert home.evidence_key.public == staged
    sent = {request.rotation for request in server.requests if request.DESCRIPTOR.name == "RotateKeyRequest"}
    assert len(sent) == 1, "the same leaf, so that the log holds it once"
    assert len(home.former_keys) == 1


def test_the_evidence_key_waits_for_words_on_their_way(site, server):
    site.store.add_word(b"word", b"leaf", 1.0)
    with pytest.raises(TransportError, match="PF439"):
        turn(site, KeyKind.EVIDENCE)
    assert "RotateKey" not in server.calls
    assert not site.home.keys.is_staged(KeyKind.EVIDENCE)
    site.agent.pass_once()
    turn(site, KeyKind.EVIDENCE)


def charge(home: SiteHome, store, number: int) -> None:
    site_ledger(store, home.evidence_key, home.policy, home.run_secrets, former=home.former_keys).charge(
        release_id=digest.of_value(number),
        plan=digest.of_bytes(b"plan"),
        run=run_name("run-1"),
        round_index=number,
        event=PrivacyEvent(sampling_rate=0.01, noise_multiplier=4.0, steps=1),
        plan_delta=1e-6,
        plan_limit=3.0,
        now=1000.0 + number,
    )


def verified(home: SiteHome, store) -> int:
    ledger = site_ledger(store, home.evidence_key, home.policy, home.run_secrets, former=home.former_keys)
    return len(ledger.verify())


def test_the_ledger_goes_on_after_a_rotation_and_the_old_key_signs_no_more(site, server):
    old = site.home.evidence_key
    charge(site.home, site.store, 1)
    home = turn(site, KeyKind.EVIDENCE)
    assert verified(home, site.store) == 1
    charge(home, site.store, 2)
    assert verified(home, site.store) == 2
    first, second = site.store.entries()
    chain = ChainReader(old.public, home.evidence_key.public)
    assert len(chain.read([first, second]).entries) == 2
    forged = dsse.seal(dsse.parse(second).payload, LEDGER_TYPE, old)
    assert len(chain.read([first, forged]).entries) == 2, "before the new key has signed, the old one may"
    third = replace(
        LedgerEntry.from_payload(dsse.parse(second).payload), sequence=3, previous=digest.of_bytes(second), release_id=digest.of_bytes(b"3")
    )
    with pytest.raises(PrivacyError, match="had been replaced"):
        chain.read([first, second, dsse.seal(third.to_payload(), LEDGER_TYPE, old)])


def test_without_the_record_of_former_keys_the_ledger_is_not_this_sites(site, server):
    charge(site.home, site.store, 1)
    home = turn(site, KeyKind.EVIDENCE)
    (home.root / "former-keys.json").unlink()
    with pytest.raises(PrivacyError, match="PF304"):
        verified(SiteHome(home.root), site.store)
    (home.root / "former-keys.json").write_text('["nonsense"]')
    with pytest.raises(HostError, match="PF906"):
        SiteHome(home.root).former_keys  # noqa: B018 - reading is what fails


def test_a_running_site_keeps_its_flower_and_evidence_keys(site, server):
    with hold(site.home, "site"):
        for kind in (KeyKind.FLOWER, KeyKind.EVIDENCE):
            with pytest.raises(HostError, match="PF904"):
                app.rotate_key(SiteHome(site.home.root), kind)
        shown = app.rotate_key(SiteHome(site.home.root), KeyKind.TLS)
    assert shown["tls"] != fingerprints(SiteHome(site.home.root).keys)[KeyKind.EVIDENCE]


def test_a_home_that_only_has_cards_rotates_nothing(world, tmp_path):
    home = world.init(tmp_path / "home")
    with pytest.raises(TransportError, match="PF430"):
        app.rotate_key(home, KeyKind.EVIDENCE)
