"""Our launcher of Flower's SuperLink: the one place that touches Flower's private functions on the server.

Flower 1.41 gives up on its SQLite database after five seconds, and large replies hold the write lock longer: `database is locked` ends in
a dead superexec and a SuperNode that only seems alive. It also maps 256 MB of the file into the process. The launcher waits longer and maps
nothing, and then runs Flower's own command. flwr is pinned exactly, and tests/server/transport/test_flower_contract.py fails when what is
used here moves.

Run as `python -m pathfed_server.transport.superlink <flower-superlink's arguments>`.
"""

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


def main() -> None:
    """Run SuperLink with these pragmas."""
    set_pragmas()
    flower_superlink()


if __name__ == "__main__":
    main()
