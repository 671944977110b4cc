"""The log in the database: a leaf for everything recorded, in the same transaction, in one order, on SQLite and on PostgreSQL."""

import os
import threading
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import select
from tests.server.db.test_sql_store import AT, PLAN, RUN, A, B, C, approved, checkpoint, collected, enrol, envelopes, key_of, result

from pathfed_common import digest
from pathfed_common.errors import ErrorCode, ProvenanceError
from pathfed_common.ids import SiteName
from pathfed_common.provenance.keys import SigningKey, VerifyKey
from pathfed_common.provenance.log_leaves import (
    AnyLeaf,
    EncoderCommitted,
    PlanApproved,
    PlanPublished,
    Released,
    SiteAdmitted,
    SiteRevoked,
    StatementLogged,
    read_leaf,
    rotate_key,
)
from pathfed_common.provenance.merkle import leaf_hash
from pathfed_common.units import UtcSeconds
from pathfed_server.db import log_store, rounds_store, schema, sites_store
from pathfed_server.db.log_store import append_leaves
from pathfed_server.db.sql_store import SqlStore
from pathfed_server.provenance.log_ports import Cosignature, LogRecords

RELEASE = digest.of_bytes(b"release")


def leaves_of(store: SqlStore) -> list[AnyLeaf]:
    return [read_leaf(leaf) for leaf in store.log_leaves(0, store.log_size())]


def whole_run(store: SqlStore) -> None:
    """Two sites, a plan, approvals, a run of one round, its release, and a revocation."""
    enrol(store, B, A, C)
    store.add_plan(PLAN, name="p", canonical=b"{}", signed=b"signed", at=AT)
    for name in (A, B):
        store.add_approval(approved(name), at=AT)
    store.create_run(RUN, plan_digest=PLAN, sites=[B, A, C], at=AT)
    store.begin_attempt(RUN, at=AT)
    store.commit_initial(RUN, 1, checkpoint(0), at=AT)
    collected(store)
    store.commit_round(result(), envelopes())
    store.finish_run(RUN, 1, at=AT)
    store.add_release(RELEASE, run=RUN, at=AT)
    store.revoke_site(B, at=AT + 1)


def test_store_is_what_the_keeper_asks_for(store: SqlStore) -> None:
    port: LogRecords = store
    assert port is store


def test_everything_that_is_recorded_has_its_leaf_in_order(store: SqlStore) -> None:
    whole_run(store)
    admitted = [SiteAdmitted(site=name, evidence_key=VerifyKey.from_text(key_of(name)), at=UtcSeconds(AT)) for name in (B, A, C)]
    approvals = [PlanApproved(site=name, plan=PLAN, approval=digest.of_bytes(approved(name).envelope)) for name in (A, B)]
    assert leaves_of(store) == [
        *admitted,
        PlanPublished(plan=PLAN),
        *approvals,
        EncoderCommitted(run=RUN, round_index=0, state=checkpoint(0).state),
        StatementLogged(site=A, run=RUN, round_index=1, statement=digest.of_bytes(envelopes()[A])),
        EncoderCommitted(run=RUN, round_index=1, state=checkpoint(1).state),
        Released(run=RUN, release=RELEASE),
        SiteRevoked(site=B, at=UtcSeconds(AT + 1)),
    ]
    assert store.releases() == [(RELEASE, RUN, AT)]


def test_what_changes_nothing_is_not_logged_again(store: SqlStore) -> None:
    whole_run(store)
    size = store.log_size()
    store.revoke_site(B, at=AT + 2)
    store.add_plan(PLAN, name="p", canonical=b"{}", signed=b"signed", at=AT + 2)
    store.add_approval(approved(A), at=AT + 2)
    store.add_release(RELEASE, run=RUN, at=AT + 2)
    assert store.log_size() == size


def test_leaves_are_read_in_pages_and_found_by_their_hash(store: SqlStore) -> None:
    whole_run(store)
    everything = store.log_leaves(0, 1000)
    assert store.log_leaves(2, 5) == everything[2:5]
    assert store.log_leaves(10, 1000) == everything[10:]
    assert store.log_leaves(3, 3) == []
    assert [store.log_index(leaf_hash(leaf)) for leaf in everything] == list(range(len(everything)))
    assert store.log_index(bytes(32)) is None


