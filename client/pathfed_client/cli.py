"""`pathfed-site`: what a hospital's IT does."""

import sys
from collections.abc import Iterable
from contextlib import closing, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from pathfed_client import plan_commands
from pathfed_client.home import SiteHome
from pathfed_client.io.site_keys import KeyKind
from pathfed_common import console, interrupts
from pathfed_common.console import Json, show

if TYPE_CHECKING:
    from pathfed_client.io.listing import Preview
    from pathfed_client.io.scan_report import ScanReport
    from pathfed_client.io.scan_watch import Told
    from pathfed_client.io.scan_where import ScanWhere
    from pathfed_client.io.withdrawing import WithdrawalInput
    from pathfed_common.errors import SiteDataError
    from pathfed_common.plan import CohortPlan

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Run a hospital's client.", pretty_exceptions_enable=False)
ledger_app = typer.Typer(no_args_is_help=True, help="Show and check what this site's releases have cost.")
app.add_typer(ledger_app, name="ledger")
keys_app = typer.Typer(no_args_is_help=True, help="Show and rotate this site's keys.")
app.add_typer(keys_app, name="keys")
plan_commands.register(app)

Home = Annotated[Path, typer.Option("--home", envvar="PATHFED_SITE_HOME", help="The site's home folder.")]
_HOME = Path("pathfed-site")


@app.command()
def init(
    name: Annotated[str, typer.Option(help="The site's name in the consortium: lower-case letters, digits, inner hyphens.")],
    slides: Annotated[list[Path], typer.Option(help="Folder with the slides; it is only ever read. May be given several times.")],
    patients: Annotated[Path, typer.Option(help="CSV export with a slide and a patient column.")],
    server_card: Annotated[
        Path | None, typer.Option(help="A server card that the operator handed over, for sites without a way to the control plane.")
    ] = None,
    max_epsilon: Annotated[float, typer.Option(help="Largest epsilon a patient of this site may ever spend.")] = 10.0,
    delta: Annotated[float, typer.Option(help="The delta the ledger states epsilon at; fixed for good.")] = 1e-6,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads training may use.")] = 1,
    reply_slots: Annotated[bool, typer.Option(help="Reply at the plan's public time slots. Off is for demos and benchmarks.")] = True,
    home: Home = _HOME,
    as_json: Json = False,
) -> None:
    """Make the site's home, keys and database."""
    from pathfed_client import app as site
    from pathfed_client.gate.site_policy import SitePolicy
    from pathfed_client.home import SiteSettings
    from pathfed_common.settings import checked

    settings = checked(
        SiteSettings, {"name": name, "slides": [str(folder.resolve()) for folder in slides], "patients": str(patients.resolve())}
    )
    policy = checked(SitePolicy, {"max_epsilon": max_epsilon, "delta": delta, "threads": threads, "reply_slots": reply_slots})
    made = site.init(home, settings, policy, server_card)
    show(
        {"home": str(made.root), "site_card": str(made.card_file), "evidence_key": made.evidence_key.public.to_text()},
        as_json=as_json,
        title="The site's home is made. Hand the site card to the operator, and compare the key by telephone."
        if server_card
        else "The site's home is made. Next: `pathfed-site enroll INVITATION`.",
    )


@app.command()
def enroll(
    invitation: Annotated[str, typer.Argument(help="What `pathfed-server invite` printed; - reads it from standard input.")],
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until the operator has decided, or ask once.")] = True,
    home: Home = _HOME,
    as_json: Json = False,
) -> None:
    """Enrol with the server that invited this site. Repeat it whenever it was cut short: keys and request stay the same."""
    from pathfed_client import app as site

    text = sys.stdin.read() if invitation == "-" else invitation
    found = site.enroll(SiteHome(home), text, wait=wait, tell=console.err.print)
    show(
        {"admitted": found.admitted, "fingerprint": found.fingerprint, "certificate_until_at": found.certificate_until},
        as_json=as_json,
        title="Enrolled." if found.admitted else "Asked. Tell the operator the fingerprint by telephone, then run the same command again.",
    )


