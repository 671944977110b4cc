import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from pathfed_client.cohort.cohort import Pseudonym, SlideId, SlideTiles
from pathfed_client.io.server_records import ReceivedPlan
from pathfed_client.io.site_records import (
    ApprovalState,
    Approver,
    ApproverSignature,
    Event,
    SealedUpdate,
    SlideRecord,
    SlideStatus,
    StoredApproval,
)
from pathfed_client.io.site_store import SiteStore
from pathfed_client.io.tile_index import IndexEntry
from pathfed_common import digest
from pathfed_common.errors import ErrorCode, HostError, PrivacyError, ProvenanceError, TransportError
from pathfed_common.ids import run_name
from pathfed_common.provenance import cosigned, dsse
from pathfed_common.provenance.documents import PLAN_TYPE
from pathfed_common.provenance.keys import SigningKey

KEY = digest.of_bytes(b"rules")
PLAN = digest.of_bytes(b"plan")
RUN = run_name("run-1")


@pytest.fixture
def store(tmp_path: Path):
    with SiteStore(tmp_path / "site.db") as opened:
        yield opened


def usable(path="a.tif", patient="1" * 32, tiles=3, content=b"x") -> SlideRecord:
    return SlideRecord(
        path=path,
        fingerprint=digest.of_bytes(content),
        size=len(content),
        mtime_ns=1,
        scan_key=KEY,
        status=SlideStatus.USABLE,
        patient=Pseudonym(patient),
        mpp=0.5,
        width=1000,
        height=900,
        tile_count=tiles,
        tiles=IndexEntry(16, 100, f"{tiles:032x}") if tiles else None,
    )


def test_slide_comes_back_as_stored(store):
    slide = store.upsert_slide(usable())
    assert store.slides(KEY) == {slide: usable()}
    assert store.slides(digest.of_bytes(b"other rules")) == {}


def test_slides_are_found_by_their_numbers_however_many_are_asked_for(store):
    numbers = [store.upsert_slide(usable(f"{name}.tif")) for name in "abc"]
    assert store.slides_of(numbers[1:]) == {numbers[1]: usable("b.tif"), numbers[2]: usable("c.tif")}
    assert set(store.slides_of([SlideId(number) for number in range(1, 1300)])) == set(numbers)
    assert store.slides_of([]) == {}


def test_unchanged_slide_keeps_its_number_and_changed_file_gets_a_fresh_one(store):
    first = store.upsert_slide(usable())
    second = store.upsert_slide(usable("b.tif"))
    assert store.upsert_slide(usable()) == first
    changed = store.upsert_slide(usable(content=b"other"))
    assert changed not in (first, second)
    again = store.upsert_slide(usable())
    assert again not in (first, second, changed)
    assert set(store.slides(KEY)) == {second, again}


def test_cohort_groups_slides_by_patient_in_order_of_pseudonyms(store):
    one = store.upsert_slide(usable("1.tif", "b" * 32, 2))
    two = store.upsert_slide(usable("2.tif", "a" * 32, 4))
    three = store.upsert_slide(usable("3.tif", "b" * 32, 1))
    store.upsert_slide(replace(usable("4.tif", "c" * 32), status=SlideStatus.REFUSED, reason=ErrorCode.SLIDE_UNREADABLE))
    cohort = store.cohort(KEY)
    assert [(p.pseudonym, [s.slide for s in p.slides], p.tile_count) for p in cohort.patients] == [
        ("a" * 32, [two], 4),
        ("b" * 32, [one, three], 3),
    ]
    assert cohort.patients[1].slides == (SlideTiles(one, 2, f"{2:032x}"), SlideTiles(three, 1, f"{1:032x}"))
    assert len(store.cohort(digest.of_bytes(b"other")).patients) == 0


def test_cohort_digest_changes_with_the_slide_file(store):
    store.upsert_slide(usable())
    before = store.cohort(KEY).digest
    store.upsert_slide(usable())
    assert store.cohort(KEY).digest == before
    store.upsert_slide(usable(content=b"y"))
    assert store.cohort(KEY).digest != before


