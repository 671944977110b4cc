"""The log keeper: what it signs, proves and takes, and what it refuses. Sites are common's own judge; the database is a real one."""

import shutil
import threading
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text
from tests.server.provenance.log_world import AT, ORIGIN, SERVER, Watcher, append, append_many, keeper, plan_digest, statement, watchers

from pathfed_common.errors import ErrorCode, PathfedError, ProvenanceError
from pathfed_common.ids import SiteName
from pathfed_common.provenance import merkle
from pathfed_common.provenance.keys import SigningKey
from pathfed_common.provenance.log_checkpoint import Checkpoint, cosign_checkpoint, open_checkpoint
from pathfed_common.provenance.log_leaves import PlanPublished, rotate_key
from pathfed_common.provenance.log_quorum import Shortfall
from pathfed_common.provenance.log_witness import Refusal
from pathfed_common.provenance.merkle import leaf_hash, root_of, verify_consistency, verify_inclusion
from pathfed_common.provenance.note import Note
from pathfed_common.units import UtcSeconds
from pathfed_server.db.sql_store import SqlStore
from pathfed_server.provenance import log_keeper
from pathfed_server.provenance.log_keeper import LogKeeper
from pathfed_server.provenance.log_ports import LogService, ServedCheckpoint


def refusal(code: ErrorCode) -> pytest.RaisesExc[PathfedError]:
    return pytest.raises(PathfedError, check=lambda error: error.code is code)


def opened(log: LogKeeper) -> Checkpoint:
    return open_checkpoint(Note.from_bytes(log.checkpoint(0).note), log.key)


def test_keeper_is_what_the_control_service_asks_for(log_store: SqlStore) -> None:
    service: LogService = keeper(log_store)
    assert service.leaves(0, 10) == []


def test_empty_log_has_no_checkpoint(log_store: SqlStore) -> None:
    log = keeper(log_store)
    assert log.checkpoint(0) == ServedCheckpoint(0, b"", ())
    for asked in (lambda: log.file(), lambda: log.history(), lambda: log.signed(1), lambda: log.cosign(SiteName("a"), 1, b"")):
        with refusal(ErrorCode.CHECKPOINT_UNSIGNED):
            asked()


def test_checkpoint_is_of_all_leaves_and_one_size_has_one_form(log_store: SqlStore) -> None:
    first, second = keeper(log_store), keeper(log_store)
    for size in range(1, 20):
        append(log_store, statement(size))
        served = first.checkpoint(0)
        found = open_checkpoint(Note.from_bytes(served.note), first.key)
        assert (served.size, found.size, found.root) == (size, size, root_of(log_store.log_leaves(0, size)))
        assert second.checkpoint(0).note == first.checkpoint(0).note == served.note == log_store.log_checkpoint(size)


def test_growing_log_is_signed_once_an_interval(log_store: SqlStore) -> None:
    now = 100.0
    log = LogKeeper(log_store, SERVER, ORIGIN, least_interval_s=1.0, monotonic=lambda: now)
    sizes = []
    for step in range(12):
        now = 100.0 + step * 0.25
        append(log_store, statement(step))
        sizes.append(log.checkpoint(0).size)
    assert sizes == [1, 1, 1, 1, 5, 5, 5, 5, 9, 9, 9, 9]
    now += 10.0
    assert log.checkpoint(0).size == 12
    assert [log_store.log_checkpoint(size) is not None for size in (1, 2, 5, 9, 12)] == [True, False, True, True, True]


@pytest.mark.parametrize("size", [1, 2, 7, 8, 9, 33])
def test_proofs_verify_for_every_leaf_and_every_known_size(log_store: SqlStore, size: int) -> None:
    append(log_store, *(statement(number) for number in range(size)))
    log = keeper(log_store)
    found, leaves = opened(log), log.leaves(0, size)
    for index, leaf in enumerate(leaves):
        shown = log.inclusion(leaf_hash(leaf), size)
        assert shown.index == index
        assert verify_inclusion(leaf=leaf_hash(leaf), index=index, size=size, proof=shown.proof, root=found.root)
        known, proof = index + 1, log.checkpoint(index + 1).consistency
        assert verify_consistency(first=known, first_root=root_of(leaves[:known]), second=size, second_root=found.root, proof=proof)


