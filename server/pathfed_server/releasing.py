"""`pathfed-server release`: makes a run's release, notes it in the log, and writes the bundle once enough sites have co-signed."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pathfed_common import files
from pathfed_common.digest import Digest
from pathfed_common.errors import ErrorCode, HostError, ProvenanceError
from pathfed_common.ids import RunName
from pathfed_common.provenance.log_checkpoint import origin_of
from pathfed_common.provenance.log_history import read_history
from pathfed_common.provenance.log_leaves import Released
from pathfed_common.provenance.log_quorum import Shortfall
from pathfed_common.provenance.release_verify import quorum_error
from pathfed_server.db.sql_store import SqlStore
from pathfed_server.home import ServerHome
from pathfed_server.operators import Role, opened_by
from pathfed_server.provenance.log_keeper import LogFile, LogKeeper
from pathfed_server.provenance.release import Prepared, prepare, write_archive, write_bundle
from pathfed_server.rounds.state import RunState

_POLL_S = 1.0


@dataclass(frozen=True, kw_only=True)
class Made:
    """A release that was written.

    Attributes:
        digest: what names it in the log.
        bundle: its folder.
        archive: its archive, or None.
        updates: how many of the admitted updates are retained, and how many there are.
        leaves: entries of the log in the bundle.
    """

    digest: Digest
    bundle: Path
    archive: Path | None
    updates: tuple[int, int]
    leaves: int


def create_release(
    home: ServerHome,
    run: RunName,
    out: Path,
    *,
    archive: Path | None = None,
    evaluation: Path | None = None,
    wait_s: float = 0.0,
    tell: Callable[[str], None] = lambda line: None,
) -> Made:
    """Release a finished run. Called again, it goes on with the release that waits.

    Args:
        home: the server's home.
        run: the run.
        out: folder of the bundle; it must not exist, or be empty.
        archive: where a tar archive of it goes as well.
        evaluation: file with figures for the card.
        wait_s: how long to wait for co-signatures, seconds.
        tell: told who is waited for.

    Raises:
        RoundError: PF510, no such run; PF522, PF523, see `operators.acting`.
        ProvenanceError: PF613, the run is not finished; PF614, too few sites have co-signed, with the missing ones' names; PF624, not an
            evaluation; another code, the record does not verify.
        HostError: PF904, something is at `out` already, or a file cannot be read or written; PF901, the disk is full.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise HostError(
            ErrorCode.HOME_UNUSABLE, "something is there already and is left as it is", where=out, remedy="choose another folder"
        )
    figures = None if evaluation is None else files.read_given(evaluation)
    with opened_by(home.root, Role.OPERATOR) as (store, by):
        state = store.run(run).state
        if state is not RunState.FINISHED:
            raise ProvenanceError(ErrorCode.RUN_UNFINISHED, "only a finished run is released", where=run, value=state.value)
        origin = origin_of(home.settings.consortium)
        prepared = prepare(home.record(run), home.evidence_key, home.model_key(), origin=origin, evaluation=figures)
        store.add_release(prepared.digest, run=run, at=time.time(), by=by)
        keeper = LogKeeper(store, home.evidence_key, origin, least_interval_s=0.0)
        log = _cosigned_log(store, keeper, prepared, until=time.monotonic() + wait_s, tell=tell)
    write_bundle(prepared, log.leaves, log.notes, home.evidence_key, out)
    if archive is not None:
        write_archive(out, archive)
    return Made(digest=prepared.digest, bundle=out, archive=archive, updates=prepared.updates, leaves=len(log.leaves))


def list_releases(home: ServerHome) -> list[dict[str, Any]]:
    """Every release, the oldest first: run, digest and time, and whether enough sites have co-signed the log since."""
    with opened_by(home.root, Role.AUDITOR) as (store, _):
        keeper = LogKeeper(store, home.evidence_key, origin_of(home.settings.consortium), least_interval_s=0.0)
        return [
            {"run": run, "release": name, "released_at": at, "missing": sorted(_missing(store, keeper, run, name))}
            for name, run, at in store.releases()
        ]


def _missing(store: SqlStore, keeper: LogKeeper, run: RunName, name: Digest) -> set[str]:
    found = _best_log(store, keeper, Released(run=run, release=name).hash)
    return set() if isinstance(found, LogFile) else {site for short in found for site in short.of - short.cosigned}


def _cosigned_log(store: SqlStore, keeper: LogKeeper, prepared: Prepared, *, until: float, tell: Callable[[str], None]) -> LogFile:
    """The log with this release in it and a quorum, as soon as there is one."""
    leaf = Released(run=prepared.manifest.run, release=prepared.digest).hash
    told = ""
    while True:
        found = _best_log(store, keeper, leaf)
        if isinstance(found, LogFile):
            return found
        # The end's shortfall comes last and names the most.
        error = quorum_error(found[-1])
        if time.monotonic() >= until:
            remedy = "the release is noted in the log: run the command again once these sites are connected, or give --wait"
            raise ProvenanceError(
                error.code, error.what, where=f"log, release of {prepared.manifest.run}", value=error.value, remedy=remedy
            )
        if error.value != told:
            told = str(error.value)
            tell(f"waiting for co-signatures: {told}")
        time.sleep(_POLL_S)


def _best_log(store: SqlStore, keeper: LogKeeper, leaf: bytes) -> LogFile | tuple[Shortfall, ...]:
    """The log up to the largest checkpoint that has the leaf and a quorum; without one, what the latest checkpoint lacks."""
    latest = keeper.file()
    size, index = len(latest.leaves), store.log_index(leaf)
    sizes = {size, *(given.size for given in store.cosignatures(size) if index is not None and given.size > index)}
    lacking: tuple[Shortfall, ...] = ()
    for candidate in sorted(sizes, reverse=True):
        taken = latest if candidate == size else keeper.file(candidate)
        short = read_history(taken.leaves, taken.notes, keeper.key).shortfalls
        if not short:
            return taken
        lacking = lacking or short
    return lacking