@keys_app.command("show")
def keys_show(home: Home = _HOME, as_json: Json = False) -> None:
    """Show fingerprints of the site's keys, to compare by telephone. Nothing here is secret."""
    from pathfed_client import app as site

    show(site.show_keys(SiteHome(home)), as_json=as_json, title="`enrolment` is what the operator compares before admitting this site.")


@keys_app.command("rotate")
def keys_rotate(
    kind: Annotated[KeyKind, typer.Argument(help="Which of the three keys.")],
    home: Home = _HOME,
    as_json: Json = False,
) -> None:
    """Make a new key and hand over to it, with the server's consent. Stop `pathfed-site start` first, but for the TLS key.

    Repeat it when it was cut short: it goes on with the same new key.
    """
    from pathfed_client import app as site

    show(site.rotate_key(SiteHome(home), kind), as_json=as_json, title=f"The {kind.value} key was rotated. These are the site's keys now.")


@app.command()
def scan(
    plan: plan_commands.PlanName,
    workers: Annotated[int | None, typer.Option(min=1, help="Reading processes; one for each usable CPU if not given.")] = None,
    slide_timeout: Annotated[float, typer.Option(min=1, help="Seconds a slide may take to read.")] = 300.0,
    watch: Annotated[bool, typer.Option("--watch", help="Go on and take up new and changed slides, until Ctrl-C.")] = False,
    every: Annotated[float, typer.Option(min=0.1, help="With --watch: seconds between scans.")] = 60.0,
    at_rest: Annotated[float, typer.Option(min=0, help="With --watch: seconds a slide must not have changed before it is read.")] = 30.0,
    scheduler: Annotated[str | None, typer.Option(help="HOST:PORT of a Dask scheduler to read with.")] = None,
    scheduler_ca: Annotated[Path | None, typer.Option(help="PEM of the CA of the scheduler's TLS.")] = None,
    scheduler_cert: Annotated[Path | None, typer.Option(help="PEM of this client's certificate for it.")] = None,
    scheduler_key: Annotated[Path | None, typer.Option(help="PEM of that certificate's key.")] = None,
    home: Home = _HOME,
    as_json: Json = False,
) -> None:
    """Find tissue and lay the plan's tile grid on every slide. Resumes where it stopped; a bad slide is listed and stops nothing."""
    from pathfed_client import app as site
    from pathfed_client import deciding
    from pathfed_client.io.scan_where import ScanWhere

    here = SiteHome(home)
    with closing(site.open_store(here)) as store:
        found = deciding.find_plan(here, store, plan).plan
    interrupts.end_on_terminate()
    where = ScanWhere(
        workers=workers,
        slide_timeout_s=slide_timeout,
        scheduler=scheduler,
        scheduler_ca=scheduler_ca,
        scheduler_cert=scheduler_cert,
        scheduler_key=scheduler_key,
    )
    if watch:
        site.watch_slides(here, found.cohort, _tell_pass(as_json=as_json), where, every_s=every, at_rest_s=at_rest)
    else:
        _scan_once(here, found.cohort, where, as_json=as_json)


def _scan_once(here: SiteHome, cohort: "CohortPlan", where: "ScanWhere", *, as_json: bool) -> None:
    from pathfed_client import app as site
    from pathfed_client.io.scan_report import ScanEndedError

    columns = (TextColumn("scan"), BarColumn(), MofNCompleteColumn(), TextColumn("slides"), TimeElapsedColumn())
    with Progress(*columns, console=console.err, transient=True, disable=as_json) as bar:
        task = bar.add_task("scan", total=None)
        ended: ScanEndedError | None = None
        try:
            report = site.scan(here, cohort, lambda done, total: bar.update(task, completed=done, total=total), where)
        except ScanEndedError as error:
            report, ended = error.report, error
    if as_json:
        show(report.to_dict() if ended is None else {"error": ended.to_dict(), "report": report.to_dict()}, as_json=True)
        raise typer.Exit(0 if ended is None else ended.exit_status)
    _show_scan(report)
    if ended is not None:
        raise ended


