"""The control plane's process: the enrolment port and the control port. `pathfed-server start` starts and watches it.

Run as `python -m pathfed_server.control --home HOME`.
"""

import argparse
import signal
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

from pathfed_common import console
from pathfed_common.errors import PathfedError
from pathfed_common.processes import ProcessSpec, accepts_connections, require_free_port
from pathfed_common.provenance.log_checkpoint import origin_of
from pathfed_server.bulk import BulkFiles
from pathfed_server.db.sql_store import SqlStore
from pathfed_server.desks import Enrolments, Sites
from pathfed_server.home import ServerHome
from pathfed_server.provenance.log_keeper import LogKeeper
from pathfed_server.transport.bulk_service import BULK, BulkService
from pathfed_server.transport.control_service import CONTROL, ControlService
from pathfed_server.transport.enrolment_service import ENROLMENT, enrolment_methods
from pathfed_server.transport.grpc_service import Door, Listening, start_server
from pathfed_server.transport.grpc_tls import server_credentials
from pathfed_server.transport.limits import Places, RateLimit

_RESTARTS = 20
_PORT_WITHIN_S = 10.0
_GRACE_S = 2.0
#: Transfers at once, in all and of one site: a site has one, and another while the server has not noticed that the first is cut. They leave
#: hands free for all other calls (`grpc_service`).
_TRANSFERS, _TRANSFERS_OF_ONE = 48, 4


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Calls a second in the long run, and at once, that the ports take.

    Attributes:
        strangers: from one address on the enrolment port. A site asks again while it waits, and hospitals may share an address.
        addresses: from one address on the control port.
        sites: of one site.
    """

    strangers: tuple[float, int] = (5, 50)
    addresses: tuple[float, int] = (200, 1000)
    sites: tuple[float, int] = (20, 200)


def start_control(home: ServerHome, store: SqlStore, rates: Rates = Rates()) -> Listening:
    """Listen on both ports.

    Raises:
        HostError: PF902, a port is taken; PF904, PF906, a file is missing or a key may be read by others.
        TransportError: PF420, the authority's files do not fit together.
    """
    home.authority()
    settings, log = home.settings, LogKeeper(store, home.evidence_key, origin_of(home.settings.consortium))
    outside, inside, each_site = (
        RateLimit(per_second=per_second, burst=burst) for per_second, burst in (rates.strangers, rates.addresses, rates.sites)
    )
    sites, bulk = Sites(home, store), BulkFiles(home, store)
    places = Places(most=_TRANSFERS, of_one=_TRANSFERS_OF_ONE)
    inner = {
        CONTROL: ControlService(sites, log, Door(inside), each_site).methods(),
        BULK: BulkService(sites, bulk, Door(inside), each_site, places).methods(),
    }
    files = home.authority_files
    servers = []
    try:
        for services, port, asks in (
            ({ENROLMENT: enrolment_methods(Enrolments(home, store), Door(outside))}, settings.enrolment_port, False),
            (inner, settings.control_port, True),
        ):
            servers.append(start_server(services, server_credentials(files, asks_clients=asks), host=settings.listen, port=port))
    except PathfedError:
        Listening(tuple(servers), bulk.close).stop(_GRACE_S)
        raise
    return Listening(tuple(servers), bulk.close)


def control_process(home: ServerHome) -> ProcessSpec:
    """How the process is run by its owner.

    Raises:
        HostError: PF902, one of its ports is taken.
    """
    listen, ports = home.settings.listen, (home.settings.control_port, home.settings.enrolment_port)
    for port in ports:
        require_free_port(listen, port, within_s=_PORT_WITHIN_S)
    return ProcessSpec(
        name="control",
        argv=[sys.executable, "-m", "pathfed_server.control", "--home", str(home.root.resolve())],
        log=home.logs / "control.log",
        environment={"PYTHONUNBUFFERED": "1"},
        ready=lambda: all(accepts_connections(listen, port) for port in ports),
        restarts=_RESTARTS,
        restart_delay_s=0.5,
    )


def main() -> None:
    """Serve until the process is ended."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--home", required=True, type=Path)
    home = ServerHome(parser.parse_args().home)
    console.log_to_stderr()
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    try:
        with SqlStore(home.database_url) as store:
            listening = start_control(home, store)
            ended.wait()
            listening.stop(_GRACE_S)
    except PathfedError as error:
        console.show_error(error)
        sys.exit(error.exit_status)


if __name__ == "__main__":
    main()
