"""What the operator sees of the transparency log: where it stands, its checkpoints and leaves, and whether the database agrees with it."""

from pathlib import Path
from typing import Any

from pathfed_common import files
from pathfed_common.errors import ProvenanceError
from pathfed_common.provenance.log_checkpoint import log_key, origin_of
from pathfed_common.provenance.log_leaves import read_leaf
from pathfed_common.provenance.log_quorum import Shortfall, quorum_of
from pathfed_server.db.log_check import LogReport, check_log
from pathfed_server.db.sql_store import SqlStore
from pathfed_server.home import ServerHome
from pathfed_server.operators import Role, opened_by
from pathfed_server.provenance.log_keeper import LogKeeper


class LogCheckError(ProvenanceError):
    """Database and log do not hold together; `report` says where."""

    def __init__(self, report: LogReport) -> None:
        first, more = report.findings[0], len(report.findings) - 1
        super().__init__(first.code, first.what + (f", and {more} findings more" if more else ""), where=first.row)
        self.report = report


def log_keeper(home: ServerHome, store: SqlStore) -> LogKeeper:
    """The keeper of a server's log, for commands: its checkpoints are of all leaves there are."""
    return LogKeeper(store, home.evidence_key, origin_of(home.settings.consortium), least_interval_s=0.0)


def standing(home: ServerHome) -> dict[str, Any]:
    """Where the log stands: its latest checkpoint, who cosigned, and whether that is enough.

    Raises:
        ProvenanceError: PF607, the log is not the one that was signed.
    """
    with opened_by(home.root, Role.AUDITOR) as (store, _):
        keeper = log_keeper(home, store)
        found, quorate = keeper.standing(), keeper.quorate()
    return {
        "origin": origin_of(home.settings.consortium),
        "leaves": found.size,
        "enrolled": list(found.enrolled),
        "cosigned": dict(found.cosigned),
        "needed": f"{quorum_of(len(found.enrolled))} of {len(found.enrolled)}",
        "quorum": not found.shortfalls,
        "quorum_up_to": quorate,
        "lacking": [_told(shortfall, found.size) for shortfall in found.shortfalls],
    }


def checkpoint(home: ServerHome, out: Path | None) -> str:
    """The latest checkpoint with its cosignatures, as a signed note; also written to `out` if given.

    Raises:
        ProvenanceError: PF609, the log is empty; PF607, it is not the one that was signed.
    """
    with opened_by(home.root, Role.AUDITOR) as (store, _):
        keeper = log_keeper(home, store)
        signed = keeper.signed(keeper.checkpoint(0).size)
    if out is not None:
        files.write_atomic(out, signed.to_bytes())
    return signed.to_bytes().decode()


def leaves(home: ServerHome, start: int, stop: int) -> list[dict[str, Any]]:
    """Leaves `start` to `stop - 1`, as far as there are so many.

    Raises:
        ProvenanceError: PF601, an entry is not a leaf.
    """
    with opened_by(home.root, Role.AUDITOR) as (store, _):
        found = store.log_leaves(start, stop)
    parsed = [read_leaf(data, where=f"log, leaf {index}") for index, data in enumerate(found, start=start)]
    return [{"leaf": index, "kind": leaf.kind, "says": leaf.plain()} for index, leaf in enumerate(parsed, start=start)]


def verify(home: ServerHome) -> LogReport:
    """Compare the database with the log, and the log with what was signed.

    Raises:
        LogCheckError: PF606, a row and its leaf disagree; PF607, the log is not the one that was signed.
    """
    with opened_by(home.root, Role.AUDITOR) as (store, _):
        report = check_log(store, log_key(origin_of(home.settings.consortium), home.evidence_key.public))
    if report.findings:
        raise LogCheckError(report)
    return report


def _told(shortfall: Shortfall, size: int) -> str:
    """Where cosignatures are lacking, for people."""
    missing = sorted(shortfall.of - shortfall.cosigned)
    what = f"checkpoint of {size}" if shortfall.index is None else f"a checkpoint that contains leaf {shortfall.index}"
    have, wanted = len(shortfall.cosigned), quorum_of(len(shortfall.of))
    return f"{what}: {have} of the {wanted} needed; not yet: {', '.join(missing) or 'nobody is enrolled'}"
