"""The site's only wiring place: what each command does, from the parts.

Heavy libraries (torch, Flower, the accountants) are imported by the function that needs them, so that light commands start at once.
"""

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import closing, nullcontext, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pathfed_client.egress.outlet import Outlet
from pathfed_client.gate.site_policy import SitePolicy
from pathfed_client.home import SiteHome, SiteSettings, create_home, hold
from pathfed_client.io.egress_log import EgressLog
from pathfed_client.io.site_records import Event
from pathfed_client.io.site_store import SiteStore
from pathfed_common import files, process_lock
from pathfed_common.code_digest import SITE_PACKAGES, module_command, verify_installation
from pathfed_common.errors import ErrorCode, HostError, SiteDataError, TransportError
from pathfed_common.plan import CohortPlan, Plan
from pathfed_common.provenance.documents import open_plan

if TYPE_CHECKING:
    from flwr.clientapp import ClientApp

    from pathfed_client.budget.ledger import Ledger
    from pathfed_client.control.enrolling import Enrolment
    from pathfed_client.gate.ports import Refusals
    from pathfed_client.io.inspection import Inspection
    from pathfed_client.io.listing import Preview
    from pathfed_client.io.scan_report import ScanReport
    from pathfed_client.io.scan_watch import Told
    from pathfed_client.io.scan_where import ScanWhere
    from pathfed_client.io.site_keys import KeyKind
    from pathfed_client.io.withdrawing import WithdrawalInput, WithdrawReport
    from pathfed_client.transport.site_engine import RelayPorts, SiteFiles
    from pathfed_common.processes import ProcessEnd, Supervisor

HOME_VARIABLE = "PATHFED_SITE_HOME"
_TICK_S = 0.25
_RUNNER_PATIENCE_S = 20.0
#: Processes of a site from which an answer to a round could leave: the stop switch ends them. The agent goes on reporting that the site is
#: stopped, handing over decisions, and co-signing; so does the relay, its way out.
_ANSWERING = ("runner", "supernode")


def init(home: Path, settings: SiteSettings, policy: SitePolicy, server_card: Path | None = None) -> SiteHome:
    """Make the site's home; the database with it. Without a server card it belongs to no server yet: `enroll` it.

    Raises:
        SiteDataError: PF201, no slide folder; PF202, no patient list; PF217, slide folders overlap.
        HostError: PF904, a file cannot be read or written, or the home exists.
        ProvenanceError: PF602, the server card does not verify.
    """
    from pathfed_client.io.slide_files import check_folders

    for folder in settings.slides:
        if not Path(folder).is_dir():
            raise SiteDataError(ErrorCode.SLIDE_FOLDER_EMPTY, "the slide folder does not exist", where=folder)
    check_folders([Path(folder) for folder in settings.slides])
    if not Path(settings.patients).is_file():
        raise SiteDataError(ErrorCode.PATIENT_LIST_UNREADABLE, "the patient list does not exist", where=settings.patients)
    made = create_home(home, settings, policy, None if server_card is None else files.read_given(server_card))
    try:
        SiteStore(made.database).close()
        EgressLog.create(made.egress)
    except HostError:
        shutil.rmtree(made.root)
        raise
    return made


def open_store(home: SiteHome) -> SiteStore:
    """The site's database.

    Raises:
        HostError: PF904, no site was initialised there, or the database cannot be opened.
    """
    home.settings  # noqa: B018 - a database is never made where there is no site
    return SiteStore(home.database)


def enroll(home: SiteHome, text: str, *, wait: bool, tell: Callable[[str], None]) -> "Enrolment":
    """Enrol the home with the server that invited it; see `control.enrolling.enroll`.

    Raises:
        HostError: PF904, another command enrols this home, or rotates its keys.
    """
    from pathfed_client.control.enrolling import enroll

    home.settings  # noqa: B018 - nothing is written where there is no site
    with hold(home, "keys"), open_egress(home) as record:
        return enroll(home, text, Outlet(record), wait=wait, tell=tell)