def test_state_change_takes_a_slide_out_and_keeps_its_tiles(store):
    slide = store.upsert_slide(usable())
    store.set_slide_state(slide, status=SlideStatus.UNMAPPED, reason=ErrorCode.SLIDE_UNMAPPED)
    assert len(store.cohort(KEY).patients) == 0
    store.set_slide_state(slide, status=SlideStatus.USABLE, patient=Pseudonym("2" * 32))
    assert store.cohort(KEY).patients[0].tile_count == 3
    with pytest.raises(KeyError, match="999"):
        store.set_slide_state(999, status=SlideStatus.MISSING)


def test_what_the_list_says_of_slides_comes_back_and_can_change_without_reading(store):
    slide = store.upsert_slide(replace(usable(), attributes={"organ": "lung"}))
    assert store.slides(KEY)[slide].attributes == {"organ": "lung"}
    store.restate_slides({slide: replace(usable(), attributes={"organ": "liver"})})
    assert store.slides(KEY) == {slide: replace(usable(), attributes={"organ": "liver"})}


def test_other_resolution_is_another_number_unless_the_slide_was_not_read_yet(store):
    found = replace(usable(tiles=0), status=SlideStatus.PENDING, fingerprint="", mpp=None)
    first = store.upsert_slide(found)
    assert store.upsert_slide(usable()) == first
    other = store.upsert_slide(replace(usable(), mpp=0.25))
    assert other != first
    assert store.upsert_slide(found) not in (first, other)


def test_weights_reach_the_cohort_and_slides_without_one_are_left_out(store):
    one, two = store.upsert_slide(usable("1.tif")), store.upsert_slide(usable("2.tif", content=b"y"))
    store.upsert_slide(usable("3.tif", "3" * 32, content=b"z"))
    weights = {"1.tif": 1.0, "2.tif": 0.25, "3.tif": None}
    (patient,) = store.cohort(KEY, lambda record: weights[record.path]).patients
    assert [(slide.slide, slide.weight) for slide in patient.slides] == [(one, 1.0), (two, 0.25)]


def test_tiles_without_a_tile_map_are_refused(store):
    with pytest.raises(ValueError, match="tile map"):
        store.upsert_slide(replace(usable(), tiles=None))
    with pytest.raises(ValueError, match="tile map"):
        store.upsert_slide(replace(usable(), tile_count=0))


def test_usable_slide_without_patient_is_refused_by_the_database(store):
    with pytest.raises(HostError, match="CHECK"):
        store.upsert_slide(replace(usable(), patient=None))


def test_ledger_entries_come_back_in_order_after_reopening(tmp_path):
    with SiteStore(tmp_path / "site.db") as store:
        for sequence, entry in enumerate([b"a", b"b", b"c"], start=1):
            store.append(sequence, entry)
    with SiteStore(tmp_path / "site.db") as store:
        assert store.entries() == [b"a", b"b", b"c"]


@pytest.mark.parametrize("sequence", [0, 1, 3])
def test_ledger_refuses_a_taken_number_and_a_gap(store, sequence):
    store.append(1, b"a")
    with pytest.raises(PrivacyError, match="PF304"):
        store.append(sequence, b"b")
    assert store.entries() == [b"a"]


@pytest.mark.parametrize(
    "attack",
    [
        "UPDATE ledger_entry SET entry = x'00'",
        "DELETE FROM ledger_entry",
        "INSERT OR REPLACE INTO ledger_entry VALUES (1, x'00')",
        "INSERT OR REPLACE INTO ledger_entry VALUES (2, x'00')",
        "INSERT INTO ledger_entry VALUES (4, x'00')",
    ],
)
def test_ledger_cannot_be_rewritten_through_the_database(store, attack):
    store.append(1, b"a")
    store.append(2, b"b")
    connection = sqlite3.connect(store.path)
    with pytest.raises(sqlite3.IntegrityError, match=r"append-only|gapless"):
        connection.execute(attack)
    connection.close()
    assert store.entries() == [b"a", b"b"]


def sealed(round_index=1, statement=b"statement") -> SealedUpdate:
    return SealedUpdate(
        run=RUN, round_index=round_index, statement=statement, update_path="updates/1", update=digest.of_bytes(statement), at=5.0
    )


def test_sealed_update_is_answered_once_and_for_all(store):
    assert store.get_sealed(RUN, 1) is None
    assert store.last_sealed(RUN) is None
    store.put_sealed(sealed())
    store.put_sealed(sealed())
    with pytest.raises(TransportError, match="PF409"):
        store.put_sealed(sealed(statement=b"another"))
    store.put_sealed(sealed(3, b"third"))
    store.put_sealed(sealed(2, b"second"))
    assert store.get_sealed(RUN, 1) == sealed()
    assert store.last_sealed(RUN) == sealed(3, b"third")


