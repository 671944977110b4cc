"""The site's only wiring place: what each command does, from the parts.

Heavy libraries (torch, Flower, the accountants) are imported by the function that needs them, so that light commands start at once.
"""

import os
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import closing, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pathfed_client.egress.outlet import Outlet
from pathfed_client.gate.site_policy import SitePolicy
from pathfed_client.home import SiteHome, SiteSettings, create_home, hold
from pathfed_client.io.egress_log import EgressLog
from pathfed_client.io.site_records import Event
from pathfed_client.io.site_store import SiteStore
from pathfed_common import files
from pathfed_common.code_digest import SITE_PACKAGES, verify_installation
from pathfed_common.errors import ErrorCode, HostError, SiteDataError
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

HOME_VARIABLE = "PATHFED_SITE_HOME"
_RUNNER_PATIENCE_S = 20.0


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


def open_egress(home: SiteHome) -> EgressLog:
    """The record of what left this site.

    Raises:
        HostError: PF904, no site was initialised there; PF913, the record is gone.
    """
    home.settings  # noqa: B018 - a home that is not there is said to be missing, not its record
    return EgressLog(home.egress)


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
