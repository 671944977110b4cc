"""Flower's server processes: SuperLink, the path filter in front of it, and the superexec that runs the ServerApp.

SuperLink listens on loopback and is never exposed; hospitals reach the filter. Isolation is `process`, with a secret between SuperLink and
superexec; node authentication is on; nothing is installed at run time; no telemetry, no update check.
"""

import datetime
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pathfed_common.errors import ErrorCode, HostError
from pathfed_common.flower_environment import flower_environment
from pathfed_common.processes import ProcessSpec, Supervisor, accepts_connections, free_port, require_free_port
from pathfed_server.transport.certificates import check_validity

LOOPBACK = "127.0.0.1"
_RESTARTS = 20
#: The fleet door of a server that was just killed ends with it, but not in the same instant.
_PORT_WITHIN_S = 10.0


@dataclass(frozen=True, kw_only=True)
class EngineFiles:
    """Files and settings the engine's processes use.

    Attributes:
        ca: the consortium's CA certificate.
        certificate: the server's TLS certificate.
        key: its key.
        superexec_secret: secret between SuperLink and superexec.
        flower: folder of Flower's own state.
        logs: folder of logs.
        listen: address the fleet door listens on.
        fleet_port: its port.
        app_environment: variables for the ServerApp that superexec starts.
    """

    ca: Path
    certificate: Path
    key: Path
    superexec_secret: Path
    flower: Path
    logs: Path
    listen: str
    fleet_port: int
    app_environment: Mapping[str, str]


def start_engine(supervisor: Supervisor, files: EngineFiles) -> int:
    """Start the three processes in order, each when the one before serves.

    Returns:
        SuperLink's port on loopback.

    Raises:
        TransportError: PF401, the server's certificate is not valid now.
        HostError: PF902, the fleet port is taken; PF903, a process ended or did not become ready; PF907, a command is missing.
    """
    check_validity(files.certificate.read_bytes(), now=datetime.datetime.now(datetime.UTC), where=files.certificate)
    require_free_port(files.listen, files.fleet_port, within_s=_PORT_WITHIN_S)
    port = free_port()
    supervisor.start(_superlink(files, port))
    supervisor.start(_door(files, port))
    supervisor.start(_superexec(files, port))
    return port


def flower_command(name: str) -> str:
    """Full path of one of Flower's commands, beside the Python that runs.

    Raises:
        HostError: PF907, it is not installed.
    """
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise HostError(ErrorCode.TOOL_MISSING, f"{name} is not installed", remedy="pip install 'pathfed[server]'")
    return found


def _superlink(files: EngineFiles, port: int) -> ProcessSpec:
    argv = [
        *(sys.executable, "-m", "pathfed_server.transport.superlink"),
        *("--host", LOOPBACK, "--port", str(port)),
        *("--database", str(files.flower / "superlink.db")),
        *("--isolation", "process", "--superexec-auth-secret-file", str(files.superexec_secret)),
        *("--enable-supernode-auth", "--disable-runtime-dependency-installation"),
        *("--ssl-certfile", str(files.certificate), "--ssl-keyfile", str(files.key), "--ssl-ca-certfile", str(files.ca)),
    ]
    return ProcessSpec(
        name="superlink",
        argv=argv,
        log=files.logs / "superlink.log",
        environment=flower_environment(files.flower),
        ready=lambda: accepts_connections(LOOPBACK, port),
        restarts=_RESTARTS,
        restart_delay_s=0.5,
    )


def _door(files: EngineFiles, port: int) -> ProcessSpec:
    argv = [
        *(sys.executable, "-m", "pathfed_server.transport.path_filter"),
        *("--listen", f"{files.listen}:{files.fleet_port}", "--upstream", f"{LOOPBACK}:{port}"),
        *("--ca", str(files.ca), "--cert", str(files.certificate), "--key", str(files.key)),
    ]
    return ProcessSpec(
        name="fleet-door",
        argv=argv,
        log=files.logs / "fleet-door.log",
        environment={"PYTHONUNBUFFERED": "1"},
        ready=lambda: accepts_connections(files.listen, files.fleet_port),
        restarts=_RESTARTS,
        restart_delay_s=0.5,
    )


def _superexec(files: EngineFiles, port: int) -> ProcessSpec:
    argv = [
        *(flower_command("flower-superexec"), "--runtime-api-address", f"{LOOPBACK}:{port}"),
        *("--root-certificates", str(files.ca), "--superexec-auth-secret-file", str(files.superexec_secret)),
    ]
    path = {"PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"}  # superexec looks up `flwr-serverapp` by name
    return ProcessSpec(
        name="superexec",
        argv=argv,
        log=files.logs / "superexec.log",
        environment={**flower_environment(files.flower), **path, **files.app_environment},
        restarts=_RESTARTS,
    )
