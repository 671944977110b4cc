"""`pathfed-server quarantine list | show | release`: updates that were refused and set aside."""

from typing import Annotated, Any

import typer

from pathfed_common.console import Json, show
from pathfed_server.cli_options import HOME, Home, run_name
from pathfed_server.db.rows import QuarantineRow

quarantine_app = typer.Typer(no_args_is_help=True, help="Look at refused updates, and let one count where that is allowed.")

_Number = Annotated[int, typer.Argument(min=1, help="The entry's number, as `quarantine list` shows it.")]


def _shown(row: QuarantineRow) -> dict[str, Any]:
    aside = row.aside
    return {
        "entry": row.number,
        "run": aside.run,
        "round": aside.round_index,
        "site": aside.site,
        "code": aside.code,
        "update": aside.update,
        "update_bytes": aside.update_bytes,
        "came_at": aside.at,
        "released_at": row.released_at,
    }


@quarantine_app.command("list")
def quarantine_list(
    run: Annotated[str | None, typer.Argument(help="The run's name; all runs if not given.")] = None,
    home: Home = HOME,
    as_json: Json = False,
) -> None:
    """List what is in quarantine, each with the code that says why."""
    from pathfed_server import orders

    rows = [_shown(row) for row in orders.quarantine(home, None if run is None else run_name(run))]
    show(rows, as_json=as_json, title="quarantine")


@quarantine_app.command("show")
def quarantine_show(entry: _Number, home: Home = HOME, as_json: Json = False) -> None:
    """Show one entry: where its file is, whether it is whole, and who released it and why."""
    from pathfed_server import orders

    row, whole = orders.quarantine_entry(home, entry)
    more = {"file": row.aside.path, "file_is_whole": whole, "released_by": row.released_by, "release_reason": row.release_reason}
    show({**_shown(row), **more}, as_json=as_json, title=f"quarantine, entry {entry}")


@quarantine_app.command("release")
def quarantine_release(
    entry: _Number,
    reason: Annotated[str, typer.Option("--reason", help="Why; kept in the audit trail. Name no patient.")],
    home: Home = HOME,
    as_json: Json = False,
) -> None:
    """Let an update count that was refused for its norm (PF508) or for coming late (PF561), while its round is not committed.

    Everything else is checked again. The run's record says that it was released, and why it was refused before.
    """
    from pathfed_server import orders

    row = orders.release(home, entry, reason=reason)
    show({**_shown(row), "released_by": row.released_by}, as_json=as_json, title="Released. It counts if every other check holds.")
