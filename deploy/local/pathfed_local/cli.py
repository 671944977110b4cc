"""`pathfed`: what belongs to neither side: the demo, planning what a run costs, and checking a run's record."""

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pathfed_common import console, interrupts
from pathfed_common.console import Json, show
from pathfed_common.errors import ErrorCode, ProvenanceError

if TYPE_CHECKING:
    from pathfed_common.provenance.record_reader import TrustedKeys

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Try pathfed, and check what others made with it.", pretty_exceptions_enable=False
)

plan_app = typer.Typer(no_args_is_help=True, help="Think about a plan before it is published or approved.")
app.add_typer(plan_app, name="plan")

#: Rounds whose epsilon is computed, at most: as points of a plot, as JSON.
_POINTS, _VALUES = 25, 100


class Objective(StrEnum):
    """The objectives that the demo has a plan for."""

    mae = "mae"
    dino = "dino"


@app.command()
def demo(
    slides: Annotated[
        Path | None, typer.Option(help="Folder with <hospital>/slides/* and <hospital>/patients.csv; painted if not given.")
    ] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds; the plan's if not given.")] = None,
    sites: Annotated[int, typer.Option(min=1, max=16, help="Hospitals at most.")] = 3,
    patients: Annotated[int, typer.Option(min=4, max=1000, help="Patients of each painted hospital.")] = 40,
    out: Annotated[Path, typer.Option(help="Folder for everything; an earlier demo there is replaced.")] = Path("pathfed-demo"),
    objective: Annotated[Objective, typer.Option(help="What is trained: masked autoencoding or self-distillation.")] = Objective.mae,
    plan: Annotated[Path | None, typer.Option(help="Another plan, TOML.")] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Leave server and sites running afterwards, until Ctrl-C.")] = False,
    reply_slots: Annotated[bool, typer.Option(help="Sites reply at public time slots.")] = True,
) -> None:
    """Run a whole consortium on this machine: slides, private rounds over Flower, a verified encoder."""
    from pathfed_local.demo import Demo, DemoOptions
    from pathfed_local.plans import demo_plan
    from pathfed_local.view import View

    interrupts.end_on_terminate()
    options = DemoOptions(
        out=out,
        slides=slides,
        plan=plan or demo_plan(objective.value),
        rounds=rounds,
        sites=sites,
        keep=keep,
        patients=patients,
        reply_slots=reply_slots,
    )
    Demo(options, View(console.out)).run()
    _where(out)


def _where(out: Path) -> None:
    places = {
        "encoder": out / "release" / "encoder" / "model.safetensors",
        "release": out / "release",
        "report": out / "report.html",
        "database": out / "server" / "pathfed.db",
        "logs": out / "logs",
        "commands": out / "commands.log",
        "next": f"pathfed verify {out / 'release'} --trust {out / 'trust.json'} --replay {out / 'record' / 'updates'}",
    }
    show(places, as_json=False, title="Done.")


@app.command()
def simulate(
    plan: Annotated[Path | None, typer.Argument(help="A plan, TOML; one with little work a site if not given.")] = None,
    sites: Annotated[int, typer.Option(help="Virtual sites.")] = 200,
    rounds: Annotated[int | None, typer.Option(min=1, max=10_000, help="Rounds; the plan's if not given.")] = None,
    processes: Annotated[int, typer.Option(min=1, max=512, help="Virtual sites that compute at a time.")] = 2,
    out: Annotated[Path, typer.Option(help="Folder for everything; an earlier simulation there is replaced.")] = Path("pathfed-simulation"),
    as_json: Json = False,
) -> None:
    """Run the server's rounds with many virtual sites, on Flower's simulation engine, and say what a round takes.

    Round loop, admission, aggregation and record are the real ones; virtual sites take the private step on painted tiles.
    """
    from pathfed_local.plans import simulation_plan
    from pathfed_local.simulation.simulating import Simulation, SimulationOptions

    interrupts.end_on_terminate()
    options = SimulationOptions(out=out, plan=plan or simulation_plan(), sites=sites, rounds=rounds, processes=processes)
    figures = Simulation(options, lambda line: console.err.print(line, highlight=False)).run()
    show(figures, as_json=as_json, title=f"{sites} virtual sites on this machine.")


