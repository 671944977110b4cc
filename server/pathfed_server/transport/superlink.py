"""Our launcher of Flower's SuperLink: the one place that touches Flower's private functions on the server.

Flower 1.41 gives up on its SQLite database after five seconds, and large replies hold the write lock longer: `database is locked` ends in
a dead superexec and a SuperNode that only seems alive. It also maps 256 MB of the file into the process. The launcher waits longer and maps
nothing, and then runs Flower's own command. flwr is pinned exactly, and tests/server/transport/test_flower_contract.py fails when what is
used here moves.

A database that SQLite cannot read would keep SuperLink from ever starting. It is set aside, and SuperLink begins with an empty one: nothing
that counts is in it, and `pathfed-server start` registers the sites' nodes and opens the next attempt at each run.

Run as `python -m pathfed_server.transport.superlink <flower-superlink's arguments>`.
"""

import os
import sqlite3
import sys
from contextlib import closing, suppress
from pathlib import Path

from flwr.supercore import sql_mixin
from flwr.superlink.cli.flower_superlink import flower_superlink

BUSY_TIMEOUT_MS = 120_000
_PRAGMAS = "SQLITE_PRAGMAS"


def set_pragmas() -> None:
    """Make every SQLite connection Flower opens from now on wait `BUSY_TIMEOUT_MS` for a lock, and map no part of the file."""
    pragmas = dict(getattr(sql_mixin, _PRAGMAS, ()))
    if not {"busy_timeout", "mmap_size"} <= set(pragmas):
        raise RuntimeError("flwr no longer sets busy_timeout and mmap_size: look again at its sql_mixin before raising the pin")
    pragmas |= {"busy_timeout": str(BUSY_TIMEOUT_MS), "mmap_size": "0"}
    setattr(sql_mixin, _PRAGMAS, tuple(pragmas.items()))


def set_aside_damaged(database: Path) -> Path | None:
    """Rename a database that cannot be read, and what belongs to it; its new name, or None where nothing is wrong with it."""
    if not database.exists() or _is_whole(database):
        return None
    for ending in ("-wal", "-shm", ""):
        with suppress(FileNotFoundError):
            os.replace(f"{database}{ending}", f"{database}.damaged{ending}")
    return database.with_name(f"{database.name}.damaged")


def _is_whole(database: Path) -> bool:
    try:
        with closing(sqlite3.connect(database, timeout=BUSY_TIMEOUT_MS / 1000)) as connection:
            return connection.execute("PRAGMA quick_check(1)").fetchall() == [("ok",)]
    except sqlite3.OperationalError:
        return True  # locked, or a disk that fails: nothing is known of its content
    except sqlite3.DatabaseError:
        return False


def main() -> None:
    """Run SuperLink with these pragmas, on a database that can be read."""
    set_pragmas()
    aside = set_aside_damaged(Path(sys.argv[sys.argv.index("--database") + 1]))
    if aside is not None:
        print(f"SuperLink's database was damaged: it is set aside as {aside}", file=sys.stderr, flush=True)  # noqa: T201 - this process's log
    flower_superlink()


if __name__ == "__main__":
    main()