def show_keys(home: SiteHome) -> dict[str, Any]:
    """Fingerprints of the site's keys, to compare by telephone, and of the request that the operator sees."""
    from pathfed_client.control.certificates import certificate_times
    from pathfed_client.control.enrolling import enrolment_fingerprint
    from pathfed_client.io.site_keys import fingerprints

    home.settings  # noqa: B018 - a folder that is no home has its own error
    found: dict[str, Any] = {"site": home.name, "enrolment": enrolment_fingerprint(home)}
    found |= {kind.value: value for kind, value in fingerprints(home.keys).items()}
    found["evidence_key"] = home.evidence_key.public.to_text()
    found["certificate_until_at"] = certificate_times(home.certificate_file.read_bytes())[1] if home.certificate_file.exists() else None
    return found


def rotate_key(home: SiteHome, kind: "KeyKind") -> dict[str, Any]:
    """Rotate one of the site's keys; see `control.rotating.rotate`. But for the TLS key, the site must not run.

    Raises:
        HostError: PF904, the site runs, or another command enrols this home or rotates its keys.
    """
    from pathfed_client.control.rotating import rotate
    from pathfed_client.io.site_keys import KeyKind

    home.server_card  # noqa: B018 - nothing is written where there is no site, or none that a server knows
    idle = nullcontext() if kind is KeyKind.TLS else hold(home, "site")
    with idle, hold(home, "keys"), closing(open_store(home)) as store, open_egress(home) as record:
        rotate(home, store, Outlet(record), kind, time.time())
        store.add_event(Event(at=time.time(), kind="keys", detail=f"the {kind.value} key was rotated"))
    return show_keys(SiteHome(home.root))


def scan(home: SiteHome, cohort: CohortPlan, progress: Callable[[int, int], None], where: "ScanWhere | None" = None) -> "ScanReport":
    """Scan the slides under a plan's cohort rules, in processes of this machine or on a Dask cluster; see `io.scan.scan`."""
    from pathfed_client.io import scan as scanning
    from pathfed_client.io.scan_where import ScanWhere, make_executor

    with closing(open_store(home)) as store, make_executor(where or ScanWhere()) as executor:
        return scanning.scan(
            store,
            home.slides,
            home.patients,
            cohort,
            home.pseudonym_key,
            progress=progress,
            columns=home.settings.patient_list.configured(),
            executor=executor,
        )


def watch_slides(home: SiteHome, cohort: CohortPlan, tell: "Told", where: "ScanWhere", *, every_s: float, at_rest_s: float) -> None:
    """Scan again and again until interrupted; see `io.scan_watch.watch`."""
    from pathfed_client.io import scan as scanning
    from pathfed_client.io.scan_watch import watch
    from pathfed_client.io.scan_where import make_executor

    columns = home.settings.patient_list.configured()
    with suppress(KeyboardInterrupt), closing(open_store(home)) as store, make_executor(where) as executor:

        def once(memory: scanning.ScanMemory) -> "ScanReport":
            return scanning.scan(
                store, home.slides, home.patients, cohort, home.pseudonym_key, columns=columns, executor=executor, memory=memory
            )

        watch(once, tell, every_s=every_s, at_rest_s=at_rest_s)


def preview_patients(home: SiteHome) -> "tuple[Preview, SiteDataError | None]":
    """What a scan would make of the patient list, and the error it would end with. Writes nothing and opens no slide.

    Raises:
        SiteDataError: PF201, no slide; PF202, the list cannot be read at all; PF217, slide folders overlap.
    """
    from pathfed_client.io.listing import preview, read_listing
    from pathfed_client.io.slide_files import check_folders
    from pathfed_client.io.slide_listing import list_slides, no_slide

    check_folders(home.slides)
    there = list_slides(home.slides)
    if not there.slides:
        raise no_slide(there.unlisted, home.slides)
    listing = read_listing(home.patients, there.names, home.settings.patient_list.configured())
    return preview(listing, there.names, home.pseudonym_key, unreachable=there.unlisted), listing.error


