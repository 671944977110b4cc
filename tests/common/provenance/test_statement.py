"""Update statements: in-toto form, exact round trips, and nothing but the canonical bytes accepted."""

import json
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pathfed_common import digest
from pathfed_common.errors import ErrorCode, ProvenanceError
from pathfed_common.provenance import dsse
from pathfed_common.provenance.keys import SigningKey
from pathfed_common.provenance.statement import IN_TOTO_TYPE, UpdateStatement

Make = Callable[..., UpdateStatement]


def _refused(payload: bytes, code: ErrorCode = ErrorCode.RECORD_CHANGED) -> None:
    with pytest.raises(ProvenanceError) as caught:
        UpdateStatement.from_payload(payload)
    assert caught.value.code == code


def test_payload_is_an_in_toto_statement_about_the_update(make_statement: Make) -> None:
    raw = json.loads(make_statement().to_payload())
    assert set(raw) == {"_type", "subject", "predicateType", "predicate"}
    assert raw["_type"] == "https://in-toto.io/Statement/v1"
    assert raw["predicateType"] == "https://pathfed.dev/update/v1"
    (subject,) = raw["subject"]
    assert subject == {"name": "run-1/round-0002/a.safetensors", "digest": {"sha256": digest.of_bytes(b"update").removeprefix("sha256:")}}
    assert set(raw["predicate"]) == {field.name for field in fields(UpdateStatement)} - {"update"}


def test_whole_numbers_stay_whole_and_floats_stay_floats(make_statement: Make) -> None:
    statement = make_statement()
    again = UpdateStatement.from_payload(statement.to_payload())
    assert again == statement
    assert b'"update_bytes":1152921504606846977' in statement.to_payload()
    assert isinstance(again.update_bytes, int)
    assert b'"epsilon_total":2.0' in statement.to_payload()
    assert isinstance(again.epsilon_total, float)


@settings(deadline=None)
@given(
    epsilon=st.floats(0, 1e9),
    loss=st.floats(allow_nan=False, allow_infinity=False),
    index=st.integers(1, 2**62),
    slot=st.none() | st.floats(0.5, 1e5),
    previous=st.none() | st.binary(max_size=4).map(digest.of_bytes),
)
def test_every_statement_survives_the_round_trip(
    make_statement: Make, epsilon: float, loss: float, index: int, slot: float | None, previous: Any
) -> None:
    statement = make_statement(epsilon_plan=epsilon, round_index=index, reply_slot_s=slot, previous=previous)
    statement = replace(statement, figures=replace(statement.figures, loss_sum=loss))
    assert UpdateStatement.from_payload(statement.to_payload()) == statement


def test_envelope_opens_with_the_sites_key_alone(make_statement: Make) -> None:
    key, statement = SigningKey.generate(), make_statement()
    envelope = statement.to_envelope(key)
    assert envelope == statement.to_envelope(key)
    assert UpdateStatement.from_envelope(envelope, key.public) == statement
    for data, other in ((envelope, SigningKey.generate().public), (dsse.seal(statement.to_payload(), "application/json", key), key.public)):
        with pytest.raises(ProvenanceError) as caught:
            UpdateStatement.from_envelope(data, other)
        assert caught.value.code == ErrorCode.RECORD_SIGNATURE


def test_signed_bytes_that_are_no_statement_are_refused_as_such() -> None:
    key = SigningKey.generate()
    with pytest.raises(ProvenanceError) as caught:
        UpdateStatement.from_envelope(dsse.seal(b"{}", IN_TOTO_TYPE, key), key.public, where="statements/a")
    assert caught.value.code == ErrorCode.RECORD_CHANGED
    assert caught.value.where == "statements/a"


def test_every_other_byte_string_is_refused(make_statement: Make) -> None:
    raw = json.loads(make_statement().to_payload())
    predicate, subject = raw["predicate"], raw["subject"][0]

    def with_predicate(**change: Any) -> dict[str, Any]:
        return {**raw, "predicate": {**predicate, **change}}

    variants: list[Any] = [
        {**raw, "_type": "https://in-toto.io/Statement/v0.1"},
        {**raw, "predicateType": "https://pathfed.dev/update/v2"},
        {**raw, "extra": 1},
        {**raw, "subject": []},
        {**raw, "subject": [subject, subject]},
        {**raw, "subject": [{**subject, "name": "other"}]},
        {**raw, "subject": [{**subject, "digest": {"sha256": subject["digest"]["sha256"], "sha512": "00"}}]},
        {**raw, "subject": [{**subject, "digest": {"sha256": 5}}]},
        {**raw, "predicate": list(predicate)},
        with_predicate(update="sha256:" + "0" * 64),
        with_predicate(extra=None),
        with_predicate(round_index=2.0),
        with_predicate(round_index="2"),
        with_predicate(round_index=True),
        with_predicate(epsilon_plan=1),
        with_predicate(epsilon_plan="1.0"),
        with_predicate(site=5),
        with_predicate(previous=""),
        with_predicate(privacy=None),
        with_predicate(privacy={**predicate["privacy"], "unit": "tile"}),
        with_predicate(figures=[]),
        [],
        None,
    ]
    for variant in variants:
        _refused(digest.canonical(variant))
    payload = make_statement().to_payload()
    _refused(json.dumps(raw).encode())
    _refused(payload + b"\n")
    _refused(payload.replace(b'"epsilon_plan":1.0', b'"epsilon_plan":NaN'))
    _refused(payload.replace(b'"epsilon_plan":1.0', b'"epsilon_plan":1.00'))
    _refused(payload.replace(b'"round_index":2', b'"round_index":1,"round_index":2'))
    _refused(payload.replace(b'"site":"a"', b'"site":"\\u0061"'))
    _refused(b"\xff" + payload)
    _refused(b"[" * 200_000)


@pytest.mark.parametrize(
    "change",
    [
        {"site": "A b"},
        {"run": ""},
        {"round_index": 0},
        {"round_index": 1.0},
        {"update_bytes": 0},
        {"update_bytes": True},
        {"plan": "sha256:00"},
        {"epsilon_plan": -1.0},
        {"epsilon_total": float("nan")},
        {"delta_total": 0.0},
        {"delta_total": 1.0},
        {"epsilon_total": 10**400},
        {"reply_slot_s": 0.0},
        {"issued_at": 0.0},
        {"issued_at": float("inf")},
        {"previous": "x"},
        {"privacy": None},
    ],
    ids=str,
)
def test_values_out_of_bounds_cannot_be_stated(change: dict[str, Any], make_statement: Make) -> None:
    with pytest.raises((ValueError, OverflowError)):
        make_statement(**change)


@pytest.mark.parametrize(
    "change",
    [{"sampling_rate": 0}, {"sampling_rate": 1.5}, {"noise_multiplier": 0}, {"clip_norm": -1}, {"steps": 0}, {"delta": 1}],
    ids=str,
)
def test_privacy_events_out_of_bounds_cannot_be_stated(change: dict[str, Any], make_statement: Make) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        replace(make_statement().privacy, **change)