def _tell_pass(*, as_json: bool) -> "Told":
    """Says what a pass of a watch found: a line for people, one JSON value for scripts."""
    from pathfed_client.io.scan_report import ScanEndedError, ScanReport

    tell = console.teller(as_json=False)

    def told(found: "ScanReport | SiteDataError") -> None:
        report = found.report if isinstance(found, ScanEndedError) else found if isinstance(found, ScanReport) else None
        if as_json:
            error = {} if isinstance(found, ScanReport) else {"error": found.to_dict()}
            ended = error if report is None else {**error, "report": report.to_dict()}
            show(report.to_dict() if report is not None and not error else ended, as_json=True)
            return
        if not isinstance(found, ScanReport):
            tell(f"{found.code.value} {found.what}")
        if report is not None:
            refused = ", ".join(f"{code.value} x {count}" for code, count in sorted(report.by_reason.items()))
            counts = f"{len(report.slides)} slides, {report.slides_read} read, {report.patients} patients, {report.tiles} tiles"
            tell(counts + (f"; not used: {refused}" if refused else "") + (f"; being written: {len(report.left)}" if report.left else ""))

    return told


def _show_scan(report: "ScanReport") -> None:
    """What a scan found, for people: counts, then everything that needs a look."""
    figures = {
        **{"slides": len(report.slides), "read": report.slides_read, "moved": report.slides_moved},
        **{"patients": report.patients, "tiles": report.tiles},
    }
    show(figures, as_json=False, title="scan")
    refused = [{"slide": one.path, "code": one.reason, "why": one.detail} for one in report.slides if one.reason is not None]
    without = [{"lines": one.lines, "code": one.code} for one in report.patients_without_tile]
    warned = [
        {"slide": one.slide or "all slides read", "filter": one.filter, "removed": f"{one.share:.0%}", "tiles": one.tiles}
        for one in report.filter_warnings
    ]
    twins = [{"slide": first, "same as": second} for first, second in report.same_content]
    away = [{"folder": one.folder or "the slide folder", "code": one.code, "why": one.detail} for one in report.unreachable]
    sections = (
        *_list_sections(report),
        ("folders out of reach: their slides stay as they were", away),
        ("slides that are not used", refused),
        ("patients without a usable tile, by their lines in the list", without),
        ("WARNING: a quality filter removed nearly all tissue; look with `pathfed-site inspect`", warned),
        ("WARNING: equal slides listed for different patients, all left out; a line of the list is wrong", twins),
    )
    _show_sections(sections)


def _list_sections(report: "ScanReport | Preview") -> tuple[tuple[str, list[dict[str, Any]]], ...]:
    """What is wrong with a patient list."""
    findings = [{"lines": one.lines, "slide": one.slide, "code": one.code, "why": one.what} for one in report.list_findings]
    absent = [{"line": one.line, "slide": one.slide, "code": one.code} for one in report.not_found]
    return (
        ("lines of the patient list that are not used, and slides that are out for what they say", findings),
        ("lines of the patient list without one slide", absent),
    )


def _show_sections(sections: Iterable[tuple[str, list[dict[str, Any]]]]) -> None:
    for title, rows in sections:
        if rows:
            show(rows, as_json=False, title=title)


@app.command()
def inspect(
    slide: Annotated[str, typer.Argument(help="The slide, by its path in the slides folder or its name in the patient list.")],
    plan: Annotated[Path, typer.Option("--plan", help="The signed plan whose cohort rules are applied.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for the page and its two pictures; made if need be, for your eyes alone.")],
    home: Home = _HOME,
    as_json: Json = False,
) -> None:
    """Show what pathfed makes of one slide: tissue, pen marks, folds, tiles, sharpness and the verdict. Stays at this site."""
    from pathfed_client import app as site

    here = SiteHome(home)
    _, found = site.read_signed_plan(here, plan)
    show(site.inspect(here, slide, found.cohort, out).to_dict(), as_json=as_json, title="Inspected. What was written stays at this site.")