@app.command()
def verify(
    given: Annotated[
        Path, typer.Argument(metavar="BUNDLE", help="A release's bundle, folder or archive; a run's record; or the folder of a demo.")
    ],
    trust: Annotated[
        Path | None, typer.Option(help="Keys you got by another way: a JSON file, a card, or a folder of them; `pathfed demo` writes one.")
    ] = None,
    replay: Annotated[
        Path | None, typer.Option(metavar="UPDATES", help="Folder of the retained updates: recompute every state from them, bit for bit.")
    ] = None,
    redraw: Annotated[
        bool, typer.Option(help="Draw the first state's random weights again from the plan's seed; takes as much memory as the model.")
    ] = True,
    as_json: Json = False,
) -> None:
    """Check a release or a run's record offline: every byte, signature, chain and epsilon, and that it started where its plan says.

    Exit status 0: all is proven. 3: identities are not, without --trust. 4: the aggregation is not, without --replay, or with --no-redraw,
    which leaves its start unproven. 5: neither is. 6: it cannot be read. 16: something does not verify. A run's record alone has no log:
    there, 0 says nothing of the aggregation, and 4 and 5 are about its start.
    """
    from pathfed_common.provenance.release_verify import is_bundle
    from pathfed_local import verifying
    from pathfed_local.trusting import trusted_keys

    keys = trusted_keys(trust)
    try:
        with verifying.opened(given) as folder:
            check = _verify_bundle if is_bundle(folder) else _verify_record
            ended = check(folder, keys, replay, redraw=redraw, as_json=as_json)
    except ProvenanceError as error:
        if error.code is not ErrorCode.BUNDLE_UNREADABLE:
            raise
        console.show_error(error, as_json=as_json)
        sys.exit(verifying.Status.UNREADABLE)
    sys.exit(ended)


def _verify_bundle(folder: Path, keys: "TrustedKeys | None", updates: Path | None, *, redraw: bool, as_json: bool) -> int:
    from pathfed_common.provenance.release_verify import verify_release
    from pathfed_local import verifying
    from pathfed_local.replaying import replay

    given = None if updates is None else partial(replay, updates)
    verdict = verify_release(folder, keys, redraw=redraw, replay=given)
    _demand(verdict.findings)
    proven, unproven = verifying.proven(verdict), verifying.not_proven(verdict)
    if as_json:
        show({**verifying.release_summary(verdict), "proven": proven, "not_proven": unproven}, as_json=True)
    else:
        show(verifying.release_summary(verdict), as_json=False, title="Nothing is wrong with this release.")
        for title, sentences in (("Proven", proven), ("Not proven", unproven)):
            console.out.print(f"\n[bold]{title}[/]")
            for sentence in sentences:
                console.out.print(f"  - {sentence}", markup=False, highlight=False)
    return verifying.status(verdict)


def _verify_record(folder: Path, keys: "TrustedKeys | None", updates: Path | None, *, redraw: bool, as_json: bool) -> int:
    from pathfed_common.provenance.verify import examine_record, verify_record
    from pathfed_local.replaying import replay
    from pathfed_local.verifying import record_status, summary

    verdict = verify_record(folder, keys, redraw=redraw)
    _demand(verdict.findings)
    if updates is not None:
        contents = examine_record(folder, keys, redraw=False).contents
        _demand(tuple(replay(updates, folder, contents)) if contents else ())
        notes = tuple(note for note in verdict.notes if not note.startswith("aggregation not proven"))
        verdict = replace(verdict, aggregation_proven=True, notes=notes)
    title = "consistent, identities proven" if verdict.identities_proven else "consistent, IDENTITIES UNPROVEN (PF604)"
    show(summary(verdict), as_json=as_json, title=title)
    return record_status(verdict)


def _demand(findings: Sequence[ProvenanceError]) -> None:
    """Tell every finding; the first ends the command."""
    for finding in findings[1:]:
        console.show_error(finding)
    if findings:
        raise findings[0]


@app.command()
def export(
    given: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A release's bundle, folder or archive.")],
    prov: Annotated[Path | None, typer.Option(help="Where to write the lineage as W3C PROV-JSON.")] = None,
    ml_bom: Annotated[Path | None, typer.Option("--ml-bom", help="Where to write a CycloneDX bill of materials of the model.")] = None,
    trust: Annotated[Path | None, typer.Option(help="Keys you got by another way, as `verify` takes them.")] = None,
    as_json: Json = False,
) -> None:
    """Verify a release, and write it in forms that other tools read. They say less than the bundle and prove nothing."""
    from pathfed_common.errors import HostError
    from pathfed_local.exporting import export_release
    from pathfed_local.trusting import trusted_keys

    if prov is None and ml_bom is None:
        raise HostError(ErrorCode.SETTINGS_INVALID, "nothing to write", remedy="give --prov FILE, --ml-bom FILE or both")
    export_release(given, trusted_keys(trust), prov=prov, bom=ml_bom)
    written = {"prov": prov, "ml_bom": ml_bom}
    show({name: str(place) for name, place in written.items() if place}, as_json=as_json, title="Written.")


