"""`pathfed-site doctor`: looks at everything a site needs before it scans or starts, and says what to put right. Changes nothing."""

from dataclasses import dataclass

from pathfed_client.home import SiteHome
from pathfed_client.io.doctor.findings import Finding, Severity, judge
from pathfed_client.io.doctor.looking import free_bytes, look_at_folders, look_at_keys, look_at_list, measure_speed
from pathfed_client.io.doctor.seen import DevicesSeen, SiteSeen
from pathfed_client.io.doctor.slides import Looker, LookTask, draw_sample, look_at_sample
from pathfed_client.io.egress_log import EgressLog
from pathfed_client.transport.preflight import check_server
from pathfed_common.errors import ErrorCode, HostError, TransportError
from pathfed_common.plan import CohortPlan, Plan

#: Seconds after which no further slide of the sample is opened.
SAMPLE_WITHIN_S = 120.0
KEY_FOLDERS = ("keys", "secrets")
KEY_FILES = ("keys/evidence.pem", "keys/flower", "keys/tls.pem", "keys/pseudonym.key", "keys/superexec.secret")


@dataclass(frozen=True)
class Checkup:
    """What the doctor found."""

    findings: tuple[Finding, ...]

    @property
    def errors(self) -> int:
        """Findings that keep the site from taking part as it should."""
        return sum(finding.severity is Severity.ERROR for finding in self.findings)

    @property
    def worst(self) -> Severity:
        """Of the findings."""
        order = list(Severity)
        return max((finding.severity for finding in self.findings), key=order.index)

    def to_dict(self, *, show_slides: bool) -> dict[str, object]:
        """As `--json` prints it."""
        return {"worst": self.worst.value, "findings": [finding.to_dict(show_slides=show_slides) for finding in self.findings]}

    def rows(self) -> list[dict[str, object]]:
        """As people see it."""
        return [
            {
                "": finding.severity.value,
                "check": finding.check,
                "found": finding.what + "".join(f" [{code.value} x {count}]" for code, count in finding.codes.items()),
                "do": finding.hint,
            }
            for finding in self.findings
        ]

    def named(self) -> list[dict[str, object]]:
        """What is meant by name, for the site's own eyes."""
        return [{"check": finding.check, "name": name or "the slide folder"} for finding in self.findings for name in finding.slides]


class DoctorError(HostError):
    """The doctor found errors; it holds all that was found."""

    def __init__(self, found: Checkup) -> None:
        wrong = ", ".join(finding.check for finding in found.findings if finding.severity is Severity.ERROR)
        super().__init__(ErrorCode.SITE_UNFIT, "the doctor found errors", value=wrong, remedy="follow the hints, then run it again")
        self.found = found


def examine_site(home: SiteHome, plan: Plan | None, *, sample: int, seconds: float, seed: int) -> Checkup:
    """Look at a site and judge it.

    Args:
        home: the site.
        plan: judge slides by its cohort rules, and speed by its rounds; None for the rules a plan has if it says nothing.
        sample: slides to open at most. Of those with a patient, where there are any: the others are never used.
        seconds: to measure speed for.
        seed: of the sample.

    Raises:
        HostError: PF904, PF905, there is no site, or its settings cannot be read; PF903, reading processes do not start.
    """
    cohort = CohortPlan() if plan is None else plan.cohort
    folders, slides = look_at_folders(home.slides)
    patients, mapped = look_at_list(home.patients, slides, home.settings.patient_list.configured())
    drawn = draw_sample(mapped or slides, sample, seed)
    with Looker() as looker:
        decoders = looker.decoders()
        tasks = [LookTask(slide, cohort, seed) for slide in drawn]
        looks = look_at_sample(looker, tasks, within_s=SAMPLE_WITHIN_S)
    workers = max(1, home.policy.tile_workers)
    speed = measure_speed(
        home.slides, looks, tile_px=cohort.tile_px, tiles_per_slide=cohort.tiles_per_patient, workers=workers, seconds=seconds
    )
    seen = SiteSeen(
        folders=folders,
        patients=patients,
        sample=[look.seen for look in looks],
        drawn=len(drawn),
        decoders=decoders,
        speed=speed,
        free_bytes=free_bytes(home.root),
        keys=look_at_keys(home.root, KEY_FOLDERS, KEY_FILES),
        server=_server(home),
        devices=_devices(home),
    )
    return Checkup(judge(seen, plan))


def _devices(home: SiteHome) -> DevicesSeen:
    from pathfed_client.training.device import gpus, resolve_all

    policy = home.policy
    try:
        found = resolve_all(policy.device, policy.devices)
    except HostError as error:
        return DevicesSeen(kind="", count=policy.devices, gpus=gpus(), code=error.code)
    return DevicesSeen(kind=found[0].type, count=len(found), gpus=gpus())


def _server(home: SiteHome) -> ErrorCode | None:
    try:
        with EgressLog(home.egress) as record:
            check_server(home.server_card.fleet_address, home.ca_file, record)
    except (TransportError, HostError) as error:
        return error.code
    return None
