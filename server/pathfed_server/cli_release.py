"""`pathfed-server release`: what leaves the consortium for strangers to check."""

from pathlib import Path
from typing import Annotated

import typer

from pathfed_common import console
from pathfed_common.console import Json, show
from pathfed_server.cli_options import HOME, Home, run_name

release_app = typer.Typer(no_args_is_help=True, help="Release encoders, with all that a stranger needs to check them.")


@release_app.command("create")
def release_create(
    run: Annotated[str, typer.Argument(help="A finished run's name.")],
    out: Annotated[Path, typer.Option(help="Folder of the bundle; it must not exist, or be empty.")],
    archive: Annotated[Path | None, typer.Option(help="Also pack the bundle into this tar archive.")] = None,
    evaluation: Annotated[Path | None, typer.Option(help="JSON object of figures for the model card.")] = None,
    wait: Annotated[float, typer.Option(min=0, help="Seconds to wait for the sites' co-signatures.")] = 0.0,
    home: Home = HOME,
    as_json: Json = False,
) -> None:
    """Release a finished run's encoder: note it in the log, and write the bundle once enough sites have co-signed.

    Without enough co-signatures it ends with PF614 and names the missing sites; run it again later, it goes on with the same release.
    """
    from pathfed_server import releasing
    from pathfed_server.home import ServerHome

    def tell(line: str) -> None:
        console.err.print(line, markup=False, highlight=False)

    made = releasing.create_release(ServerHome(home), run_name(run), out, archive=archive, evaluation=evaluation, wait_s=wait, tell=tell)
    retained, admitted = made.updates
    updates = f"{retained} of {admitted} retained" if retained else "not retained: nobody can recompute the aggregation"
    places = {"bundle": str(made.bundle), "archive": str(made.archive) if made.archive else None}
    show(
        {"run": run, "release": made.digest, **places, "log_entries": made.leaves, "updates": updates},
        as_json=as_json,
        title="Released. Readers check it with `pathfed verify`.",
    )


@release_app.command("list")
def release_list(home: Home = HOME, as_json: Json = False) -> None:
    """Show every release, and which sites' co-signatures it still lacks."""
    from pathfed_server import releasing
    from pathfed_server.home import ServerHome

    show(releasing.list_releases(ServerHome(home)), as_json=as_json, title="releases")