@app.command()
def patients(home: Home = _HOME, as_json: Json = False) -> None:
    """Show what a scan would make of the patient list: a dry run that writes nothing and opens no slide."""
    from pathfed_client import app as site

    report, ended = site.preview_patients(SiteHome(home))
    if as_json:
        show(report.to_dict() if ended is None else {"error": ended.to_dict(), "report": report.to_dict()}, as_json=True)
        raise typer.Exit(0 if ended is None else ended.exit_status)
    figures = {"encoding": report.encoding, "separator": report.separator, "header in line": report.header_line, "lines": report.lines}
    counts = {"slides": report.slides, "mapped": report.mapped, "patients": report.patients, "unmapped": len(report.unmapped)}
    show({**figures, **counts}, as_json=False, title="the patient list as it is read")
    unused = [{"means": "(not used)", "header": text} for text in report.unused_columns]
    values = [
        {"attribute": name, "value": value or "(none)", "slides": count}
        for name, found in report.attributes.items()
        for value, count in found.items()
    ]
    _show_sections(
        (
            ("columns", [{"means": role, "header": text} for role, text in report.columns.items()] + unused),
            ("attributes of mapped slides", values),
            *_list_sections(report),
            (
                "folders out of reach: their slides are not looked at",
                [{"folder": place or "the slide folder", "why": why} for place, why in report.unreachable.items()],
            ),
            ("slides that are on no line of the list", [{"slide": path} for path in report.unmapped]),
        )
    )
    if ended is not None:
        raise ended


@app.command()
def withdraw(
    patients_from: Annotated[
        str | None, typer.Option(help="File with one patient identifier a line, as the patient list has them; - for standard input.")
    ] = None,
    slides_from: Annotated[
        str | None, typer.Option(help="File with one slide a line, named as in the patient list; - for standard input.")
    ] = None,
    home: Home = _HOME,
    as_json: Json = False,
) -> None:
    """Take patients or slides out for good, from every later draw on. Whole or not at all; nothing about it leaves the site."""
    from pathfed_client import app as site

    if patients_from is None and slides_from is None:
        raise typer.BadParameter("give --patients-from or --slides-from")
    if patients_from == slides_from == "-":
        raise typer.BadParameter("only one of --patients-from and --slides-from can be standard input")
    report = site.withdraw(SiteHome(home), _identifiers(patients_from), _identifiers(slides_from))
    show(asdict(report), as_json=as_json, title="Withdrawn from every later draw, for good." if report.new else "Was withdrawn before.")


def _identifiers(source: str | None) -> "WithdrawalInput | None":
    """Identifiers from a file or standard input; never from the command line itself, which shells keep."""
    from pathfed_client.io.withdrawing import WithdrawalInput
    from pathfed_common.files import read_given

    if source is None:
        return None
    if source == "-":
        return WithdrawalInput(sys.stdin.buffer.read(), "standard input")
    return WithdrawalInput(read_given(Path(source)), source)


@app.command()
def doctor(
    plan: Annotated[
        Path | None, typer.Option("--plan", help="A signed plan: slides are judged by its cohort rules, speed by its rounds.")
    ] = None,
    sample: Annotated[int, typer.Option(min=0, max=10_000, help="Slides to open at most.")] = 24,
    seconds: Annotated[float, typer.Option(min=0, max=600, help="Seconds for which tiles are read to measure speed.")] = 3.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the sample; another one looks at other slides.")] = 0,
    show_slides: Annotated[bool, typer.Option("--show-slides", help="Name slides and folders. For your eyes: do not paste it.")] = False,
    home: Home = _HOME,
    as_json: Json = False,
) -> None:
    """Check slides, patient list, decoders, speed, disk, keys and server, with a hint for each finding. Changes nothing."""
    from pathfed_client import app as site
    from pathfed_client.checkup import DoctorError, examine_site

    here = SiteHome(home)
    given = None if plan is None else site.read_signed_plan(here, plan)[1]
    with nullcontext() if as_json else console.err.status("looking at slides, keys and server"):
        found = examine_site(here, given, sample=sample, seconds=seconds, seed=seed)
    error = DoctorError(found) if found.errors else None
    if as_json:
        told = found.to_dict(show_slides=show_slides)
        show(told if error is None else {"error": error.to_dict(), "report": told}, as_json=True)
        raise typer.Exit(0 if error is None else error.exit_status)
    show(found.rows(), as_json=False, title="doctor")
    if show_slides:
        show(found.named(), as_json=False, title="what is meant, by name: for your eyes alone")
    if error is not None:
        raise error


