"""DSSE envelopes: the specification's vector, strictness, and a change of any byte."""

import base64
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pathfed_common import digest
from pathfed_common.errors import ErrorCode, ProvenanceError
from pathfed_common.provenance import dsse
from pathfed_common.provenance.keys import SigningKey

_TYPE = "application/vnd.pathfed.test+json"


@pytest.fixture(scope="module")
def key() -> SigningKey:
    return SigningKey.generate()


@pytest.fixture(scope="module")
def envelope(key: SigningKey) -> bytes:
    return dsse.seal(b'{"a":1}', _TYPE, key)


def _refused(data: bytes, key: SigningKey, payload_type: str = _TYPE) -> ProvenanceError:
    with pytest.raises(ProvenanceError) as caught:
        dsse.open_envelope(data, payload_type=payload_type, keys=key.public)
    assert caught.value.code == ErrorCode.RECORD_SIGNATURE
    return caught.value


def test_pae_equals_the_specifications_vector() -> None:
    # https://github.com/secure-systems-lab/dsse/blob/v1.0.0/protocol.md, "Test Vectors".
    assert dsse.pae("http://example.com/HelloWorld", b"hello world") == b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"


def test_pae_counts_bytes_not_letters() -> None:
    assert dsse.pae("é", "é".encode()) == b"DSSEv1 2 \xc3\xa9 2 \xc3\xa9"


@settings(deadline=None)
@given(first=st.tuples(st.text(max_size=6), st.binary(max_size=6)), second=st.tuples(st.text(max_size=6), st.binary(max_size=6)))
def test_pae_is_injective(first: tuple[str, bytes], second: tuple[str, bytes]) -> None:
    assert (dsse.pae(*first) == dsse.pae(*second)) == (first == second)


def test_opens_with_the_key_and_from_a_key_ring(key: SigningKey, envelope: bytes) -> None:
    assert dsse.open_envelope(envelope, payload_type=_TYPE, keys=key.public) == b'{"a":1}'
    ring = {k.key_id: k for k in (SigningKey.generate().public, key.public)}
    assert dsse.open_envelope(envelope, payload_type=_TYPE, keys=ring) == b'{"a":1}'
    assert dsse.seal(b'{"a":1}', _TYPE, key) == envelope


def test_another_key_or_type_is_refused(key: SigningKey, envelope: bytes) -> None:
    assert "not trusted" in str(_refused(envelope, SigningKey.generate()))
    assert "type" in str(_refused(envelope, key, "application/vnd.pathfed.other+json"))
    with pytest.raises(ProvenanceError, match="PF602"):
        dsse.open_envelope(envelope, payload_type=_TYPE, keys={})


def test_ring_that_files_a_key_under_another_id_is_refused(key: SigningKey, envelope: bytes) -> None:
    with pytest.raises(ProvenanceError, match="PF602"):
        dsse.open_envelope(envelope, payload_type=_TYPE, keys={key.key_id: SigningKey.generate().public})


def test_a_change_of_any_byte_is_found(key: SigningKey, envelope: bytes) -> None:
    for place in range(len(envelope)):
        for flip in (0x01, 0x20, 0x80):
            changed = bytearray(envelope)
            changed[place] ^= flip
            _refused(bytes(changed), key)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_cuts_and_insertions_are_found(data: st.DataObject) -> None:
    key = SigningKey.generate()
    envelope = dsse.seal(b"payload", _TYPE, key)
    place = data.draw(st.integers(0, len(envelope) - 1))
    if data.draw(st.booleans()):
        changed = envelope[:place] + data.draw(st.sampled_from([b" ", b"\n", b"0", b'"', b"A"])) + envelope[place:]
    else:
        changed = envelope[:place] + envelope[place + 1 :]
    if changed != envelope:
        _refused(changed, key)


def test_equivalent_but_not_canonical_envelopes_are_refused(key: SigningKey, envelope: bytes) -> None:
    raw = json.loads(envelope)
    sig = raw["signatures"][0]
    variants = {
        "spaces": json.dumps(raw).encode(),
        "order": json.dumps(dict(reversed(raw.items())), separators=(",", ":")).encode(),
        "extra": digest.canonical({**raw, "note": "x"}),
        "extra in signature": digest.canonical({**raw, "signatures": [{**sig, "note": "x"}]}),
        "two signatures": digest.canonical({**raw, "signatures": [sig, sig]}),
        "no signature": digest.canonical({**raw, "signatures": []}),
        "url-safe base64": digest.canonical({**raw, "payload": base64.urlsafe_b64encode(b"\xff\xfe\xfd").decode()}),
        "escape": envelope.replace(b"payloadType", b"payload\\u0054ype"),
        "double key": b'{"payload":"",' + envelope[1:],
        "no keyid": digest.canonical({**raw, "signatures": [{"sig": sig["sig"]}]}),
    }
    for data in variants.values():
        _refused(data, key)


@pytest.mark.parametrize(
    "data", [b"", b"{}", b"[]", b"null", b"\xff", b'"x"', b"[" * 100_000, b'{"payload":1,"payloadType":2,"signatures":3}']
)
def test_bytes_that_are_no_envelope_are_refused(data: bytes, key: SigningKey) -> None:
    _refused(data, key)
