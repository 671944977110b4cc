"""What the site keeps of its talk with the server, for good where it is evidence."""

import sqlite3
from contextlib import closing

import pytest

from pathfed_client.io.server_records import Alarm, OwnLeaf, ReceivedPlan
from pathfed_client.io.site_store import SiteStore
from pathfed_common import digest
from pathfed_common.errors import ErrorCode

PLAN = ReceivedPlan(plan=digest.of_bytes(b"plan"), signed_plan=b"signed", at=5.0)
ALARM = Alarm(at=1.0, code=ErrorCode.RECORD_CHANGED, subject="7", detail="seen", evidence=b"note")


@pytest.fixture
def store(tmp_path):
    with SiteStore(tmp_path / "site.db") as opened:
        yield opened


def test_a_plan_is_kept_once(store):
    assert store.add_received_plan(PLAN)
    assert not store.add_received_plan(PLAN)
    assert store.received_plans() == [PLAN]
    assert store.received_plan(PLAN.plan) == PLAN
    assert store.received_plan(digest.of_bytes(b"another")) is None


def test_a_word_waits_until_the_server_has_taken_it_and_then_its_leaf_is_promised(store):
    store.add_word(b"first", b"leaf 1", 1.0)
    store.add_word(b"second", b"leaf 2", 2.0)
    store.add_word(b"first", b"leaf 1", 9.0)
    first, second = store.words(waiting=True)
    assert (first.envelope, first.at, second.envelope) == (b"first", 1.0, b"second")
    store.word_refused(first, ErrorCode.SITE_REVOKED)
    assert store.words(waiting=True)[0].code is ErrorCode.SITE_REVOKED
    assert store.own_leaves() == []
    store.word_taken(first, 3.0)
    assert [word.envelope for word in store.words(waiting=True)] == [b"second"]
    assert [word.taken_at for word in store.words()] == [3.0, None]
    assert store.own_leaves() == [OwnLeaf(leaf=b"leaf 1", promised_at=3.0)]


def test_a_receipt_is_for_good(store):
    store.add_own_leaf(b"leaf", None)
    store.put_receipt(b"leaf", b"proof", 4.0)
    store.put_receipt(b"leaf", b"another", 5.0)
    assert store.own_leaves() == [OwnLeaf(leaf=b"leaf", receipt=b"proof", received_at=4.0)]
    assert store.own_leaves(without_receipt=True) == []


def test_an_alarm_stands_until_it_is_ended_and_stays_on_record(store):
    assert store.raise_alarm(ALARM)
    assert not store.raise_alarm(ALARM)
    store.end_alarm(ALARM.code, "another", 2.0)
    assert store.alarms() == [ALARM]
    store.end_alarm(ALARM.code, ALARM.subject, 2.0)
    assert store.alarms() == []
    assert store.raise_alarm(ALARM), "it is an alarm again when it comes back"
    assert [alarm.ended_at for alarm in store.alarms(standing=False)] == [2.0, None]


def test_facts_are_the_latest(store):
    store.set_facts({"a": "1", "b": "2"})
    store.set_facts({"a": "3"})
    assert store.facts() == {"a": "3", "b": "2"}


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE word SET envelope = x'00'",
        "DELETE FROM word",
        "UPDATE own_leaf SET receipt = NULL",
        "DELETE FROM own_leaf",
        "DELETE FROM alarm",
    ],
)
def test_evidence_cannot_be_rewritten_through_the_database(store, statement):
    store.add_word(b"first", b"leaf", 1.0)
    store.word_taken(store.words()[0], 2.0)
    store.put_receipt(b"leaf", b"proof", 3.0)
    store.raise_alarm(ALARM)
    with closing(sqlite3.connect(store.path)) as connection, pytest.raises(sqlite3.IntegrityError):
        connection.execute(statement)
