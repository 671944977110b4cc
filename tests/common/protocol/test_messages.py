import json
import math
from dataclasses import asdict, fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pathfed_common import digest
from pathfed_common.errors import TransportError
from pathfed_common.ids import RunName, SiteName
from pathfed_common.protocol.messages import RoundOffer

NAMES = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,20}[a-z0-9])?", fullmatch=True)
DIGESTS = st.binary(max_size=8).map(digest.of_bytes)
TIMES = st.floats(min_value=1.0, max_value=4e9)
OFFERS = st.builds(
    RoundOffer,
    run=NAMES,
    site=NAMES,
    round_index=st.integers(1, 10**6),
    plan=DIGESTS,
    base_state=DIGESTS,
    base_state_bytes=st.integers(1, 2**48),
    offered_at=TIMES,
    deadline=TIMES,
)
OFFER = RoundOffer(
    run=RunName("run"),
    site=SiteName("site-a"),
    round_index=3,
    plan=digest.of_bytes(b"plan"),
    base_state=digest.of_bytes(b"state"),
    base_state_bytes=10,
    offered_at=1_700_000_000.25,
    deadline=1_700_000_600.0,
)
KEYS = ["version", *(field.name for field in fields(RoundOffer))]


def changed(**changes: Any) -> bytes:
    return digest.canonical({**json.loads(OFFER.to_bytes()), **changes})


@given(OFFERS)
def test_an_offer_is_read_back_as_it_was(offer):
    assert RoundOffer.from_bytes(offer.to_bytes()) == offer


@given(OFFERS, OFFERS)
def test_equal_bytes_mean_equal_offers(left, right):
    assert (left.to_bytes() == right.to_bytes()) == (left == right)


def refused(data: bytes) -> None:
    with pytest.raises(TransportError, match="PF405"):
        RoundOffer.from_bytes(data)


@pytest.mark.parametrize("key", KEYS)
def test_a_missing_key_is_refused(key):
    raw = json.loads(OFFER.to_bytes())
    del raw[key]
    refused(digest.canonical(raw))


@given(st.text(max_size=10).filter(lambda key: key not in KEYS))
def test_an_unknown_key_is_refused(key):
    refused(changed(**{key: 1}))


WRONG: dict[str, list[Any]] = {
    "version": [0, 2, True, 1.0, "1", None],
    "run": [None, 1, "", "A", "a/b", ["a"]],
    "site": [None, 1, "", "../a", {"a": 1}],
    "round_index": [None, 0, -1, 1.0, True, "1", [1]],
    "plan": [None, 1, "", "sha256:0", [], OFFER.plan.upper()],
    "base_state": [None, 1, "", "x", {}],
    "base_state_bytes": [None, 0, -5, 1.5, True, "10"],
    "offered_at": [None, 0, -1.0, True, "1", [], 10**400],
    "deadline": [None, 0, -1.0, False, "1", {}, 10**400],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in WRONG.items() for value in values])
def test_a_value_of_the_wrong_type_or_out_of_bounds_is_refused(key, value):
    refused(changed(**{key: value}))


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("key", ["offered_at", "deadline"])
def test_times_that_are_not_finite_are_refused(key, number):
    data = OFFER.to_bytes().replace(f'"{key}":{getattr(OFFER, key)}'.encode(), f'"{key}":{number}'.encode())
    assert number.encode() in data
    refused(data)


def test_bytes_that_are_not_canonical_are_refused():
    """Two keys of one name, blanks or another order could mean two things to two readers."""
    data = OFFER.to_bytes()
    refused(data.replace(b'{"base', b'{"round_index":4,"base', 1))
    refused(b" " + data)
    refused(json.dumps(json.loads(data)).encode())
    refused(data.decode().encode("utf-16"))


@given(st.binary(max_size=60) | st.text(max_size=40).map(str.encode))
def test_noise_is_refused_with_the_code(data):
    refused(data)


@pytest.mark.parametrize("data", [b"", b"null", b"1", b"[]", b'"x"', b"{}", b"[" * 100_000, b"\xff"])
def test_other_json_is_refused_with_the_code(data):
    refused(data)


def test_a_refusal_shows_none_of_the_offers_numbers_as_code():
    """What leaves is the code alone; the sentence stays with the reader."""
    with pytest.raises(TransportError) as caught:
        RoundOffer.from_bytes(changed(round_index=0))
    assert caught.value.code.value == "PF405"
    assert math.isfinite(asdict(OFFER)["deadline"])