def withdraw(home: SiteHome, patients: "WithdrawalInput | None", slides: "WithdrawalInput | None") -> "WithdrawReport":
    """Withdraw patients and slides; see `io.withdrawing.withdraw`."""
    from pathfed_client.cohort.patient_list import pseudonym
    from pathfed_client.io import withdrawing
    from pathfed_client.io.listing import read_list
    from pathfed_client.io.slide_listing import list_slides

    def listed() -> set[str]:
        try:
            _, found = read_list(home.patients, home.settings.patient_list.configured())
        except SiteDataError:
            return set()  # what was scanned can be withdrawn all the same
        return {pseudonym(home.pseudonym_key, row.patient) for row in found.rows}

    with closing(open_store(home)) as store:
        known = withdrawing.KnownHere(listed, lambda: list_slides(home.slides).names)
        return withdrawing.withdraw(store, home.pseudonym_key, known, patients=patients, slides=slides, now=time.time())


def inspect(home: SiteHome, slide: str, cohort: CohortPlan, out: Path) -> "Inspection":
    """Show one slide to the site's own eyes; see `io.inspection.inspect`."""
    from pathfed_client.io import inspection
    from pathfed_client.io.listing import read_listing
    from pathfed_client.io.slide_listing import list_slides

    def listed_mpp(path: str) -> float | None:
        try:
            listing = read_listing(home.patients, list_slides(home.slides).names, home.settings.patient_list.configured())
        except SiteDataError:
            return None  # a slide can be looked at without a list
        listed = listing.matching.slides.get(path)
        return None if listed is None else listed.mpp

    return inspection.inspect(home.slides, slide, cohort, out, listed_mpp=listed_mpp)


def read_signed_plan(home: SiteHome, path: Path) -> tuple[bytes, Plan]:
    """Read a plan that the site's server signed.

    Raises:
        PlanError: PF106, not signed by this site's server.
    """
    data = files.read_given(path)
    return data, open_plan(data, home.server_card.evidence_key)


def plan_epsilon(plan: Plan, declared_patients: int, delta: float) -> float:
    """Epsilon of a site that takes part in every round of a plan."""
    from pathfed_common.privacy.accounting import epsilon

    rate = plan.sampling_rate(declared_patients)
    return epsilon(sampling_rate=rate, noise_multiplier=plan.privacy.noise_multiplier, steps=plan.total_steps, delta=delta)


def check_devices(home: SiteHome) -> None:
    """See that the devices which the policy names are there. Imports torch only where one could be missing.

    Raises:
        HostError: PF910, one is not.
    """
    if home.policy.names_gpus:
        from pathfed_client.training.device import resolve_all

        resolve_all(home.policy.device, home.policy.devices)


def open_ledger(home: SiteHome, store: SiteStore) -> "Ledger":
    """The site's ledger, checked as before a charge.

    Raises:
        PrivacyError: PF304, it was damaged or tampered with; PF308, its times go backwards; PF309, PF310, it is older than was seen.
    """
    from pathfed_client.io.ledger_head import site_ledger

    ledger = site_ledger(store, home.evidence_key, home.policy, home.run_secrets, former=home.former_keys)
    ledger.entries()
    return ledger


