"""The site's long-running command, which keeps its processes up, and the stop switch that it heeds."""

import time
from collections.abc import Callable
from contextlib import closing, suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from pathfed_client.app import check_devices, open_egress, open_ledger, open_store
from pathfed_client.home import SiteHome, hold
from pathfed_client.io.site_records import Event
from pathfed_client.io.site_store import SiteStore
from pathfed_common import files, process_lock
from pathfed_common.code_digest import SITE_PACKAGES, module_command, verify_installation
from pathfed_common.errors import ErrorCode, HostError, TransportError

if TYPE_CHECKING:
    from pathfed_client.transport.site_engine import RelayPorts, SiteFiles
    from pathfed_common.processes import ProcessEnd, Supervisor

_TICK_S = 0.25
#: Processes of a site from which an answer to a round could leave: the stop switch ends them. The agent goes on reporting that the site is
#: stopped, handing over decisions, and co-signing; so does the relay, its way out.
_ANSWERING = ("runner", "supernode")


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
