"""What an operator orders a run to do: pause, go on, stop, drain."""

import time
from pathlib import Path

from pathfed_common.ids import RunName
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