def test_what_is_not_there_is_refused_with_its_code(log_store: SqlStore) -> None:
    append(log_store, *(statement(number) for number in range(5)))
    log = keeper(log_store)
    inside = leaf_hash(log.leaves(4, 5)[0])
    for code, ask in (
        (ErrorCode.LOG_BEHIND, lambda: log.checkpoint(6)),
        (ErrorCode.LOG_BEHIND, lambda: log.inclusion(inside, 6)),
        (ErrorCode.LEAF_UNKNOWN, lambda: log.inclusion(inside, 4)),
        (ErrorCode.LEAF_UNKNOWN, lambda: log.inclusion(bytes(32), 5)),
        (ErrorCode.LEAF_UNKNOWN, lambda: log.inclusion(b"", 5)),
        (ErrorCode.LEAF_UNKNOWN, lambda: log.leaves(3, 2)),
        (ErrorCode.LEAF_UNKNOWN, lambda: log.leaves(-1, 2)),
        (ErrorCode.CHECKPOINT_UNSIGNED, lambda: log.signed(3)),
        (ErrorCode.CHECKPOINT_UNSIGNED, lambda: log.file(3)),
        (ErrorCode.CHECKPOINT_UNSIGNED, lambda: log.cosign(SiteName("a"), 3, b"x")),
        (ErrorCode.CHECKPOINT_UNSIGNED, lambda: log.cosign(SiteName("a"), -(2**63), b"x")),
        (ErrorCode.CHECKPOINT_UNSIGNED, lambda: log.cosign(SiteName("a"), 2**64 - 1, b"x")),
        (ErrorCode.CHECKPOINT_UNSIGNED, lambda: log.signed(2**64 - 1)),
        (ErrorCode.CHECKPOINT_UNSIGNED, lambda: log.file(2**64 - 1)),
        (ErrorCode.LOG_BEHIND, lambda: log.checkpoint(2**64 - 1)),
        (ErrorCode.LOG_BEHIND, lambda: log.inclusion(inside, 2**64 - 1)),
    ):
        with refusal(code):
            ask()
    assert log.leaves(3, 100) == log.leaves(3, 5)
    assert log.leaves(7, 100) == log.leaves(2**64 - 2, 2**64 - 1) == []


def test_answer_holds_so_many_leaves_at_most(log_store: SqlStore, monkeypatch: pytest.MonkeyPatch) -> None:
    append(log_store, *(statement(number) for number in range(5)))
    monkeypatch.setattr(log_keeper, "MOST_LEAVES", 2)
    assert keeper(log_store).leaves(1, 5) == log_store.log_leaves(1, 3)


# ---- cosignatures


@pytest.fixture
def sites(log_store: SqlStore) -> list[Watcher]:
    """Three enrolled sites."""
    found = watchers("a", "b", "c")
    for site in found:
        site.enrol(log_store)
    return found


def test_more_than_half_of_the_sites_make_a_quorum(log_store: SqlStore, sites: list[Watcher]) -> None:
    log = keeper(log_store)
    append(log_store, PlanPublished(plan=plan_digest("p")))
    names = [site.name for site in sites]
    assert log.history().shortfalls == (
        Shortfall(1, frozenset(), frozenset(names[:1])),
        Shortfall(2, frozenset(), frozenset(names[:2])),
        Shortfall(None, frozenset(), frozenset(names)),
    )
    sites[0].cosign(log)
    assert log.history().shortfalls == (
        Shortfall(2, frozenset(names[:1]), frozenset(names[:2])),
        Shortfall(None, frozenset(names[:1]), frozenset(names)),
    )
    sites[1].cosign(log)
    history = log.history()
    assert history.shortfalls == ()
    assert [leaf.kind for leaf in history.leaves] == ["site-admitted"] * 3 + ["plan-published"]


def test_history_holds_each_sites_latest_cosignature_and_no_more(log_store: SqlStore, sites: list[Watcher]) -> None:
    """1,000 rounds leave 1,000 checkpoints; a bundle needs one a site."""
    log = keeper(log_store)
    for number in range(6):
        append(log_store, statement(number))
        for site in sites[: 3 if number < 2 else 2]:
            site.cosign(log)
    append(log_store, statement(6))
    taken = log.file()
    sizes = [open_checkpoint(note, log.key).size for note in taken.notes]
    assert sizes == [5, 9, 10]
    assert [len(note.signatures) for note in taken.notes] == [4, 3, 1]
    assert {member.site for member in log.history().cosigned[9]} == {"a", "b"}
    earlier = log.history(9)
    assert earlier.shortfalls == ()
    assert len(earlier.leaves) == 9


def test_standing_says_what_a_reader_of_the_history_finds(log_store: SqlStore, sites: list[Watcher]) -> None:
    log = keeper(log_store)
    assert log.quorate() is None
    sizes = []
    for step in range(5):
        append(log_store, statement(step))
        for site in sites[: 1 + step % 3]:
            site.cosign(log)
        if step == 3:
            log_store.revoke_site(sites[2].name, at=AT)
        sizes.append(log.checkpoint(0).size)
    sites[0].cosign(log)
    for size in sizes:
        standing, history = log.standing(size), log.history(size)
        assert standing.shortfalls == history.shortfalls
        assert standing.enrolled == tuple(history.roll.enrolled)
        quorate = {each for each in sizes if not log.history(each).shortfalls}
    assert log.quorate() == max(quorate) == sizes[4]
    assert log.standing().cosigned == {"a": 9, "b": 9}
    append(log_store, statement(9))
    assert log.quorate() == sizes[4]
    assert len(log.standing().shortfalls) == 1


