"""What an entry of the egress record may say, and its bytes."""

import json
from dataclasses import replace
from typing import Any

import pytest

from pathfed_client.egress.entry import EgressEntry, EgressKind, Outgoing
from pathfed_client.egress.report import EgressTotals
from pathfed_common import digest

UPDATE = Outgoing(
    destination="server.example:9092",
    kind=EgressKind.UPDATE,
    size=1_000,
    digest=digest.of_bytes(b"update"),
    plan=digest.of_bytes(b"plan"),
    run="run-1",
    round_index=3,
    epsilon_charged=0.25,
)
OPENED = Outgoing(
    destination="server.example:9092", kind=EgressKind.CONNECTION_OPENED, size=0, digest=digest.of_bytes(b""), connection="1-1"
)


@pytest.mark.parametrize("sent", [UPDATE, OPENED, replace(OPENED, via="proxy.example:3128")])
def test_an_entry_reads_back_as_it_was_written(sent):
    entry = EgressEntry(sequence=7, previous=digest.of_bytes(b"before"), at=1_764_490_000.125, sent=sent)
    assert EgressEntry.from_bytes(entry.to_bytes()) == entry
    assert json.loads(entry.to_bytes())["at_text"] == "2025-11-30T08:06:40.125+00:00"


@pytest.mark.parametrize(
    "changes",
    [
        {"destination": ""},
        {"destination": "a\nb:1"},
        {"size": -1},
        {"size": 1.5},
        {"size": True},
        {"digest": "sha256:short"},
        {"plan": "md5:1"},
        {"run": "../run"},
        {"epsilon_charged": -0.1},
        {"epsilon_charged": float("nan")},
        {"epsilon_charged": float("inf")},
        {"connection": "1-1"},
        {"kind": EgressKind.CONNECTION_SENT},
    ],
    ids=str,
)
def test_what_cannot_have_left_is_refused(changes: dict[str, Any]):
    with pytest.raises(ValueError):
        replace(UPDATE, **changes)


@pytest.mark.parametrize("field", ["size", "kind", "run", "at", "at_text", "previous", "sequence", "version", "epsilon_charged"])
def test_bytes_of_which_any_field_is_changed_or_missing_are_no_entry_or_another_one(field):
    entry = EgressEntry(sequence=2, previous=digest.of_bytes(b"before"), at=5.0, sent=UPDATE)
    raw = json.loads(entry.to_bytes())
    del raw[field]
    with pytest.raises(ValueError, match=r"not an egress entry|canonical"):
        EgressEntry.from_bytes(digest.canonical(raw))
    with pytest.raises(ValueError, match=r"canonical|not an egress entry|Expecting"):
        EgressEntry.from_bytes(entry.to_bytes() + b" ")


def test_sums_keep_messages_and_connections_apart():
    totals = EgressTotals()
    connection = [
        OPENED,
        replace(OPENED, kind=EgressKind.CONNECTION_SENT, size=700),
        replace(OPENED, connection="1-2"),
        replace(OPENED, kind=EgressKind.CONNECTION_CLOSED, size=500),
    ]
    for number, sent in enumerate([UPDATE, replace(UPDATE, epsilon_charged=0.0), *connection], start=1):
        totals.add(EgressEntry(sequence=number, previous=None, at=1.0, sent=sent))
    assert totals.to_dict() == {
        "bytes_sent": {"server.example:9092": 1200},
        "messages": {"update": {"messages": 2, "bytes": 2000}},
        "epsilon_charged": 0.25,
        "connections_not_closed": 1,
    }
