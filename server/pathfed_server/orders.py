"""What an operator orders: a run to pause, go on, stop, drain; sites into it and out of it; a refused update to count."""

import time
from collections.abc import Sequence
from pathlib import Path

from pathfed_common.digest import Digest
from pathfed_common.errors import ErrorCode, RoundError, TransportError
from pathfed_common.ids import RunName, SiteName
from pathfed_common.part_file import file_digest
from pathfed_common.provenance.documents import REVOCATION
from pathfed_server.db.rows import QuarantineRow
from pathfed_server.db.sql_store import SqlStore
from pathfed_server.home import ServerHome
from pathfed_server.operators import Role, opened_by
from pathfed_server.rounds.state import RunState, SiteState
from pathfed_server.words import demand_present_keys, outdated


def pause_run(root: Path, run: RunName, *, now: bool = False) -> RunState:
    """Let a run pause after the round under way, or at once; its state after this.

    Raises:
        RoundError: PF510, no such run; PF511, it has finished, failed or been stopped; PF522, PF523, see `operators.acting`.
    """
    with opened_by(root, Role.OPERATOR) as (store, by):
        return store.pause_run(run, now=now, at=time.time(), by=by)


def drain_run(root: Path, run: RunName) -> RunState:
    """Let a run stop after the round under way; its state after this.

    Raises:
        RoundError: PF510, no such run; PF511, it has finished or failed; PF522, PF523, see `operators.acting`.
    """
    with opened_by(root, Role.OPERATOR) as (store, by):
        return store.drain_run(run, at=time.time(), by=by)


def stop_run(root: Path, run: RunName) -> None:
    """Stop a run at once: the round under way does not count.

    Raises:
        RoundError: PF510, no such run; PF511, it has finished or failed; PF522, PF523, see `operators.acting`.
    """
    with opened_by(root, Role.OPERATOR) as (store, by):
        store.stop_run(run, at=time.time(), by=by)


def resume_run(root: Path, run: RunName) -> RunState:
    """Let a paused, stopped or failed run go on from its last committed round, or take back an order to pause; its state after this.

    Raises:
        RoundError: PF510, no such run; PF511, it is finished; PF532, a site that still takes part has replaced the key it approved
            with; PF522, PF523, see `operators.acting`.
    """
    with opened_by(root, Role.OPERATOR) as (store, by):
        given = store.run(run)
        old = outdated(store, given.plan).intersection(given.sites)
        if store.checkpoints(run):
            # Sites that take part no more: what the record has of them was written before, and stays.
            gone = (row.name for row in store.sites() if row.state is not SiteState.ENROLLED)
            old = old.difference(gone, store.words_against(given.plan))
        demand_present_keys(old)
        return store.reopen_run(run, at=time.time(), by=by)


def change_sites(root: Path, run: RunName, *, add: Sequence[SiteName], remove: Sequence[SiteName]) -> tuple[SiteName, ...]:
    """Take sites into a run and out of it, from its next round on; the sites in it after this.

    Raises:
        TransportError: PF407, a site to be taken in has not approved the run's plan.
        RoundError: PF510, no such run; PF511, it is finished; PF501, no such site; PF530, PF532, its approval of the plan is taken
            back, or signed with a key it has replaced; PF518, it is revoked; PF503, fewer sites than the quorum would be left; PF522,
            PF523, see `operators.acting`.
    """
    with opened_by(root, Role.OPERATOR) as (store, by):
        given = store.run(run)
        plan = store.plan(given.plan)
        for name in add:
            _demand_approval(store, name, given.plan)
        demand_present_keys(outdated(store, given.plan).intersection(add))
        return store.change_run_sites(run, add=add, remove=remove, quorum=plan.plan().rounds.quorum, at=time.time(), by=by)


def _demand_approval(store: SqlStore, name: SiteName, plan: Digest) -> None:
    store.site(name)
    if store.words_against(plan).get(name) == REVOCATION:
        raise RoundError(ErrorCode.APPROVAL_REVOKED, "the site has taken its approval of the run's plan back", value=name)
    if name not in {row.site for row in store.approvals(plan)} or name in store.words_against(plan):
        remedy = "send the hospital the plan; it joins once its approval is here"
        raise TransportError(ErrorCode.PLAN_NOT_APPROVED, "the site has not approved the run's plan", value=name, remedy=remedy)


def reinstate_site(root: Path, site: SiteName) -> None:
    """End a site's suspension.

    Raises:
        RoundError: PF501, no such site; PF522, PF523, see `operators.acting`.
    """
    with opened_by(root, Role.OPERATOR) as (store, by):
        store.reinstate_site(site, at=time.time(), by=by)


def quarantine(root: Path, run: RunName | None) -> list[QuarantineRow]:
    """What is in quarantine, of one run or of all.

    Raises:
        RoundError: PF510, no such run; PF522, see `operators.acting`.
    """
    with opened_by(root, Role.AUDITOR) as (store, _):
        return store.quarantine(run)


def quarantine_entry(root: Path, number: int) -> tuple[QuarantineRow, bool]:
    """One entry, and whether its file is whole.

    Raises:
        RoundError: PF567, no such entry; PF522, see `operators.acting`.
    """
    with opened_by(root, Role.AUDITOR) as (store, _):
        row = store.quarantine_entry(number)
        return row, _is_whole(root, row)


def release(root: Path, number: int, *, reason: str) -> QuarantineRow:
    """Let an update count that was refused for its norm or for coming late, while its round is open.

    Raises:
        RoundError: PF567, no such entry; PF566, it cannot be released; PF522, PF523, see `operators.acting`.
    """
    with opened_by(root, Role.OPERATOR) as (store, by):
        row = store.quarantine_entry(number)
        if not _is_whole(root, row):
            raise RoundError(ErrorCode.RELEASE_REFUSED, "its file in quarantine is gone or changed", where=row.aside.path, value=number)
        return store.release_quarantined(number, reason=reason, at=time.time(), by=by)


def _is_whole(root: Path, row: QuarantineRow) -> bool:
    try:
        return file_digest(ServerHome(root).root / row.aside.path) == row.aside.update
    except OSError:
        return False
