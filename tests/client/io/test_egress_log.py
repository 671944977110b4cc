"""The egress record on a real disk: append-only, chained, and silent about nothing."""

import sqlite3
import stat
import threading
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from pathfed_client.egress.entry import EgressEntry, EgressKind, Outgoing
from pathfed_client.io.egress_log import EgressLog
from pathfed_common import digest
from pathfed_common.errors import HostError

QUERY = Outgoing(destination="server.example:9094", kind=EgressKind.QUERY, size=2, digest=digest.of_bytes(b"ab"))
UPDATE = replace(QUERY, kind=EgressKind.UPDATE, run="run-1", round_index=1, epsilon_charged=0.5)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A record of three entries at 10, 20 and 30 s."""
    path = tmp_path / "egress.db"
    EgressLog.create(path)
    times = iter((10.0, 20.0, 30.0))
    with EgressLog(path, now=lambda: next(times)) as record:
        record.append(QUERY)
        record.append(UPDATE)
        record.append(QUERY)
    return path


def tamper(path: Path, *statements: str) -> None:
    """As somebody who owns the machine would: triggers out of the way, rows changed, triggers back."""
    with closing(sqlite3.connect(path)) as connection:
        triggers = [row[0] for row in connection.execute("SELECT sql FROM sqlite_master WHERE type = 'trigger'")]
        for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
            connection.execute(f"DROP TRIGGER {name}")
        for statement in statements:
            connection.execute(statement)
        for trigger in triggers:
            connection.execute(trigger)
        connection.commit()


def test_entries_are_chained_numbered_and_only_their_owner_reads_them(path):
    with EgressLog(path) as record:
        entries = list(record.entries())
        head = record.verified()
    assert [entry.sequence for entry in entries] == [1, 2, 3]
    assert entries[0].previous is None
    assert [entry.previous for entry in entries[1:]] == [digest.of_bytes(entry.to_bytes()) for entry in entries[:-1]]
    assert (head.entries, head.head) == (3, digest.of_bytes(entries[-1].to_bytes()))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_entries_since_a_time_are_read_alone(path):
    with EgressLog(path) as record:
        assert [entry.at for entry in record.entries(20.0)] == [20.0, 30.0]
        assert list(record.entries(31.0)) == []


def test_a_round_that_left_is_known(path):
    with EgressLog(path) as record:
        assert record.left_before(EgressKind.UPDATE, "run-1", 1)
        assert not record.left_before(EgressKind.UPDATE, "run-1", 2)
        assert not record.left_before(EgressKind.STATEMENT, "run-1", 1)


@pytest.mark.parametrize("case", ["removed", "an empty file", "another record"])
def test_a_record_that_was_removed_or_replaced_while_it_is_open_takes_nothing_more(case, path, tmp_path):
    with EgressLog(path) as record:
        record.append(QUERY)
        away = path.rename(tmp_path / "away.db")
        match case:
            case "an empty file":
                path.touch()
            case "another record":
                EgressLog.create(path)
        with pytest.raises(HostError, match=r"PF913.*removed or replaced.*stop `pathfed-site start` first"):
            record.append(QUERY)
        if case == "removed":
            away.rename(path)
            record.append(QUERY)
            assert record.verified().entries == 5


def test_several_entries_are_stored_all_or_none(path):
    with EgressLog(path) as record:
        with pytest.raises(TypeError):
            record.append(QUERY, None)  # type: ignore[arg-type]
        assert record.verified().entries == 3
        record.append(QUERY, UPDATE)
        assert record.verified().entries == 5


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE egress SET at = 11",
        "DELETE FROM egress WHERE sequence = 3",
        "INSERT OR REPLACE INTO egress SELECT sequence, 5, kind, run, round_index, entry FROM egress WHERE sequence = 2",
        "INSERT INTO egress SELECT 9, at, kind, run, round_index, entry FROM egress WHERE sequence = 2",
    ],
)
def test_the_database_itself_refuses_to_change_or_drop_an_entry(path, statement):
    with closing(sqlite3.connect(path)) as connection, pytest.raises(sqlite3.IntegrityError, match=r"append-only|gapless"):
        connection.execute(statement)


@pytest.mark.parametrize(
    "statements",
    [
        ["UPDATE egress SET entry = replace(entry, 'server.example', 'server.exbmple') WHERE sequence = 2"],
        ["UPDATE egress SET entry = CAST(replace(CAST(entry AS TEXT), '\"size\":2', '\"size\":3') AS BLOB) WHERE sequence = 1"],
        ["DELETE FROM egress WHERE sequence = 1"],
        ["DELETE FROM egress WHERE sequence = 2"],
        ["DELETE FROM egress WHERE sequence = 2", "UPDATE egress SET sequence = 2 WHERE sequence = 3"],
        ["UPDATE egress SET sequence = 4 WHERE sequence = 1", "UPDATE egress SET sequence = 1 WHERE sequence = 3"],
        ["UPDATE egress SET at = 5 WHERE sequence = 2"],
        ["UPDATE egress SET kind = 'query' WHERE sequence = 2"],
        ["UPDATE egress SET run = 'other' WHERE sequence = 2"],
        ["UPDATE egress SET round_index = 2 WHERE sequence = 2"],
        ["UPDATE egress SET entry = x'00' WHERE sequence = 3"],
        ["INSERT INTO egress SELECT 4, at, kind, run, round_index, entry FROM egress WHERE sequence = 3"],
    ],
    ids=str,
)
def test_every_change_behind_the_triggers_is_found(path, statements):
    tamper(path, *statements)
    with EgressLog(path) as record, pytest.raises(HostError, match="PF913"):
        record.verified()


def test_an_end_that_was_cut_off_is_found_against_a_head_that_was_noted(path):
    with EgressLog(path) as record:
        noted = record.verified().head
    tamper(path, "DELETE FROM egress WHERE sequence = 3")
    with EgressLog(path) as record:
        assert record.verified().entries == 2
        with pytest.raises(HostError, match="PF914"):
            record.verified(noted=noted)
        record.append(QUERY)  # the same again, at another time: not the entry that was cut off
        with pytest.raises(HostError, match="PF914"):
            record.verified(noted=noted)


def test_a_record_that_is_gone_is_not_made_again_unasked(path):
    path.unlink()
    with pytest.raises(HostError, match=r"PF913.*gone"):
        EgressLog(path)
    assert not path.exists()
    path.touch()
    with EgressLog(path) as record:
        assert record.verified().entries == 0


@pytest.mark.parametrize("content", [b"no database at all, and long enough to be looked at" * 20, b"SQLite format 3\0" + bytes(4000)])
def test_a_damaged_file_is_told(path, content):
    for side in path.parent.glob("egress.db-*"):
        side.unlink()
    path.write_bytes(content)
    with pytest.raises(HostError, match=r"PF913|PF904"):
        EgressLog(path)


def test_a_record_of_a_newer_pathfed_is_left_alone(path):
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version = 99")
    with pytest.raises(HostError, match=r"PF905.*newer"):
        EgressLog(path)


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    with pytest.raises(HostError, match="PF904"):
        EgressLog.create(tmp_path / "nowhere" / "egress.db")


def test_many_writers_make_one_gapless_chain(path):
    def write() -> None:
        with EgressLog(path) as record:
            for _ in range(20):
                record.append(QUERY)

    writers = [threading.Thread(target=write) for _ in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    with EgressLog(path) as record:
        assert record.verified().entries == 83


def test_a_full_disk_stores_nothing_and_says_so(small_disk):
    path = small_disk / "egress.db"
    EgressLog.create(path)
    with EgressLog(path) as record:
        large = [replace(QUERY, destination="x" * 2000)] * 20

        def fill() -> None:
            for _ in range(100):
                record.append(*large)

        with pytest.raises(HostError, match=r"PF901|PF904"):
            fill()
        stored = record.verified().entries
        assert 0 < stored < 100 * len(large)
        assert stored % len(large) == 0


def test_a_half_written_row_reads_as_damage(path):
    with EgressLog(path) as record:
        last = list(record.entries())[-1]
    half = EgressEntry(sequence=4, previous=last.previous, at=40.0, sent=QUERY).to_bytes()[:-9]
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("INSERT INTO egress VALUES (4, 40.0, 'query', NULL, NULL, ?)", (half,))
        connection.commit()
    with EgressLog(path) as record, pytest.raises(HostError, match=r"PF913.*changed"):
        list(record.entries())