def status(home: SiteHome) -> dict[str, Any]:
    """Where the site stands, for its own eyes."""
    from pathfed_client.cohort.withdrawal import WithdrawnKind
    from pathfed_client.io import site_cohort

    with closing(open_store(home)) as store:
        plans = []
        for approval in store.approvals():
            plan = open_plan(approval.signed_plan, home.server_card.evidence_key)
            summary = site_cohort.summary(store, plan.cohort, home.pseudonym_key)
            plans.append(
                {
                    "plan": plan.name,
                    "digest": approval.plan,
                    "state": approval.state.value,
                    "declared_patients": approval.declared_patients,
                    "patients": summary.patients,
                    "tiles": summary.tiles,
                    "slides": {state.value: count for state, count in summary.slides.items()},
                    "reasons": {code.value: count for code, count in summary.reasons.items()},
                }
            )
        withdrawn = [one.kind for one in store.withdrawn()]
        alarms = store.alarms()
        spent = open_ledger(home, store).spent().epsilon
        control = _control_state(home, store)
        rounds = json.loads(store.facts().get("outcomes", "[]"))
    policy, stopped = home.policy, home.stop_switch.stop()
    return {
        "site": home.name,
        "stopped": home.stop_switch.is_on,
        "stopped_at": None if stopped is None else stopped.at,
        "stopped_for": None if stopped is None else stopped.reason or None,
        "server": home.server_card.fleet_address,
        "epsilon_spent": spent,
        "epsilon_left": max(0.0, policy.max_epsilon - spent),
        "delta": policy.delta,
        "withdrawn_patients": withdrawn.count(WithdrawnKind.PATIENT),
        "withdrawn_slides": withdrawn.count(WithdrawnKind.PATH),
        "control": control,
        "rounds": rounds,
        "alarms": [{"at": alarm.at, "code": alarm.code.value, "about": alarm.subject, "what": alarm.detail} for alarm in alarms],
        "plans": plans,
    }


def _control_state(home: SiteHome, store: SiteStore) -> dict[str, Any]:
    """How the site stands with the control plane."""
    if not home.enrolled:
        return {"enrolled": False}
    from pathfed_client.control.certificates import certificate_times

    facts, leaves = store.facts(), store.own_leaves()
    head = home.log_head.read() if home.log_head.exists() else None
    return {
        "enrolled": True,
        "certificate_until_at": certificate_times(home.certificate_file.read_bytes())[1],
        "answered_at": float(facts["agent_at"]) if "agent_at" in facts else None,
        "code": facts.get("agent_code") or None,
        "suspended": bool(facts.get("suspended")),
        "words_waiting": len(store.words(waiting=True)),
        "plans_received": len(store.received_plans()),
        "log_cosigned": 0 if head is None else head.size,
        "receipts": sum(leaf.receipt is not None for leaf in leaves),
        "receipts_waiting": sum(leaf.receipt is None for leaf in leaves),
    }


@dataclass(frozen=True, kw_only=True)
class Glance:
    """A site's figures for a live view: cheap, and nothing verified.

    Attributes:
        slides: slides looked at.
        usable: slides with tiles and a patient.
        patients: patients with a usable tile.
        epsilon_total: what the last ledger entry says.
    """

    slides: int
    usable: int
    patients: int
    epsilon_total: float


def glance(home: SiteHome, cohort: CohortPlan) -> Glance:
    """Look at a site's database."""
    from pathfed_client.budget.ledger import last_charge
    from pathfed_client.io import site_cohort
    from pathfed_client.io.site_records import SlideStatus

    with closing(open_store(home)) as store:
        summary = site_cohort.summary(store, cohort, home.pseudonym_key)
        last = last_charge(store)
    return Glance(
        slides=sum(summary.slides.values()),
        usable=summary.slides.get(SlideStatus.USABLE, 0),
        patients=summary.patients,
        epsilon_total=0.0 if last is None else last.epsilon_total,
    )


