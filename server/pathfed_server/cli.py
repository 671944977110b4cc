"""`pathfed-server`: what a consortium's operator does."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from pathfed_common import console, interrupts
from pathfed_common.console import Json, show
from pathfed_server import cli_plans, cli_runs, cli_watch
from pathfed_server.cli_log import lineage, log_app
from pathfed_server.cli_members import audit, ca_app, invite, operators_app, sites_app
from pathfed_server.cli_notify import notify_app
from pathfed_server.cli_options import HOME, Home, run_name, site_name
from pathfed_server.cli_quarantine import quarantine_app
from pathfed_server.cli_release import release_app
from pathfed_server.operators import Role, opened_by

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Run a consortium: plans, sites, runs and rounds.", pretty_exceptions_enable=False
)
plan_app = typer.Typer(no_args_is_help=True, help="Check and publish plans.")
cli_plans.register(plan_app)
encoder_app = typer.Typer(no_args_is_help=True, help="Bring in published encoders that plans start from.")
run_app = typer.Typer(no_args_is_help=True, help="Start, pause, stop and watch runs.")
cli_runs.register(run_app)
app.command()(invite)
app.add_typer(sites_app, name="sites")
app.add_typer(plan_app, name="plan")
app.add_typer(encoder_app, name="encoder")
app.add_typer(run_app, name="run")
app.add_typer(quarantine_app, name="quarantine")
app.add_typer(log_app, name="log")
app.command("lineage")(lineage)
app.add_typer(release_app, name="release")
app.add_typer(operators_app, name="operators")
app.add_typer(ca_app, name="ca")
app.command()(audit)
cli_watch.register(app, run_app)
app.add_typer(notify_app, name="notify")

Port = Annotated[int | None, typer.Option(min=1, max=65535, help="TCP port for sites; a free one is chosen if not given.")]


@app.command()
def init(
    home: Home = HOME,
    consortium: Annotated[str, typer.Option(help="The consortium's name: lower-case letters, digits, inner hyphens.")] = "consortium",
    host: Annotated[str, typer.Option(help="Name or address that sites connect to.")] = "127.0.0.1",
    listen: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    fleet_port: Port = None,
    control_port: Port = None,
    enrolment_port: Port = None,
    database: Annotated[
        str,
        typer.Option(
            help="SQLAlchemy URL of the metadata database, such as postgresql://user@host/pathfed; SQLite in the home if not given."
        ),
    ] = "",
    as_json: Json = False,
) -> None:
    """Make the server's home, keys, certificates and database."""
    from pathfed_server import app as server

    made = server.init(
        home,
        consortium=consortium,
        host=host,
        listen=listen,
        database=database,
        fleet_port=fleet_port,
        control_port=control_port,
        enrolment_port=enrolment_port,
    )
    show(
        {
            "home": str(made.root),
            "server_card": str(made.card_file),
            "evidence_key": made.evidence_key.public.to_text(),
            "fleet_address": made.settings.fleet_address,
            "control_address": made.settings.control_address,
            "enrolment_address": made.settings.enrolment_address,
        },
        as_json=as_json,
        title="The server's home is made. Hand the server card to every site, and compare the key by telephone.",
    )


@app.command()
def start(home: Home = HOME, as_json: Json = False) -> None:
    """Serve sites and carry out runs, until Ctrl-C."""
    from pathfed_server import app as server

    interrupts.end_on_terminate()
    server.serve(
        home,
        lambda line: (
            show({"at": time.strftime("%H:%M:%S"), "event": line}, as_json=True)
            if as_json
            else console.out.print(line, soft_wrap=True, markup=False)
        ),
    )


@plan_app.command("check")
def plan_check(
    file: Annotated[Path, typer.Argument(help="A plan, TOML.")],
    patients: Annotated[int | None, typer.Option(min=1, help="A site's declared lower bound of patients, for the epsilon.")] = None,
    as_json: Json = False,
) -> None:
    """Validate a plan and say what it costs a patient."""
    from pathfed_server import app as server

    show(server.describe_plan(server.read_plan(file), patients), as_json=as_json, title=f"{file} is a valid plan")