def test_cosignature_again_changes_nothing(log_store: SqlStore, sites: list[Watcher]) -> None:
    log = keeper(log_store)
    found = opened(log)
    for at in (AT, AT + 60):
        log.cosign(sites[0].name, found.size, cosign_checkpoint(found, sites[0].name, sites[0].key, at=int(at)).to_line().encode())
    assert len(log_store.cosignatures(found.size)) == 1
    assert len(log.signed(found.size).signatures) == 2


def line_of(checkpoint: Checkpoint, site: str, key: SigningKey) -> bytes:
    return cosign_checkpoint(checkpoint, SiteName(site), key, at=int(AT)).to_line().encode()


def test_lines_that_are_not_the_sites_are_refused(log_store: SqlStore, sites: list[Watcher]) -> None:
    log = keeper(log_store)
    found = opened(log)
    a, b = sites[:2]
    good = line_of(found, "a", a.key)
    attempts = [
        line_of(found, "a", b.key),  # another's key
        line_of(found, "b", b.key),  # another site's line, sent as one's own
        line_of(found, "b", a.key),
        line_of(replace(found, size=2), "a", a.key),
        line_of(replace(found, root=bytes(32)), "a", a.key),
        line_of(replace(found, origin="pathfed/other"), "a", a.key),
        line_of(found, "a", SERVER),  # the operator counts nowhere
        Note.from_bytes(log.checkpoint(0).note).signatures[0].to_line().encode(),
        b"",
        b"\xff",
        good + b"\n",
        good[:-4],
        good.replace(b"\xe2\x80\x94", b"-"),
        good[:-8] + b"AAAAAAA=",
        b"x" * 100_000,
    ]
    for attempt in attempts:
        with refusal(ErrorCode.COSIGNATURE_REFUSED):
            log.cosign(a.name, found.size, attempt)
    assert log_store.cosignatures(100) == []
    log.cosign(a.name, found.size, good)


def test_only_enrolled_sites_cosign(log_store: SqlStore, sites: list[Watcher]) -> None:
    log = keeper(log_store)
    log_store.revoke_site(sites[2].name, at=AT)
    found = opened(log)
    with refusal(ErrorCode.SITE_REVOKED):
        log.cosign(sites[2].name, found.size, line_of(found, "c", sites[2].key))
    stranger = SigningKey.generate()
    with refusal(ErrorCode.SITE_UNKNOWN):
        log.cosign(SiteName("d"), found.size, line_of(found, "d", stranger))


def test_key_that_was_handed_over_cosigns_no_more(log_store: SqlStore, sites: list[Watcher]) -> None:
    log = keeper(log_store)
    before, old, new = opened(log), sites[0].key, SigningKey.generate()
    append(log_store, rotate_key(sites[0].name, old, new, UtcSeconds(AT)))
    after = opened(log)
    for found, key in ((after, old), (before, old), (before, new)):
        with refusal(ErrorCode.COSIGNATURE_REFUSED):
            log.cosign(sites[0].name, found.size, line_of(found, "a", key))
    log.cosign(sites[0].name, after.size, line_of(after, "a", new))
    assert {member.site for member in log.history().cosigned[after.size]} == {"a"}


# ---- a log that is not the one it was


def tampered(store: SqlStore, statement: str, **values: Any) -> None:
    """Change the database behind the triggers' back."""
    with store._write() as connection:
        for name in connection.execute(text("SELECT name FROM sqlite_master WHERE type = 'trigger'")).scalars().all():
            connection.execute(text(f"DROP TRIGGER {name}"))
        connection.execute(text("PRAGMA foreign_keys=OFF"))
        connection.execute(text(statement), values)


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE log_entry SET leaf = :leaf WHERE leaf_index = 1",
        "DELETE FROM log_entry WHERE leaf_index = 5",
        "DELETE FROM log_entry WHERE leaf_index = 2",
    ],
)
def test_changed_or_shortened_log_is_not_signed_by_a_process_that_starts_with_it(log_store: SqlStore, change: str) -> None:
    append(log_store, *(statement(number) for number in range(6)))
    keeper(log_store).checkpoint(0)
    tampered(log_store, change, **({"leaf": statement(9).to_bytes()} if ":leaf" in change else {}))
    log = keeper(log_store)
    for ask in (lambda: log.checkpoint(0), lambda: log.file()):
        with refusal(ErrorCode.LOG_DAMAGED):
            ask()
    assert len({*log_store.log_leaves(0, 100)}) >= 5