def ledger_report(home: SiteHome, store: SiteStore) -> dict[str, Any]:
    """The ledger, checked as before a charge, with epsilon as the last entry states it (`Ledger.stated`).

    Raises:
        PrivacyError: PF304, the ledger is damaged; PF305, a test shows more than the last entry states; PF308 to PF310, see `open_ledger`.
    """
    ledger = open_ledger(home, store)
    entries = ledger.entries()
    return {
        **_ledger_figures(home, ledger, ledger.stated(entries)),
        "entries": [
            {
                "sequence": entry.sequence,
                "run": entry.run,
                "round": entry.round_index,
                "plan": entry.plan,
                "rate": entry.event.sampling_rate,
                "sigma": entry.event.noise_multiplier,
                "steps": entry.event.steps,
                "epsilon_plan": entry.epsilon_plan,
                "epsilon_total": entry.epsilon_total,
                "at": entry.at,
            }
            for entry in entries
        ],
    }


def verify_ledger(home: SiteHome, store: SiteStore, heads: Path | None = None) -> dict[str, Any]:
    """Check all that can be checked of the ledger: every signature, chain, times, witnesses, heads from outside, three accountants.

    Args:
        home: the site.
        store: its database.
        heads: a file of heads, or a run's record whose statements of this site name some; see `io.outside_heads`.

    Raises:
        PrivacyError: PF304, PF308 to PF310, as `ledger_report`; PF305, the accountants contradict each other.
        HostError: PF905, `heads` names no head of this site, or is not such a file; PF904, it cannot be read.
    """
    from pathfed_client.io.ledger_head import site_ledger
    from pathfed_client.io.outside_heads import OutsideHeads
    from pathfed_common.privacy.accounting import check_accountants, prv_estimate, rdp_epsilon

    outside = () if heads is None else (OutsideHeads.read(heads, home.name, home.evidence_keys),)
    ledger = site_ledger(store, home.evidence_key, home.policy, home.run_secrets, witnesses=outside, former=home.former_keys)
    entries = ledger.verify()
    events, delta = [entry.event for entry in entries], home.policy.delta
    bracket = prv_estimate(events, delta)
    return {
        **_ledger_figures(home, ledger, check_accountants(events, delta)),
        "epsilon_rdp_bound": rdp_epsilon(events, delta),
        "epsilon_prv": None if bracket is None else list(bracket),
        "releases": len(entries),
        "statements_compared": len(store.stated_heads()),
        "heads_compared": sum(len(witness.heads()) for witness in outside),
    }


def _ledger_figures(home: SiteHome, ledger: "Ledger", epsilon: float) -> dict[str, Any]:
    return {
        "site": home.name,
        "head": ledger.head,
        "delta": home.policy.delta,
        "epsilon": epsilon,
        "max_epsilon": home.policy.max_epsilon,
    }


def stop(home: SiteHome, reason: str) -> dict[str, Any]:
    """Throw the stop switch and end what computes or answers, at once and by force.

    Safe at any instant: what is sealed stays and is not sent, what was being computed is lost with its charge on record, and after
    `resume` the same round is the same release again, charged once.

    Raises:
        HostError: PF904, no site was initialised there, or it cannot be written; PF903, a process does not end.
    """
    home.settings  # noqa: B018 - nothing is written where there is no site
    home.stop_switch.throw(at=time.time(), reason=reason)
    for what in _ANSWERING:
        if not process_lock.end_holder(home.lock(what)):
            raise HostError(
                ErrorCode.PROCESS_ENDED, f"the site is stopped, but its {what} does not end", where=home.lock(what), remedy="end it by hand"
            )
    _note(home, "stopped")
    stopped = home.stop_switch.stop()
    return {"site": home.name, "stopped_at": None if stopped is None else stopped.at, "reason": None if stopped is None else stopped.reason}


def resume(home: SiteHome) -> dict[str, Any]:
    """Release the stop switch; a running `pathfed-site start` connects again.

    Raises:
        HostError: PF904, no site was initialised there, or the file cannot be removed.
    """
    home.settings  # noqa: B018 - nothing is written where there is no site
    was = home.stop_switch.is_on
    home.stop_switch.release()
    if was:
        _note(home, "resumed")
    return {"site": home.name, "was_stopped": was}


