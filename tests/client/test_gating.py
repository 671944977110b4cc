"""What a site's people have decided is asked at every step of a round: approval, policy as it is now, hours, second person, stop."""

import time
from collections.abc import Callable, Iterator

import pytest
from answering_site import OFFERED_AT, Site, bytes_of, opened

from pathfed_client import deciding
from pathfed_client.budget.ledger import Ledger
from pathfed_client.computing import RoundComputer
from pathfed_client.gate.ports import Answer
from pathfed_client.home import SiteHome
from pathfed_client.io.site_store import SiteStore
from pathfed_common import digest
from pathfed_common.provenance import cosigned
from pathfed_common.provenance.keys import SigningKey

ANNA, BEN, OPERATOR = (SigningKey.generate() for _ in range(3))


@pytest.fixture
def site(copy_home: Callable[..., SiteHome]) -> Iterator[Site]:
    with opened(copy_home()) as made:
        yield made


def change_policy(site: Site, **keys: object) -> str:
    """Write keys into policy.toml; its text before."""
    path = site.home.root / "policy.toml"
    before = path.read_text()
    lines = [line for line in before.splitlines() if line.split(" ")[0] not in keys]
    path.write_text("\n".join([*lines, *(f"{key} = {value}" for key, value in keys.items()), ""]))
    return before


def refused(site: Site, world, code: str, **offer: object) -> None:
    assert site.answer(world.offer(**offer), world.base_state) == Answer(code=code)
    assert site.charges() == 0
    assert site.released() == []


def test_a_site_that_approved_a_plan_refuses_another_of_the_same_name(world, site) -> None:
    privacy = world.plan.privacy.model_copy(update={"noise_multiplier": 0.9})
    other = world.plan.model_copy(update={"privacy": privacy})
    assert (other.name, other.digest != world.plan.digest) == (world.plan.name, True)
    refused(site, world, "PF407", plan=other.digest)
    deciding.find_plan(site.home, site.store, str(world.sign("same-name.dsse", other)))  # that it came here changes nothing
    refused(site, world, "PF407", plan=other.digest)


@pytest.mark.parametrize(
    ("keys", "code"),
    [
        ({"max_epsilon": 0.1}, "PF307"),
        ({"max_epsilon_per_plan": 0.1}, "PF307"),
        ({"objectives": '["dino"]'}, "PF307"),
        ({"encoders": '["vit_small_patch16_224"]'}, "PF307"),
        ({"max_parameters": 1000}, "PF307"),
        ({"hours": '"19:00-07:00"'}, "PF441"),  # the offer comes on a Monday, 13:46 UTC
        ({"hours": '"08:00-13:30"', "time_zone": '"UTC"'}, "PF441"),
        ({"second_person": "true"}, "PF442"),
        ({"operators": f'["{OPERATOR.public.to_text()}"]'}, "PF106"),
        ({"operators": '["x"]'}, "PF905"),
        ({"unknown": 1}, "PF905"),
    ],
)
def test_a_policy_that_was_changed_since_the_approval_counts_from_the_next_round_on(world, site, keys, code) -> None:
    before = change_policy(site, **keys)
    refused(site, world, code)
    (site.home.root / "policy.toml").write_text(before)
    assert bytes_of(site.answer(world.offer(), world.base_state))


def test_hours_by_the_sites_own_clock_let_a_round_begin(world, site) -> None:
    change_policy(site, hours='"14:00-15:00"', time_zone='"Europe/Berlin"')  # 13:46 UTC
    assert bytes_of(site.answer(world.offer(), world.base_state))


def test_devices_threads_and_limits_of_a_changed_policy_are_taken_up(world, site) -> None:
    first = site.answer(world.offer(), world.base_state)
    assert site.statement(first).reply_slot_s == 5.0
    change_policy(site, max_epsilon=50.0, reply_slots="false", tile_workers=0)
    times = {"offered_at": OFFERED_AT + 100, "deadline": OFFERED_AT + 160}
    second = site.answer(world.offer(round_index=2, **times), world.base_state)
    assert site.statement(second).reply_slot_s is None
    assert site.charges() == 2