def append(store: SqlStore, *leaves: AnyLeaf) -> int:
    with store._write() as connection:
        return append_leaves(connection, leaves)


def test_membership_leaf_that_cannot_follow_is_refused_with_all_that_comes_with_it(store: SqlStore) -> None:
    enrol(store, A)
    old, new, other = SigningKey.generate(), SigningKey.generate(), SigningKey.generate()
    store.add_site(B, evidence_key=old.public.to_text(), flower_key="b", at=AT)
    assert append(store, rotate_key(B, old, new, UtcSeconds(AT))) == 3
    for leaf in (
        SiteAdmitted(site=C, evidence_key=old.public, at=UtcSeconds(AT)),  # the log has named this key
        SiteAdmitted(site=B, evidence_key=other.public, at=UtcSeconds(AT)),  # is enrolled
        SiteRevoked(site=C, at=UtcSeconds(AT)),  # is not
        rotate_key(B, old, other, UtcSeconds(AT)),  # not the present key
    ):
        with pytest.raises(ProvenanceError) as caught:
            append(store, PlanPublished(plan=PLAN), leaf)
        assert caught.value.code is ErrorCode.RECORD_CHANGED
        assert store.log_size() == 3
    with pytest.raises(ValueError, match="Ed25519 public key"):
        store.add_site(C, evidence_key="ed25519:nonsense", flower_key="c", at=AT)


def test_checkpoints_and_cosignatures_stay_as_they_came(store: SqlStore) -> None:
    enrol(store, A, B)
    assert store.newest_checkpoint() is None
    for size, note in ((1, b"one"), (2, b"two"), (1, b"another")):
        store.add_checkpoint(size, note)
    assert (store.log_checkpoint(1), store.log_checkpoint(2), store.log_checkpoint(3)) == (b"one", b"two", None)
    assert store.newest_checkpoint() == b"two"
    given = [Cosignature(1, A, b"a1"), Cosignature(2, B, b"b2"), Cosignature(2, A, b"a2")]
    for each in (*given, Cosignature(1, A, b"another")):
        store.add_cosignature(each)
    assert store.cosignatures(2) == [given[0], given[2], given[1]]
    assert store.cosignatures(1) == given[:1]


# ---- a process that ends in the middle

RECORDS: dict[str, tuple[Any, Callable[[SqlStore], object]]] = {
    "admitted": (sites_store, lambda store: store.add_site(SiteName("d"), evidence_key=key_of("d"), flower_key="d", at=AT)),
    "revoked": (sites_store, lambda store: store.revoke_site(A, at=AT)),
    "published": (sites_store, lambda store: store.add_plan(digest.of_bytes(b"other"), name="o", canonical=b"{}", signed=b"s", at=AT)),
    "approved": (sites_store, lambda store: store.add_approval(approved(C), at=AT)),
    "initial": (rounds_store, lambda store: store.commit_initial(RUN, 1, checkpoint(0), at=AT)),
    "committed": (rounds_store, lambda store: store.commit_round(result(), envelopes())),
    "released": (log_store, lambda store: store.add_release(RELEASE, run=RUN, at=AT)),
}


def in_processes(count: int, work: Callable[[int], None]) -> list[int]:
    """Run `work` in so many real processes at once; their exit statuses, 0 for those that came to their end."""
    children = []
    for index in range(count):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                work(index)
                status = 0
            finally:
                os._exit(status)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def state_of(store: SqlStore) -> tuple[object, ...]:
    """Everything that the log tells of, the log, and the audit trail."""
    told = (store.sites(), store.plans(), store.approvals(PLAN), store.checkpoints(RUN), store.statements(RUN), store.releases())
    return *told, store.rounds(RUN), leaves_of(store), store.audit_events()