def _note(home: SiteHome, what: str) -> None:
    """Write it into the log book, if that can be written: the switch must work with a database that is damaged."""
    with suppress(HostError), closing(open_store(home)) as store:
        store.add_event(Event(at=time.time(), kind="switch", detail=what))


def open_egress(home: SiteHome) -> EgressLog:
    """The record of what left this site.

    Raises:
        HostError: PF904, no site was initialised there; PF913, the record is gone.
    """
    home.settings  # noqa: B018 - a home that is not there is said to be missing, not its record
    return EgressLog(home.egress)


def start(home: SiteHome, tell: Callable[[str], None]) -> None:
    """Run the site's processes until interrupted. One such command a home.

    Raises:
        HostError: PF903, a process will not stay up; PF904, the site runs already; PF907, a command is missing; PF910, a device is missing.
        TransportError: PF430, the home is not enrolled; PF401, the server's certificate is not the pinned consortium's, or has expired.
        PrivacyError: PF304, the ledger is damaged; PF308 to PF310, see `open_ledger`.
    """
    home.server_card  # noqa: B018 - nothing is written where there is no site, or none that a server knows
    with hold(home, "site"):
        _start(home, tell)


def _start(home: SiteHome, tell: Callable[[str], None]) -> None:
    for key in (home.flower_key, home.superexec_secret):
        files.read_secret(key)
    with closing(open_store(home)) as store:
        open_ledger(home, store).verify()
        verify_installation(SITE_PACKAGES)
        check_devices(home)
        _greet(home, tell)
        _run_processes(home, store, tell)


def _run_processes(home: SiteHome, store: SiteStore, tell: Callable[[str], None]) -> None:
    """Start relay, agent, SuperNode and runner, and keep them up until interrupted."""
    from pathfed_client.control.supervising import AlarmTeller, start_agent
    from pathfed_client.transport.relay_certificate import make_certificate
    from pathfed_client.transport.site_engine import LOOPBACK, SiteFiles, start_relay
    from pathfed_common.processes import Supervisor

    certificate = make_certificate(home.relay_files, LOOPBACK, now=datetime.now(UTC))
    flower = home.root / "flower"
    flower.mkdir(exist_ok=True)
    supervisor = Supervisor()
    alarms = AlarmTeller(store, tell)
    answers: bool | None = None
    files_of_site = SiteFiles(
        relay=[*module_command("pathfed_client.relaying"), str(home.root)],
        relay_ca=certificate.ca,
        flower_key=home.flower_key,
        superexec_secret=home.superexec_secret,
        flower=flower,
        logs=home.logs,
        runner=[*module_command("pathfed_client.app"), str(home.root)],
        threads=home.policy.threads,
        supernode_lock=home.lock("supernode"),
    )
    try:
        ports = start_relay(supervisor, files_of_site)
        if home.enrolled:
            start_agent(home, store, supervisor, ports.tunnel)
        else:
            tell("no certificate: this site can answer no round until it is enrolled (`pathfed-site enroll`)")
        while True:
            answers = _heed_switch(home, supervisor, files_of_site, ports, tell, answers=answers)
            for end in supervisor.poll():
                _tell_end(end, home, tell)
            alarms.look()
            time.sleep(_TICK_S)
    except KeyboardInterrupt:
        tell(f"site {home.name}: stopping")
    finally:
        supervisor.stop()


def _heed_switch(
    home: SiteHome,
    supervisor: "Supervisor",
    files_of_site: "SiteFiles",
    ports: "RelayPorts",
    tell: Callable[[str], None],
    *,
    answers: bool | None,
) -> bool:
    """Start or end what answers, as the stop switch is; whether it answers now. `answers`: as it was, None: nothing was said yet."""
    from pathfed_client.transport.site_engine import start_site

    stopped = home.stop_switch.is_on
    if stopped and answers is not False:
        supervisor.end(_ANSWERING)
        tell(f"{ErrorCode.SITE_STOPPED.value} site {home.name} is stopped by its own people; `pathfed-site resume` lets it go on")
    elif not stopped and not answers:
        if answers is False:
            tell(f"site {home.name}: goes on")
        start_site(supervisor, files_of_site, ports)
    return not stopped


