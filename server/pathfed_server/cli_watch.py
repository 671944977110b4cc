"""`pathfed-server run status`, `rounds` and `events`: watching, at a glance or for as long as it takes."""

import time
from typing import Annotated, Any

import typer

from pathfed_common import console, interrupts
from pathfed_common.console import Json, show
from pathfed_common.digest import short
from pathfed_common.errors import ErrorCode, HostError, RoundError
from pathfed_server.cli_options import HOME, Home, run_name
from pathfed_server.db.sql_store import SqlStore
from pathfed_server.operators import Role, opened_by

#: Exit status of `run status --follow` when the run was stopped; a failed one ends it with an error.
STOPPED_STATUS = 3

Follow = Annotated[bool, typer.Option("--follow", "-f", help="Go on and print what happens, a line each (with --json a JSON value each).")]


def run_status(
    run: Annotated[str | None, typer.Argument(help="The run's name; all runs if not given.")] = None,
    follow: Follow = False,
    home: Home = HOME,
    as_json: Json = False,
) -> None:
    """Show where runs stand, or all about one of them.

    With --follow it goes on until the run ends: exit status 0 when it finished, 3 when it was stopped, 15 when it failed.
    """
    if run is None and follow:
        raise HostError(ErrorCode.SETTINGS_INVALID, "name the run to follow", where="--follow")
    if follow:
        interrupts.end_on_terminate()
    with opened_by(home, Role.AUDITOR) as (store, _):
        if run is None:
            show(_run_rows(store), as_json=as_json, title="runs")
        elif follow:
            _follow_run(store, run, as_json=as_json)
        else:
            _show_run(store, run, as_json=as_json, wrap=None)


def _run_rows(store: SqlStore) -> list[dict[str, Any]]:
    return [
        {
            "run": row.name,
            "state": row.state.value,
            "code": row.code,
            "plan": short(row.plan),
            "rounds": max(0, len(store.checkpoints(row.name)) - 1),  # the initial state is no round
            "sites": list(row.sites),
        }
        for row in store.runs()
    ]


def _show_run(store: SqlStore, run: str, *, as_json: bool, wrap: str | None) -> None:
    from pathfed_server.watching import following, run_text, run_view

    now = time.time()
    found = following.view(store, run_name(run), now=now)
    if as_json:
        told = run_view.for_scripts(found)
        show(told if wrap is None else {wrap: told}, as_json=True)
    else:
        _print("\n".join(run_text.run_lines(found, now=now)))


def _follow_run(store: SqlStore, run: str, *, as_json: bool) -> None:
    from pathfed_server.db.event_feed import EventFeed
    from pathfed_server.rounds.state import RunState
    from pathfed_server.watching import following
    from pathfed_server.watching.run_text import progress_line

    feed = EventFeed.from_now(store)
    _show_run(store, run, as_json=as_json, wrap="status")
    watch = following.RunWatch(store, run_name(run), feed)
    for found in following.follow(watch.look, _aside):
        if isinstance(found, RunState):
            return _end(store, run, found, as_json=as_json)
        _tell_event(found, as_json=as_json, wrap="event")
        if found.action == "round.committed" and not as_json:
            _print(progress_line(following.view(store, run_name(run), now=time.time())))
    return None


def _end(store: SqlStore, run: str, state: str, *, as_json: bool) -> None:
    _show_run(store, run, as_json=as_json, wrap="status")
    if state == "failed":
        code = store.run(run_name(run)).code
        raise RoundError(ErrorCode.RUN_FAILED, "the run has failed", where=run, value=code)
    if state == "stopped":
        raise typer.Exit(STOPPED_STATUS)


def rounds(
    run: Annotated[str, typer.Argument(help="The run's name.")],
    last: Annotated[int | None, typer.Option(min=1, help="Only so many, the newest.")] = None,
    home: Home = HOME,
    as_json: Json = False,
) -> None:
    """Show a run's rounds: how long each took, who was admitted, and why others were not."""
    from pathfed_common.model import noise_norm
    from pathfed_server.watching import round_rows

    with opened_by(home, Role.AUDITOR) as (store, _):
        found = store.run_facts(run_name(run), newest=last)
    facts, noise = found.rounds, noise_norm(found.plan.plan())
    if as_json:
        show([round_rows.for_scripts(row, took, noise) for row, took in round_rows.timed(facts)], as_json=True)
    else:
        show([round_rows.for_people(row, took, noise) for row, took in round_rows.timed(facts)], as_json=False, title=f"rounds of {run}")


def events(
    follow: Follow = False,
    run: Annotated[str | None, typer.Option(help="Only what concerns this run.")] = None,
    since: Annotated[
        str | None,
        typer.Option(help="Only events after this number, or from this time on: 2026-11-30T12:00 (UTC), or 90s, 15m, 2h, 3d ago."),
    ] = None,
    kind: Annotated[
        list[str] | None, typer.Option(help="Only this kind, such as round.failed, or round for all of them; repeat it.")
    ] = None,
    home: Home = HOME,
    as_json: Json = False,
) -> None:
    """Print what happened, in order. Each event has a number that never changes: --since NUMBER resumes after it, and skips none."""
    from pathfed_server.db.event_feed import EventFeed
    from pathfed_server.watching import event_lines, following
    from pathfed_server.watching.choosing import chosen, start_of

    after, not_before = start_of(since, now=time.time())
    wanted = chosen(None if run is None else run_name(run), kind or [], not_before)
    with opened_by(home, Role.AUDITOR) as (store, _):
        if run is not None:
            store.run(run_name(run))
        feed = EventFeed(store, after)
        if follow:
            interrupts.end_on_terminate()
            for row in following.follow(lambda: following.next_events(feed, wanted), _aside):
                _tell_event(row, as_json=as_json, wrap=None)
        rows = following.all_events(feed, wanted)
    if as_json:
        show([event_lines.for_scripts(row) for row in rows], as_json=True)
    else:
        _print("\n".join(event_lines.for_people(row) for row in rows) or "events: none")


def _tell_event(row: Any, *, as_json: bool, wrap: str | None) -> None:
    from pathfed_server.watching import event_lines

    if as_json:
        told = event_lines.for_scripts(row)
        show(told if wrap is None else {wrap: told}, as_json=True)
    else:
        _print(event_lines.for_people(row))


def _print(text: str) -> None:
    console.out.print(text, markup=False, highlight=False, soft_wrap=True)


def _aside(line: str) -> None:
    console.err.print(line, markup=False, highlight=False, soft_wrap=True)


def register(app: typer.Typer, run_app: typer.Typer) -> None:
    """Add these commands."""
    run_app.command("status")(run_status)
    app.command()(rounds)
    app.command()(events)