def approval(plan=PLAN, patients=10, at=1.0) -> StoredApproval:
    return StoredApproval(plan=plan, signed_plan=b"plan", signed_approval=b"approval", declared_patients=patients, at=at)


def test_latest_word_on_a_plan_counts(store):
    other = digest.of_bytes(b"other")
    assert store.approval(PLAN) is None
    store.add_approval(approval())
    store.add_approval(approval(other))
    withdrawn = replace(approval(at=2.0), state=ApprovalState.REVOKED)
    store.add_approval(withdrawn)
    assert store.approval(PLAN) == withdrawn
    store.add_approval(approval(patients=12, at=4.0))
    assert store.approvals() == [approval(other), approval(patients=12, at=4.0)]


def test_a_plan_that_comes_again_brings_the_signatures_it_lacked(store):
    server, operator = SigningKey.generate(), SigningKey.generate()
    signed = dsse.seal(b"plan", PLAN_TYPE, server)
    assert store.add_received_plan(ReceivedPlan(plan=PLAN, signed_plan=signed, at=2.0))
    assert not store.add_received_plan(ReceivedPlan(plan=PLAN, signed_plan=cosigned.cosign(signed, operator), at=9.0))
    assert not store.add_received_plan(ReceivedPlan(plan=PLAN, signed_plan=signed, at=9.0))
    (kept,) = store.received_plans()
    assert (kept.plan, kept.at) == (PLAN, 2.0)
    assert cosigned.parse(kept.signed_plan).signed_by([server.public, operator.public]) == {server.key_id, operator.key_id}
    for other in (dsse.seal(b"another", PLAN_TYPE, server), b"no envelope"):
        with pytest.raises(ProvenanceError, match="PF602"):
            store.add_received_plan(ReceivedPlan(plan=PLAN, signed_plan=other, at=3.0))
    assert store.received_plans() == [kept]


def test_every_word_is_kept_and_none_is_changed(store):
    store.add_approval(approval())
    store.add_approval(replace(approval(at=2.0), state=ApprovalState.REVOKED))
    store.add_signature(ApproverSignature(plan=PLAN, approver="anna", envelope=b"signed", at=1.0))
    with closing(sqlite3.connect(store.path)) as other:
        for table in ("approval", "approver_signature"):
            for change in (f"UPDATE {table} SET at = 0", f"DELETE FROM {table}"):
                with pytest.raises(sqlite3.IntegrityError, match="append-only"):
                    other.execute(change)
    assert store.signatures(PLAN) == [ApproverSignature(plan=PLAN, approver="anna", envelope=b"signed", at=1.0)]
    assert store.signatures(KEY) == []


def test_approvers_have_a_name_and_a_key_of_their_own(store):
    anna, ben = SigningKey.generate().public, SigningKey.generate().public
    assert store.add_approver("anna", anna, at=1.0)
    assert not store.add_approver("anna", ben, at=2.0)
    assert not store.add_approver("ben", anna, at=2.0)
    assert store.add_approver("ben", ben, at=2.0)
    assert store.approvers() == [Approver(name="anna", key=anna, at=1.0), Approver(name="ben", key=ben, at=2.0)]
    assert store.remove_approver("anna", at=3.0)
    assert not store.remove_approver("anna", at=3.0)
    assert [one.name for one in store.approvers()] == ["ben"]
    assert store.add_approver("anna", anna, at=4.0)


def test_events_are_the_latest_oldest_first(store):
    lines = [Event(at=float(n), kind="scan", detail=str(n)) for n in range(5)] + [Event(at=9.0, kind="round", code=ErrorCode.BUDGET_SPENT)]
    for line in lines:
        store.add_event(line)
    assert store.events(limit=3) == lines[-3:]


def test_slide_that_was_not_read_yet_keeps_its_number_when_it_is(store):
    found = replace(usable(tiles=0), fingerprint="", status=SlideStatus.PENDING)
    number = store.upsert_slide(found)
    assert store.upsert_slide(usable()) == number
    assert store.slides(KEY) == {number: usable()}