@app.command()
def start(home: Home = _HOME, as_json: Json = False) -> None:
    """Connect to the server and answer its offers, until Ctrl-C."""
    from pathfed_client import starting

    interrupts.end_on_terminate()

    starting.start(SiteHome(home), console.teller(as_json=as_json))


@app.command()
def status(home: Home = _HOME, as_json: Json = False) -> None:
    """Show plans, slides and budget."""
    from pathfed_client import showing

    found = showing.status(SiteHome(home))
    if as_json:
        show(found, as_json=True)
        return
    plans, alarms, control, rounds = (found.pop(part) for part in ("plans", "alarms", "control", "rounds"))
    if alarms:
        show(alarms, as_json=False, title="ALARM: look at these, and at their codes' pages")
    show(found, as_json=False, title=f"site {found['site']}")
    show(control, as_json=False, title="control plane")
    if rounds:
        show(rounds, as_json=False, title="last rounds, as the server says; a code's page says what to do")
    for plan in plans:
        show(plan, as_json=False, title=f"plan {plan['plan']}")


@app.command()
def egress(
    since: Annotated[
        str | None, typer.Option(help="Only what left from then on: 2026-11-30, 2026-11-30T08:00 (UTC), or an age such as 90m, 24h, 7d.")
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Check every entry and the hash chain first, and give its head to note.")
    ] = False,
    head: Annotated[str | None, typer.Option(help="With --verify: a head that was noted before, which must still be in the chain.")] = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print the entries as CSV, for a spreadsheet.")] = False,
    home: Home = _HOME,
    as_json: Json = False,
) -> None:
    """Show what left this site: every message with time, destination, bytes, digest, plan, round and epsilon, and every connection's bytes.

    Exit status 0: shown, and with --verify, whole. 19: the record does not verify, or cannot be read, and the code says why.
    """
    from pathfed_client import app as site
    from pathfed_client import egress_view

    if as_csv and as_json:
        raise typer.BadParameter("give one of --csv and --json")
    if head is not None and not verify:
        raise typer.BadParameter("--head is compared by --verify")
    start_at, noted = egress_view.moment(since), egress_view.noted_head(head)
    with site.open_egress(SiteHome(home)) as record:
        proven = record.verified(noted=noted) if verify else None
        egress_view.show_record(record.entries(start_at), proven, as_csv=as_csv, as_json=as_json)


@ledger_app.command("show")
def ledger_show(home: Home = _HOME, as_json: Json = False) -> None:
    """Show every charge, and what all plans have cost, as it was computed with the last charge; `verify` computes it again."""
    from pathfed_client import app as site
    from pathfed_client import showing

    here = SiteHome(home)
    with closing(site.open_store(here)) as store:
        found = showing.ledger_report(here, store)
    if as_json:
        show(found, as_json=True)
        return
    entries = found.pop("entries")
    show(found, as_json=False, title="The ledger is whole: signed, chained and in order.")
    show(entries, as_json=False, title="charges")


@ledger_app.command("verify")
def ledger_verify(
    heads: Annotated[
        Path | None,
        typer.Option(
            "--heads",
            help="Heads seen outside this machine: a run's record, whose statements name them, or a file with JSON or lines "
            "`site sequence sha256:...`.",
        ),
    ] = None,
    home: Home = _HOME,
    as_json: Json = False,
) -> None:
    """Check the privacy ledger: every signature, chain, times, the heads that were seen of it, and epsilon by three accountants.

    Exit status 0: all of it holds. 13: it does not, and the code says what.
    """
    from pathfed_client import app as site
    from pathfed_client import showing

    here = SiteHome(home)
    with closing(site.open_store(here)) as store:
        found = showing.verify_ledger(here, store, heads)
    show(
        found,
        as_json=as_json,
        title="The ledger is whole: every entry signed, chained and in order, and every head that was seen is in it.",
    )


def main() -> None:
    """The command line."""
    console.run(app)