@pytest.mark.parametrize("when", ["before the leaf", "after the leaf"])
@pytest.mark.parametrize("what", RECORDS)
def test_process_that_ends_between_record_and_leaf_leaves_neither(store: SqlStore, url: str, what: str, when: str) -> None:
    """The process is gone at once, as by SIGKILL: nothing is closed or rolled back by it."""
    enrol(store, A, B, C)
    store.add_plan(PLAN, name="p", canonical=b"{}", signed=b"signed", at=AT)
    for name in (A, B):
        store.add_approval(approved(name), at=AT)
    store.create_run(RUN, plan_digest=PLAN, sites=[A, B, C], at=AT)
    store.begin_attempt(RUN, at=AT)
    if what != "initial":
        store.commit_initial(RUN, 1, checkpoint(0), at=AT)
        collected(store)
    module, record = RECORDS[what]
    before = state_of(store)

    def die(connection: Any, leaves: Any) -> int:
        if when == "after the leaf":
            append_leaves(connection, leaves)
        os._exit(9)

    def work(_: int) -> None:
        module.append_leaves = die
        with SqlStore(url) as own:
            record(own)

    store.close()
    assert in_processes(1, work) == [9]
    assert state_of(store) == before
    record(store)
    assert len(leaves_of(store)) > len(before[-2])  # type: ignore[arg-type]


# ---- several processes at once

PROCESSES, EACH = 4, 12


def test_processes_that_append_at_once_make_one_log_without_gaps(store: SqlStore, url: str) -> None:
    """What the commands, the daemon, the round loop and the control service do: each its own kind of record, some of them the same one."""
    enrol(store, A)
    store.add_plan(PLAN, name="p", canonical=b"{}", signed=b"signed", at=AT)

    def work(process: int) -> None:
        with SqlStore(url) as own:
            for number in range(EACH):
                own.add_plan(digest.of_value([process % 2, number]), name="p", canonical=b"{}", signed=b"s", at=AT)
                name = SiteName(f"site-{process}-{number}")
                own.add_site(name, evidence_key=key_of(name), flower_key=name, at=AT)
                if number % 3 == 0:
                    own.add_approval(approved(name), at=AT)
                    own.revoke_site(name, at=AT)

    store.close()
    assert in_processes(PROCESSES, work) == [0] * PROCESSES
    leaves = leaves_of(store)
    shared, third = 2 * EACH, PROCESSES * EACH // 3
    assert len(leaves) == store.log_size() == 2 + shared + PROCESSES * EACH + 2 * third
    assert len({leaf.to_bytes() for leaf in leaves}) == len(leaves)
    for process in range(PROCESSES):
        own = [leaf.site for leaf in leaves if isinstance(leaf, SiteAdmitted) and leaf.site.startswith(f"site-{process}-")]
        assert own == [f"site-{process}-{number}" for number in range(EACH)]


@pytest.mark.parametrize("what", ["cosignature", "release"])
def test_nobody_waits_for_a_row_while_holding_the_log(store: SqlStore, url: str, what: str) -> None:
    """A transaction that holds a site's and a run's row and goes on to the log meets one that adds a row which refers to them."""
    enrol(store, A)
    store.add_plan(PLAN, name="p", canonical=b"{}", signed=b"signed", at=AT)
    store.create_run(RUN, plan_digest=PLAN, sites=[A], at=AT)
    store.add_checkpoint(1, b"note")
    begun, failed = threading.Event(), list[BaseException]()

    def add() -> None:
        begun.set()
        try:
            with SqlStore(url) as own:
                if what == "cosignature":
                    own.add_cosignature(Cosignature(1, A, b"line"))
                else:
                    own.add_release(RELEASE, run=RUN, at=AT)
        except BaseException as error:
            failed.append(error)

    other = threading.Thread(target=add)
    with store._write() as connection:
        connection.execute(select(schema.site).with_for_update())
        connection.execute(select(schema.run).with_for_update())
        other.start()
        begun.wait()
        other.join(timeout=0.3)  # on PostgreSQL it has gone as far as it can by then; if not, nothing is missed but the meeting
        append_leaves(connection, [SiteRevoked(site=A, at=UtcSeconds(AT))])
    other.join()
    assert failed == []
    assert len(store.cosignatures(1)) + len(store.releases()) == 1