@plan_app.command("privacy")
def plan_privacy(
    plan: Annotated[Path, typer.Argument(help="A plan: TOML, or the signed file that sites get.")],
    patients: Annotated[int | None, typer.Option(help="N, the patients that a site declares; needed.")] = None,
    target_epsilon: Annotated[float | None, typer.Option(help="Epsilon to plan for; the plan's own limit if not given.")] = None,
    delta: Annotated[float | None, typer.Option(help="Where epsilon is stated; the plan's own if not given.")] = None,
    at_sites: Annotated[int, typer.Option(min=1, max=100, help="Sites a patient may be at who shall be within the target.")] = 1,
    plot: Annotated[Path | None, typer.Option(help="Where to write epsilon by round as an SVG picture.")] = None,
    as_json: Json = False,
) -> None:
    """Say what a plan costs a patient, round by round, and what sigma, B, rounds or N would meet a target epsilon.

    For a patient at one, two and three sites. With --json, every round up to 100 rounds, else 100 of them.
    """
    from pathfed_common import files
    from pathfed_local.plan_privacy import ROWS, Asked, privacy_report, read_any_plan
    from pathfed_local.privacy_chart import privacy_chart

    found = read_any_plan(plan)
    most = _VALUES if as_json else _POINTS if plot else ROWS
    asked = Asked(patients=patients, target=target_epsilon, delta=delta, at_sites=at_sites, most_rounds=most)
    with nullcontext() if as_json else console.err.status("asking the accountant"):
        report = privacy_report(found, asked)
    if plot is not None:
        files.write_atomic(plot, privacy_chart(report).encode())
    if as_json:
        show(report.to_dict(), as_json=True)
        return
    show(report.figures(), as_json=False, title=f"{plan} for a site of {report.cost.patients:,} patients")
    show(report.table(), as_json=False, title="what a patient has spent after each round")
    title = f"what would meet epsilon {report.target:g} for a patient at {at_sites} site{'s' * (at_sites > 1)}"
    show(report.needs(), as_json=False, title=title)


@plan_app.command("traffic")
def plan_traffic(
    plan: Annotated[Path | None, typer.Argument(help="A plan: TOML, or the signed file that sites get.")] = None,
    parameters: Annotated[float | None, typer.Option(help="In place of a plan: numbers of a model, such as 1.9e9.")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds; the plan's if not given.")] = None,
    sites: Annotated[int, typer.Option(help="Sites in a round.")] = 50,
    site_mbit_s: Annotated[float, typer.Option(help="Each site's line, Mbit/s one way.")] = 100.0,
    server_mbit_s: Annotated[float, typer.Option(help="The server's line, Mbit/s one way.")] = 1000.0,
    compute_s: Annotated[float, typer.Option(help="Seconds of a round's private steps at the slowest site.")] = 60.0,
    slot_s: Annotated[float | None, typer.Option(help="Reply slot, seconds; the plan's if not given.")] = None,
    admission_gb_s: Annotated[float, typer.Option(help="Updates that the server checks, GB/s.")] = 0.3,
    aggregation_gb_s: Annotated[float, typer.Option(help="Updates that the server averages, GB/s.")] = 0.5,
    step_gb_s: Annotated[float, typer.Option(help="States that the server's step reads and writes, GB/s.")] = 0.3,
    as_json: Json = False,
) -> None:
    """Say how long a round takes and what the server sends and receives, by a model: what is slowest, and what would help.

    For a plan, or for a model of so many numbers. docs/scale.md says what the defaults were taken from.
    """
    from pathfed_local.plan_traffic import traffic_report
    from pathfed_local.traffic_model import Conditions

    conditions = Conditions(
        sites=sites,
        site_mbit_s=site_mbit_s,
        server_mbit_s=server_mbit_s,
        compute_s=compute_s,
        admission_gb_s=admission_gb_s,
        aggregation_gb_s=aggregation_gb_s,
        step_gb_s=step_gb_s,
    )
    report = traffic_report(plan, parameters, conditions, rounds=rounds, slot_s=slot_s)
    if as_json:
        show(report.to_dict(), as_json=True)
        return
    show(report.figures(), as_json=False, title=f"a round of {report.subject} at {sites} sites")
    show(report.stages(), as_json=False, title="its stages")
    show(report.others(), as_json=False, title="the same model in other ways")


def main() -> None:
    """The command line."""
    console.run(app)
