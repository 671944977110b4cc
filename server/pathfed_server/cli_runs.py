"""`pathfed-server run pause | resume | stop | drain | sites`: orders to a run. Each may be given twice; the second changes nothing."""

from typing import Annotated

import typer

from pathfed_common.console import Json, show
from pathfed_common.ids import SiteName
from pathfed_server.cli_options import HOME, Home, run_name, site_name

Run = Annotated[str, typer.Argument(help="The run's name.")]


def run_pause(
    run: Run,
    now: Annotated[
        bool, typer.Option("--now", help="At once: the round under way is abandoned, and begun again when the run is resumed.")
    ] = False,
    home: Home = HOME,
    as_json: Json = False,
) -> None:
    """Pause a run after the round under way. Sites keep their connection; nothing is asked of them until `run resume`."""
    from pathfed_server import orders

    show({"run": run, "state": orders.pause_run(home, run_name(run), now=now).value}, as_json=as_json)


def run_resume(run: Run, home: Home = HOME, as_json: Json = False) -> None:
    """Let a paused, failed or stopped run go on from its last committed round, or take back an order to pause or drain."""
    from pathfed_server import orders

    show({"run": run, "state": orders.resume_run(home, run_name(run)).value}, as_json=as_json)


def run_stop(run: Run, home: Home = HOME, as_json: Json = False) -> None:
    """Stop a run at once. The round under way does not count; what is committed stays."""
    from pathfed_server import orders

    orders.stop_run(home, run_name(run))
    show({"run": run, "state": "stopped"}, as_json=as_json)


def run_drain(run: Run, home: Home = HOME, as_json: Json = False) -> None:
    """Stop a run after the round under way."""
    from pathfed_server import orders

    show({"run": run, "state": orders.drain_run(home, run_name(run)).value}, as_json=as_json)


def run_sites(
    run: Run,
    add: Annotated[list[str] | None, typer.Option("--add", help="A site to take in; it has approved the run's plan. Repeat it.")] = None,
    remove: Annotated[list[str] | None, typer.Option("--remove", help="A site to take out. Repeat it.")] = None,
    home: Home = HOME,
    as_json: Json = False,
) -> None:
    """Take sites into a run and out of it, from its next round on."""
    from pathfed_server import orders

    def names(given: list[str] | None) -> list[SiteName]:
        return [site_name(text) for text in given or []]

    show({"run": run, "sites": list(orders.change_sites(home, run_name(run), add=names(add), remove=names(remove)))}, as_json=as_json)


def register(app: typer.Typer) -> None:
    """Add these commands to `run`."""
    app.command("pause")(run_pause)
    app.command("resume")(run_resume)
    app.command("stop")(run_stop)
    app.command("drain")(run_drain)
    app.command("sites")(run_sites)
