"""Envelopes of several signatures: one form, every signature verified by the key that is asked for, and nothing else counted."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pathfed_common import digest
from pathfed_common.errors import ProvenanceError
from pathfed_common.provenance import cosigned, dsse
from pathfed_common.provenance.keys import SigningKey

TYPE = "application/vnd.pathfed.test+json"
ANNA, BEN, CARLA = (SigningKey.generate() for _ in range(3))
ONE = dsse.seal(b'{"a":1}', TYPE, ANNA)
TWO = cosigned.cosign(ONE, BEN)


def test_with_one_signature_the_bytes_are_those_of_a_plain_envelope():
    assert cosigned.parse(ONE).to_bytes() == ONE
    assert cosigned.cosign(ONE, ANNA) == ONE


def test_signatures_come_in_any_order_and_give_the_same_bytes():
    other = cosigned.cosign(dsse.seal(b'{"a":1}', TYPE, BEN), ANNA)
    assert other == TWO == cosigned.merge(ONE, dsse.seal(b'{"a":1}', TYPE, BEN))
    assert cosigned.merge(TWO, ONE) == TWO


def test_those_count_who_signed():
    found = cosigned.parse(TWO)
    assert found.signed_by([ANNA.public, BEN.public, CARLA.public]) == {ANNA.key_id, BEN.key_id}
    assert found.signed_by([CARLA.public]) == found.signed_by([]) == frozenset()
    assert cosigned.open_cosigned(TWO, payload_type=TYPE, key=BEN.public).payload == b'{"a":1}'
    with pytest.raises(ProvenanceError, match="PF602"):
        cosigned.open_cosigned(TWO, payload_type=TYPE, key=CARLA.public)
    with pytest.raises(ProvenanceError, match="PF602"):
        cosigned.open_cosigned(TWO, payload_type="another", key=ANNA.public)


def test_a_signature_under_another_keys_id_counts_for_nobody():
    found = cosigned.parse(TWO)
    swapped = {ANNA.key_id: found.signatures[BEN.key_id], BEN.key_id: found.signatures[ANNA.key_id]}
    assert cosigned.Cosigned(found.payload, TYPE, swapped).signed_by([ANNA.public, BEN.public]) == frozenset()


def test_other_payloads_are_not_merged():
    with pytest.raises(ProvenanceError, match="PF602"):
        cosigned.merge(ONE, dsse.seal(b'{"a":2}', TYPE, BEN))


def test_signatures_are_bounded():
    full = ONE
    for _ in range(cosigned.MOST_SIGNATURES - 1):
        full = cosigned.cosign(full, SigningKey.generate())
    with pytest.raises(ProvenanceError, match="PF602"):
        cosigned.cosign(full, BEN)
    assert cosigned.cosign(full, ANNA) == full


def _with(**changes: object) -> bytes:
    return digest.canonical({**json.loads(TWO), **changes})


def _entries() -> list[dict[str, str]]:
    found: list[dict[str, str]] = json.loads(TWO)["signatures"]
    return found


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"\xff",
        TWO + b" ",
        _with(signatures=[]),
        _with(signatures=_entries()[::-1]),
        _with(signatures=[_entries()[0], _entries()[0]]),
        _with(signatures=[{**_entries()[0], "more": "1"}]),
        _with(signatures=[{**_entries()[0], "sig": "AAAA"}]),
        _with(signatures=[{**_entries()[0], "keyid": 1}]),
        _with(payload=1),
        _with(more=1),
        b"[" * 100_000,
    ],
)
def test_every_other_form_is_refused(data):
    with pytest.raises(ProvenanceError, match="PF602"):
        cosigned.parse(data)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, len(TWO) - 1), st.integers(1, 255))
def test_a_change_of_any_byte_takes_at_least_one_signature_away(place, flip):
    changed = bytearray(TWO)
    changed[place] ^= flip
    try:
        found = cosigned.parse(bytes(changed))
    except ProvenanceError:
        return
    assert len(found.signed_by([ANNA.public, BEN.public])) < 2
