"""What we use of Flower's private parts is still there and still does what we rely on. Look here first when flwr's pin moves."""

import sqlite3
import subprocess
import sys
from contextlib import closing

import pytest
from flwr.supercore import sql_mixin
from flwr.supercore.constant import SQLITE_PRAGMAS

from pathfed_common.bundle import bundle_bytes, bundle_hash
from pathfed_common.errors import TransportError
from pathfed_server.transport import superlink
from pathfed_server.transport.flower_control import FlowerControl, node_key


def test_flower_still_hard_codes_a_busy_timeout_of_five_seconds() -> None:
    assert dict(SQLITE_PRAGMAS)["busy_timeout"] == "5000"


def test_the_launcher_sets_the_pragmas_of_every_connection_flower_opens(tmp_path) -> None:
    """In a process of its own: the launcher changes Flower's module for good."""
    script = f"""
from pathfed_server.transport import superlink
superlink.set_pragmas()
import sqlite3
from flwr.supercore import sql_mixin
connection = sqlite3.connect({str(tmp_path / "x.db")!r})
sql_mixin._set_sqlite_pragmas(connection, None)
print(connection.execute("PRAGMA mmap_size").fetchone()[0], connection.execute("PRAGMA busy_timeout").fetchone()[0])
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=True)
    assert [int(word) for word in done.stdout.split()[-2:]] == [0, superlink.BUSY_TIMEOUT_MS]
    assert dict(vars(sql_mixin)["SQLITE_PRAGMAS"])["busy_timeout"] == "5000"  # this process is untouched


def test_the_launcher_refuses_a_flower_that_sets_no_busy_timeout(monkeypatch) -> None:
    monkeypatch.setattr(sql_mixin, "SQLITE_PRAGMAS", (("journal_mode", "WAL"),))
    with pytest.raises(RuntimeError, match="busy_timeout"):
        superlink.set_pragmas()


def test_flower_takes_the_bundle_and_unpacks_no_code_from_it(engine, tmp_path) -> None:
    import io
    import zipfile

    from flwr.cli.config_utils import get_fab_metadata

    assert get_fab_metadata(bundle_bytes()) == ("pathfed/pathfed-bundle", "1.0.0")
    names = zipfile.ZipFile(io.BytesIO(bundle_bytes())).namelist()
    assert names == ["pyproject.toml", ".info/CONTENT"]
    with FlowerControl(f"127.0.0.1:{engine.superlink_port}", engine.ca) as control:
        run = control.start_run({"pathfed-run": "contract"})
        assert control.run_status(run)[0] in {"pending", "starting", "running", "finished"}


def test_the_bundle_has_the_same_bytes_in_another_process() -> None:
    script = "from pathfed_common.bundle import bundle_hash; print(bundle_hash())"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip() == bundle_hash()


def test_node_keys_are_registered_once_and_removed_when_no_longer_wanted(engine, tmp_path, write_node_key) -> None:
    keys = [node_key(write_node_key(tmp_path / f"node-{i}")) for i in range(3)]
    with FlowerControl(f"127.0.0.1:{engine.superlink_port}", engine.ca) as control:
        control.ensure_nodes(keys)
        control.ensure_nodes(keys)
        control.ensure_nodes(keys[:1])


@pytest.mark.parametrize("text", ["", "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGJ1", "not a key"])
def test_a_node_key_that_is_not_one_is_refused_with_its_code(text: str) -> None:
    with pytest.raises(TransportError, match="PF402"):
        node_key(text)


@pytest.mark.parametrize(
    ("content", "aside"),
    [(None, False), ("whole", False), (b"", False), (b"this is no database " * 500, True), ("torn", True)],
    ids=["none", "whole", "empty", "no database", "torn"],
)
def test_a_database_that_cannot_be_read_is_set_aside_and_no_other(tmp_path, content, aside):
    database = tmp_path / "superlink.db"
    if isinstance(content, bytes):
        database.write_bytes(content)
    elif content is not None:
        with closing(sqlite3.connect(database)) as made:
            made.execute("CREATE TABLE node (id INTEGER PRIMARY KEY, key BLOB)").close()
            made.executemany("INSERT INTO node (key) VALUES (?)", [(bytes(3000),)] * 20).close()
            made.commit()
    if content == "torn":
        data = bytearray(database.read_bytes())
        data[4096:12288] = b"\xff" * 8192
        database.write_bytes(bytes(data))
    found = superlink.set_aside_damaged(database)
    assert (found is not None) is aside
    assert database.exists() is (content is not None and not aside)
    assert (tmp_path / "superlink.db.damaged").exists() is aside


def test_a_run_that_superlink_does_not_know_is_unknown_and_not_an_answer_that_failed(engine) -> None:
    """It has lost its database: the daemon opens the next attempt. A failure would be waited for, for ever."""
    with FlowerControl(f"127.0.0.1:{engine.superlink_port}", engine.ca) as control:
        assert control.run_status(1288054683205069248)[0] == "unknown"