def test_two_people_must_stand_under_an_approval_where_the_policy_wants_them(world, site) -> None:
    for name, key in (("anna", ANNA), ("ben", BEN)):
        deciding.add_approver(site.home, name, key.public)
    change_policy(site, second_person="true")
    refused(site, world, "PF442")
    home = SiteHome(site.home.root)
    one = deciding.approve(home, world.plan.name, 4, signer=deciding.Signer("anna", ANNA))
    assert (one.approval, one.signed_by) == (None, ["anna"])
    refused(site, world, "PF442")
    two = deciding.approve(home, world.plan.name, 4, signer=deciding.Signer("ben", BEN))
    assert two.signed_by == ["anna", "ben"]
    deciding.remove_approver(home, "ben")
    refused(site, world, "PF442")
    deciding.add_approver(home, "ben", BEN.public)
    assert bytes_of(site.answer(world.offer(), world.base_state))


def test_an_operators_signature_may_come_after_the_approval(world, site, tmp_path) -> None:
    change_policy(site, operators=f'["{OPERATOR.public.to_text()}"]')
    refused(site, world, "PF106")
    signed = tmp_path / "signed.dsse"
    signed.write_bytes(cosigned.cosign(world.signed_plan.read_bytes(), OPERATOR))
    deciding.find_plan(site.home, site.store, str(signed))
    assert bytes_of(site.answer(world.offer(), world.base_state))


def revoke(site: Site) -> None:
    deciding.revoke(site.home, "tiny", "we have second thoughts")


def stop(site: Site) -> None:
    site.home.stop_switch.throw(at=time.time(), reason="")


MOMENTS = {
    "while the base state is tried": (RoundComputer, "prepare", 0),
    "while it is charged": (Ledger, "charge", 1),
    "while it is computed": (RoundComputer, "run", 1),
}


@pytest.mark.parametrize(("act", "code"), [(revoke, "PF407"), (stop, "PF440")])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_revocation_or_stop_during_a_round_lets_nothing_leave(world, site, monkeypatch, act, code, moment) -> None:
    kind, name, charges = MOMENTS[moment]
    method = getattr(kind, name)

    def meanwhile(*arguments: object, **named: object) -> object:
        result = method(*arguments, **named)
        act(site)
        return result

    monkeypatch.setattr(kind, name, meanwhile)
    assert site.answer(world.offer(), world.base_state) == Answer(code=code)
    assert (site.charges(), site.released()) == (charges, [])
    assert site.store.get_sealed("run-1", 1) is None


@pytest.mark.parametrize(("act", "code"), [(revoke, "PF407"), (stop, "PF440")])
def test_a_revocation_or_stop_between_seal_and_sending_lets_nothing_leave(world, site, monkeypatch, act, code) -> None:
    put = SiteStore.put_sealed

    def meanwhile(self: SiteStore, *arguments: object, **named: object) -> None:
        put(self, *arguments, **named)  # type: ignore[arg-type]
        act(site)

    monkeypatch.setattr(SiteStore, "put_sealed", meanwhile)
    assert site.answer(world.offer(), world.base_state) == Answer(code=code)
    assert site.charges() == 1
    assert site.answer(world.offer(), world.base_state) == Answer(code=code)  # nor is it sent again


def test_a_sealed_answer_goes_out_again_outside_the_hours_but_not_from_a_stopped_site(world, site) -> None:
    first = bytes_of(site.answer(world.offer(), world.base_state))
    change_policy(site, hours='"19:00-07:00"')
    assert bytes_of(site.answer(world.offer(), world.base_state)) == first
    stop(site)
    assert site.answer(world.offer(), world.base_state) == Answer(code="PF440")
    site.home.stop_switch.release()
    assert bytes_of(site.answer(world.offer(), world.base_state)) == first
    revoke(site)
    assert site.answer(world.offer(), world.base_state) == Answer(code="PF407")


def test_what_was_revoked_is_not_approved_again_and_the_word_names_the_approval(world, site) -> None:
    approved = site.store.approval(world.plan.digest)
    assert approved is not None
    done = deciding.revoke(site.home, world.plan.digest[7:20])
    assert done.approval == digest.of_bytes(approved.signed_approval)
    refused(site, world, "PF407")