def _greet(home: SiteHome, tell: Callable[[str], None]) -> None:
    """Say whether the server answers. A certificate that is not its own ends the command; a server that is away is waited for."""
    from pathfed_client.transport.preflight import check_server

    address = home.server_card.fleet_address
    try:
        with open_egress(home) as record:
            check_server(address, home.ca_file, record)
    except TransportError as error:
        if error.code is not ErrorCode.SERVER_UNREACHABLE:
            raise
        tell(f"{error.code.value} {error.what} ({address}); trying again until it answers")
    else:
        tell(f"site {home.name}: connecting to {address}")


def _tell_end(end: "ProcessEnd", home: SiteHome, tell: Callable[[str], None]) -> None:
    from pathfed_client.transport.preflight import explain

    error = explain(end, home.server_card.fleet_address) if end.name in ("relay", "supernode") else end.error()
    if not end.restarted:
        raise error
    tell(f"{error.code.value} {end.name} ended ({end.status}) and is started again: {error.what}; see {end.log}")


def make_flower_app(home: SiteHome, store: SiteStore, tunnel: int | None = None) -> "tuple[ClientApp, Refusals]":
    """The site's Flower app around its answerer, and who is told of codes that leave in the app's place.

    Args:
        home: the site.
        store: its database.
        tunnel: loopback port of the relay that leads to the control plane, over which bulk files move; None: no relay.
    """
    from pathfed_client.answering import SiteAnswerer
    from pathfed_client.bulk import SiteBulk
    from pathfed_client.transport.flower_client import make_app

    answerer = SiteAnswerer(home, store, lambda outlet: SiteBulk(home, outlet, tunnel=tunnel))
    return make_app(answerer, answerer.refused), answerer.refused


def run_resident(home: SiteHome, address: str, tunnel: int | None = None) -> None:
    """The runner's process: answer the SuperNode at `address` until ended; bulk files move over the relay's port `tunnel`.

    Raises:
        HostError: PF904, another runner works in this home and does not end.
        TransportError: PF440, the site is stopped; PF446, PF447, its code is not that of the installed wheel.
    """
    from pathfed_client.io.process_limits import limit_memory
    from pathfed_client.transport import resident_runner

    # A runner that is being replaced may need a moment to end.
    with hold(home, "runner", patience_s=_RUNNER_PATIENCE_S), closing(open_store(home)) as store:
        home.stop_switch.check()
        verify_installation(SITE_PACKAGES)
        limit_memory(home.policy.memory_gb)
        app, refusals = make_flower_app(home, store, tunnel)
        warm_up(home)
        resident_runner.run(address, home.superexec_secret, app, refusals)


def warm_up(home: SiteHome) -> None:
    """Import the accountants and let them work once, so that the first round's deadline does not pay for it."""
    from pathfed_common.privacy.accounting import PrivacyEvent, check_accountants

    check_accountants([PrivacyEvent(sampling_rate=0.5, noise_multiplier=2.0, steps=1)], home.policy.delta)


def __getattr__(name: str) -> Any:
    """`flower_app`, which the bundle names. Our runner never loads it by that name; Flower's own ClientApp process would."""
    if name != "flower_app":
        raise AttributeError(name)
    home = SiteHome(Path(os.environ[HOME_VARIABLE]))
    return make_flower_app(home, SiteStore(home.database))[0]


if __name__ == "__main__":
    from pathfed_common.console import log_to_stderr

    log_to_stderr()
    run_resident(SiteHome(Path(sys.argv[1])), sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else None)
