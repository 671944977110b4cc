from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pathfed_client.gate.offer import check_bounds, check_deadline, check_order, open_offer, reply_time
from pathfed_common import digest
from pathfed_common.errors import ErrorCode, TransportError
from pathfed_common.ids import RunName, SiteName
from pathfed_common.plan import RoundsPlan
from pathfed_common.protocol.messages import OFFER_TYPE, RoundOffer
from pathfed_common.provenance import dsse
from pathfed_common.provenance.keys import SigningKey
from pathfed_common.units import CLOCK_SKEW_S

KEY = SigningKey.generate()
STATE = b"base state"
OFFER = RoundOffer(
    run=RunName("run"),
    site=SiteName("site-a"),
    round_index=3,
    plan=digest.of_bytes(b"plan"),
    base_state=digest.of_bytes(STATE),
    base_state_bytes=len(STATE),
    offered_at=1000.0,
    deadline=1600.0,
)


def code(*arguments) -> ErrorCode:
    with pytest.raises(TransportError) as caught:
        open_offer(*arguments)
    return caught.value.code


def test_an_offer_of_the_server_for_this_site_is_opened():
    assert open_offer(dsse.seal(OFFER.to_bytes(), OFFER_TYPE, KEY), KEY.public, SiteName("site-a")) == OFFER


def test_another_key_another_type_and_another_site_are_not_authentic():
    envelope = dsse.seal(OFFER.to_bytes(), OFFER_TYPE, KEY)
    assert code(envelope, SigningKey.generate().public, SiteName("site-a")) is ErrorCode.OFFER_NOT_AUTHENTIC
    assert code(envelope, KEY.public, SiteName("site-b")) is ErrorCode.OFFER_NOT_AUTHENTIC
    other_type = dsse.seal(OFFER.to_bytes(), "application/vnd.pathfed.plan.v1+json", KEY)
    assert code(other_type, KEY.public, SiteName("site-a")) is ErrorCode.OFFER_NOT_AUTHENTIC


def test_a_signed_text_that_is_no_offer_is_malformed():
    assert code(dsse.seal(b"{}", OFFER_TYPE, KEY), KEY.public, SiteName("site-a")) is ErrorCode.MESSAGE_MALFORMED


@given(st.binary(max_size=80))
def test_noise_is_not_authentic(data):
    assert code(data, KEY.public, SiteName("site-a")) is ErrorCode.OFFER_NOT_AUTHENTIC


@pytest.mark.parametrize(("last", "allowed"), [(None, True), (1, True), (2, True), (3, False), (4, False)])
def test_a_run_only_goes_forward(last, allowed):
    if allowed:
        check_order(OFFER, last, None)
    else:
        with pytest.raises(TransportError, match="PF409"):
            check_order(OFFER, last, digest.of_bytes(b"update"))


@given(st.floats(0.5, 86400), st.floats(-1e5, 1e6))
def test_a_reply_leaves_at_the_first_whole_slot_after_now(slot, after):
    now = OFFER.offered_at + after
    at = reply_time(OFFER, slot, now)
    slots = (at - OFFER.offered_at) / slot
    assert slots == pytest.approx(max(1, round(slots)))
    assert at >= now - 1e-6
    assert at - max(now, OFFER.offered_at) <= slot * (1 + 1e-9) + 1e-6


@pytest.mark.parametrize(("after", "slots"), [(-50.0, 1), (0.0, 1), (0.1, 1), (5.0, 1), (5.1, 2), (10.0, 2), (601.0, 121)])
def test_the_slots_are_counted_from_the_offer(after, slots):
    assert reply_time(OFFER, 5.0, OFFER.offered_at + after) == OFFER.offered_at + 5.0 * slots


def test_an_offer_counts_until_its_deadline_and_not_after() -> None:
    check_deadline(OFFER, OFFER.deadline)
    with pytest.raises(TransportError, match=r"PF409.*deadline"):
        check_deadline(OFFER, OFFER.deadline + 0.1)


ROUNDS = RoundsPlan(count=3, deadline_s=600.0)


@pytest.mark.parametrize(
    ("changes", "now", "allowed"),
    [
        ({}, 1000.0, True),
        ({}, 1000.0 - CLOCK_SKEW_S, True),
        ({}, 999.0 - CLOCK_SKEW_S, False),
        ({}, 1e9, True),
        ({"round_index": 4}, 1000.0, False),
        ({"round_index": 10**18}, 1000.0, False),
        ({"deadline": 1601.0}, 1000.0, True),
        ({"deadline": 1602.0}, 1000.0, False),
        ({"deadline": 999.0}, 1000.0, False),
        ({"deadline": 1000.0}, 1000.0, True),
    ],
)
def test_an_offer_stays_within_the_plan_it_names(changes, now, allowed) -> None:
    offer = replace(OFFER, **changes)
    if allowed:
        check_bounds(offer, ROUNDS, now)
    else:
        with pytest.raises(TransportError, match=r"PF409.*nothing was charged"):
            check_bounds(offer, ROUNDS, now)
