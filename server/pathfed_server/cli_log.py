"""`pathfed-server log` and `pathfed-server lineage`: what was recorded, as the operator sees it."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from pathfed_common.console import Json, out, show
from pathfed_server.cli_options import HOME, Home
from pathfed_server.home import ServerHome

log_app = typer.Typer(no_args_is_help=True, help="The transparency log: where it stands, and whether the database agrees with it.")


@log_app.command("show")
def log_show(home: Home = HOME, as_json: Json = False) -> None:
    """Say how large the log is, who cosigned its latest checkpoint, and who is lacking for a quorum."""
    from pathfed_server import logkeeping

    show(logkeeping.standing(ServerHome(home)), as_json=as_json, title="The transparency log")


@log_app.command("checkpoint")
def log_checkpoint(
    to: Annotated[Path | None, typer.Option("--out", help="Also write it to this file.")] = None, home: Home = HOME, as_json: Json = False
) -> None:
    """Print the latest checkpoint with its cosignatures: a C2SP signed note that anybody can verify."""
    from pathfed_server import logkeeping

    text = logkeeping.checkpoint(ServerHome(home), to)
    if as_json:
        show({"checkpoint": text, "file": None if to is None else str(to)}, as_json=True)
    else:
        out.print(text, end="", markup=False, highlight=False, soft_wrap=True)


@log_app.command("leaves")
def log_leaves(
    start: Annotated[int, typer.Option(min=0, help="The first leaf.")] = 0,
    count: Annotated[int, typer.Option(min=1, max=100_000, help="How many to show, at most.")] = 100,
    home: Home = HOME,
    as_json: Json = False,
) -> None:
    """List what the log says, leaf by leaf."""
    from pathfed_server import logkeeping

    show(logkeeping.leaves(ServerHome(home), start, start + count), as_json=as_json, title="leaves")


@log_app.command("verify")
def log_verify(home: Home = HOME, as_json: Json = False) -> None:
    """Compare every row of evidence with the log, and the log with the checkpoints that were signed."""
    from pathfed_server import logkeeping

    try:
        report = logkeeping.verify(ServerHome(home))
    except logkeeping.LogCheckError as error:
        if not as_json:
            show([asdict(finding) for finding in error.report.findings], as_json=False, title="What does not hold")
        raise
    shown = {"leaves": report.leaves, "checkpoints": report.checkpoints, "cosignatures": report.cosignatures, "rows": report.rows}
    show(shown, as_json=as_json, title="The database agrees with the log, and the log with what was signed.")


def lineage(
    name: Annotated[
        str | None, typer.Argument(help="A site, a release (its digest, or enough of its start) or a run; every site if not given.")
    ] = None,
    home: Home = HOME,
    as_json: Json = False,
) -> None:
    """Show which states and releases a site's updates are in and what its withdrawal can undo, or which sites are in a release."""
    from pathfed_server import lineage as lineages

    if name is None:
        show(lineages.overview(ServerHome(home)), as_json=as_json, title="How far each site's updates went")
        return
    found = lineages.of(ServerHome(home), name)
    if as_json:
        show(found, as_json=True)
        return
    apart = ("runs", "sites", "can_be_undone", "cannot_be_undone")
    show({key: value for key, value in found.items() if key not in apart}, as_json=False, title=f"Lineage of {name}")
    for key in apart:
        if key in found and key.endswith("undone"):
            out.print(f"[bold]What {key.replace('_', ' ')}[/]")
            for line in found[key]:
                out.print(f"  - {line}", markup=False, highlight=False, soft_wrap=True)
        elif key in found:
            show(found[key], as_json=False, title=key)