def test_many_slides_are_added_in_order_and_restated_at_once(store):
    found = [replace(usable(f"{name}.tif", tiles=0), fingerprint="", status=SlideStatus.PENDING) for name in "bca"]
    numbers = store.add_slides(found)
    assert list(numbers) == ["b.tif", "c.tif", "a.tif"]
    assert list(numbers.values()) == sorted(numbers.values())
    gone = {numbers["b.tif"]: replace(found[0], status=SlideStatus.MISSING, reason=ErrorCode.SLIDE_MISSING, detail="gone")}
    store.restate_slides(gone)
    assert [record.status for record in store.slides(KEY).values()] == ["pending", "missing", "pending"]
    assert store.add_slides([]) == {}


def test_moved_slides_keep_numbers_and_tiles_even_when_they_exchange_places(store):
    first = store.upsert_slide(usable("a.tif", content=b"a"))
    second = store.upsert_slide(usable("b.tif", content=b"b", patient="2" * 32))
    tiles = store.cohort(KEY).digest
    moved = {first: replace(usable("b.tif", content=b"a"), parts=("b.tif", "b/1"), mtime_ns=7), second: usable("a.tif", content=b"b")}
    store.move_slides(moved)
    assert {number: record.path for number, record in store.slides(KEY).items()} == {first: "b.tif", second: "a.tif"}
    assert (store.slides(KEY)[first].parts, store.slides(KEY)[first].mtime_ns) == (("b.tif", "b/1"), 7)
    assert store.cohort(KEY).digest == tiles


def test_forgotten_number_is_not_used_again(store):
    number = store.upsert_slide(usable())
    store.forget_slides([number])
    assert store.slides(KEY) == {}
    assert store.upsert_slide(usable()) > number


def test_attempts_are_kept(store):
    number = store.upsert_slide(usable())
    store.set_attempts({number: 2})
    assert store.slides(KEY) == {number: replace(usable(), attempts=2)}


def test_what_is_done_together_happens_whole_or_not_at_all(store):
    def fails_half_way():
        with store.together():
            store.upsert_slide(usable())
            store.set_slide_state(99, status=SlideStatus.MISSING)

    with pytest.raises(KeyError):
        fails_half_way()
    assert store.slides(KEY) == {}
    with store.together():
        store.upsert_slide(usable())
        store.upsert_slide(usable("b.tif"))
        with closing(sqlite3.connect(store.path)) as other:
            assert other.execute("SELECT count(*) FROM slide").fetchone() == (0,)
    assert len(store.slides(KEY)) == 2


def test_newer_schema_is_refused(tmp_path):
    SiteStore(tmp_path / "site.db").close()
    connection = sqlite3.connect(tmp_path / "site.db")
    connection.execute("UPDATE schema_version SET version = 99")
    connection.commit()
    connection.close()
    with pytest.raises(HostError, match=r"PF905.*99"):
        SiteStore(tmp_path / "site.db")


def test_file_that_is_no_database_is_refused(tmp_path):
    (tmp_path / "site.db").write_bytes(b"not a database" * 100)
    with pytest.raises(HostError, match="PF904"):
        SiteStore(tmp_path / "site.db")


def test_missing_folder_is_refused(tmp_path):
    with pytest.raises(HostError, match="PF904"):
        SiteStore(tmp_path / "absent" / "site.db")


def test_database_is_private_durable_and_shared(store):
    store.append(1, b"a")
    for path in (store.path, Path(f"{store.path}-wal")):
        assert path.stat().st_mode & 0o077 == 0
    with store._engine.connect() as connection:
        pragmas = [connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in ("journal_mode", "synchronous", "foreign_keys")]
    assert pragmas == ["wal", 2, 1]
    with SiteStore(store.path) as second:
        second.append(2, b"b")
    assert store.entries() == [b"a", b"b"]


def test_full_database_is_reported_and_nothing_half_written(store):
    store.upsert_slide(usable("small.tif"))
    with store._engine.connect() as connection:  # the pool keeps this connection, so the limit holds for the next write
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar()
        connection.exec_driver_sql(f"PRAGMA max_page_count = {pages + 1}")
    with pytest.raises(HostError, match="PF901"):
        store.upsert_slide(replace(usable("large.tif"), detail="x" * 100_000))
    assert [record.path for record in store.slides(KEY).values()] == ["small.tif"]