@plan_app.command("publish")
def plan_publish(
    file: Annotated[Path, typer.Argument(help="A plan, TOML.")],
    out: Annotated[Path | None, typer.Option(help="Where the signed plan for the sites is written; beside the plan if not given.")] = None,
    home: Home = HOME,
    as_json: Json = False,
) -> None:
    """Sign a plan and write the file that sites approve."""
    from pathfed_server import app as server

    target = out or file.with_suffix(".plan.dsse")
    plan = server.publish_plan(home, file, target)
    show(
        {"plan": plan.digest, "name": plan.name, "signed_plan": str(target)},
        as_json=as_json,
        title="Published. Hand the signed plan to every site.",
    )


@plan_app.command("list")
def plan_list(home: Home = HOME, as_json: Json = False) -> None:
    """List the published plans."""
    with opened_by(home, Role.AUDITOR) as (store, _):
        rows = [
            {
                "plan": row.digest,
                "name": row.name,
                "published_at": row.published_at,
                "approved_by": [given.site for given in store.approvals(row.digest) if given.site not in against],
                "against": against,
            }
            for row, against in ((row, store.words_against(row.digest)) for row in store.plans())
        ]
    show(rows, as_json=as_json, title="plans")


@encoder_app.command("import")
def encoder_import(
    file: Annotated[Path, typer.Argument(help="The published checkpoint, a safetensors file.")],
    preset: Annotated[str, typer.Option(help="The encoder it is for: one of the plan's encoder.preset.")],
    tile_px: Annotated[
        int | None,
        typer.Option(min=1, help="Side of the plan's tiles, pixels; the position embedding is resampled to it. 224 if not given."),
    ] = None,
    prefix: Annotated[str | None, typer.Option(help="What stands before the encoder's names in the file; found out if not given.")] = None,
    home: Home = HOME,
    as_json: Json = False,
) -> None:
    """Check a published encoder, keep it, and print the digest that plans name it by."""
    from pathfed_common.encoder.published import Match, report
    from pathfed_server import app as server

    def tell(match: Match) -> None:
        if not as_json:
            show(report(match.findings), as_json=False, title=f"{file}, names starting with {match.prefix!r}")

    made = server.import_encoder(home, file, preset_name=preset, tile_px=tile_px, prefix=prefix, tell=tell)
    result: dict[str, object] = {"init_from": made.digest, "stored": str(made.path), "prefix": made.match.prefix, **made.match.counts}
    if as_json:
        result["tensors"] = [asdict(finding) for finding in made.match.findings]
    show(result, as_json=as_json, title="Imported. Let the plan's encoder.init_from name this digest.")


@run_app.command("start")
def run_start(
    plan: Annotated[str, typer.Argument(help="The plan's digest, or enough of its start to be unambiguous.")],
    name: Annotated[str, typer.Option(help="The run's name: lower-case letters, digits, inner hyphens.")],
    site: Annotated[
        list[str] | None, typer.Option(help="A site to ask; repeat it. Every site that approved the plan if not given.")
    ] = None,
    home: Home = HOME,
    as_json: Json = False,
) -> None:
    """Plan a run; a running `pathfed-server start` takes it up at once."""
    from pathfed_server import app as server

    run = server.start_run(home, plan, run_name(name), [site_name(text) for text in site or []])
    show(
        {"run": run.name, "plan": run.plan, "sites": list(run.sites), "state": run.state.value},
        as_json=as_json,
        title="The run is planned.",
    )


@run_app.command("report")
def run_report(
    run: Annotated[str, typer.Argument(help="The run's name.")],
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("report.html"),
    home: Home = HOME,
    as_json: Json = False,
) -> None:
    """Write a run's report: one self-contained HTML page."""
    from pathfed_server import reporting
    from pathfed_server.home import ServerHome

    with opened_by(home, Role.AUDITOR):
        reporting.write_report(ServerHome(home), run_name(run), out)
    show({"run": run, "report": str(out)}, as_json=as_json)


def main() -> None:
    """The command line."""
    console.run(app)