def test_log_that_is_set_back_under_a_running_keeper_is_not_signed(log_store: SqlStore) -> None:
    append(log_store, *(statement(number) for number in range(6)))
    log = keeper(log_store)
    log.checkpoint(0)
    tampered(log_store, "DELETE FROM log_entry WHERE leaf_index >= 3")
    append(log_store, statement(7))
    with refusal(ErrorCode.LOG_DAMAGED):
        log.checkpoint(0)


def test_checkpoint_of_another_key_in_the_database_is_refused(log_store: SqlStore) -> None:
    append(log_store, statement(0))
    LogKeeper(log_store, SigningKey.generate(), ORIGIN).checkpoint(0)
    with pytest.raises(ProvenanceError) as caught:
        keeper(log_store).checkpoint(0)
    assert caught.value.code is ErrorCode.RECORD_SIGNATURE


def test_forked_log_shown_to_two_sites_is_refused_by_both(tmp_path: Path, log_store: SqlStore, sites: list[Watcher]) -> None:
    """The operator copies the database and lets the copies part: a statement in one, another in the other."""
    a, b, _ = sites
    for site in (a, b):
        assert site.cosign(keeper(log_store)) == 3
    log_store.close()
    shutil.copyfile(tmp_path / "server.db", tmp_path / "other.db")
    with SqlStore(f"sqlite:///{tmp_path}/other.db") as other:
        for number in range(3):
            append(log_store, statement(number))
            append(other, statement(number + 10))
        here, there = keeper(log_store), keeper(other)
        assert a.cosign(here) == b.cosign(there) == 6
        # Each is shown the other history, at the same size and then at a larger one.
        assert a.look(there).refusal is b.look(here).refusal is Refusal.FORKED
        append(log_store, statement(3))
        append(other, statement(13))
        assert a.look(there).refusal is b.look(here).refusal is Refusal.NOT_CONSISTENT
        # Nor is what one site was promised in the other history.
        own = statement(0).to_bytes()
        a.cosign(here, own=[own])
        with refusal(ErrorCode.LEAF_UNKNOWN):
            there.inclusion(leaf_hash(own), 7)
        # And neither history has a quorum of the three.
        for log in (here, there):
            end = log.history().shortfalls[-1]
            assert (end.index, len(end.cosigned)) == (None, 1 if log is here else 0)


def test_server_set_back_to_a_backup_is_found_by_its_sites(tmp_path: Path, log_store: SqlStore, sites: list[Watcher]) -> None:
    log_store.close()
    shutil.copyfile(tmp_path / "server.db", tmp_path / "backup.db")
    append(log_store, statement(0))
    for site in sites:
        site.cosign(keeper(log_store))
    with SqlStore(f"sqlite:///{tmp_path}/backup.db") as restored:
        log = keeper(restored)
        with refusal(ErrorCode.LOG_BEHIND):
            sites[0].look(log)
        append(restored, statement(1))
        assert sites[0].look(log).refusal is Refusal.FORKED


# ---- at scale, and at once


def test_proofs_of_a_large_log_hash_a_path_and_no_more(log_store: SqlStore, monkeypatch: pytest.MonkeyPatch) -> None:
    size = 50_000
    append_many(log_store, size)
    log = keeper(log_store)
    found = opened(log)
    hashed = 0
    honest = merkle.node_hash

    def counted(left: bytes, right: bytes) -> bytes:
        nonlocal hashed
        hashed += 1
        return honest(left, right)

    monkeypatch.setattr(merkle, "node_hash", counted)
    leaf = statement(31_337).to_bytes()
    shown = log.inclusion(leaf_hash(leaf), size)
    assert log.checkpoint(12_345).consistency
    append(log_store, statement(size))
    assert log.checkpoint(size).size == size + 1
    assert hashed < 120
    assert verify_inclusion(leaf=leaf_hash(leaf), index=shown.index, size=size, proof=shown.proof, root=found.root)


def test_threads_of_one_keeper_see_one_history(log_store: SqlStore) -> None:
    log = keeper(log_store)
    append(log_store, statement(0))
    failed: list[BaseException] = []
    seen: list[list[tuple[int, bytes]]] = [[] for _ in range(4)]

    def ask(index: int) -> None:
        try:
            known = 0
            for _ in range(20):
                served = log.checkpoint(known)
                seen[index].append((served.size, open_checkpoint(Note.from_bytes(served.note), log.key).root))
                known = served.size
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for number in range(1, 30):
        append(log_store, statement(number))
    for thread in threads:
        thread.join()
    assert failed == []
    roots = {size: root_of(log_store.log_leaves(0, size)) for size in range(1, 31)}
    for one in seen:
        assert all(roots[size] == root for size, root in one)
        assert all(first <= then for (first, _), (then, _) in pairwise(one))
