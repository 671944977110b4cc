"""A site's processes: the relay, which is the way out; Flower's SuperNode, which keeps the connection; our resident runner, which works."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pathfed_common.code_digest import module_command
from pathfed_common.flower_environment import flower_environment
from pathfed_common.processes import ProcessSpec, Supervisor, free_port

LOOPBACK = "127.0.0.1"
#: Environment variable with the path of the lock that a SuperNode holds while it lives.
LOCK_VARIABLE = "PATHFED_SUPERNODE_LOCK"
_RESTARTS = 1000
#: SuperLink refuses a SuperNode's return until it has noticed that the old one is gone (exit status 305, up to a minute).
_SUPERNODE_DELAY_S = 5.0
#: The relay ends by itself where the server's certificate is refused, which no haste mends.
_RELAY_DELAY_S = 2.0


@dataclass(frozen=True, kw_only=True)
class SiteFiles:
    """Files and settings a site's processes use.

    Attributes:
        relay: command of the relay; its port is appended, and then the tunnel's for the control plane.
        relay_ca: what SuperNode trusts at the relay's port.
        flower_key: the site's private Flower node key.
        superexec_secret: secret between SuperNode and runner.
        flower: folder of Flower's own state.
        logs: folder of logs.
        runner: command of the runner; the SuperNode's address is appended, and then the relay's port for the control plane.
        threads: CPU threads the runner's libraries may use.
        supernode_lock: held by the SuperNode while it lives.
    """

    relay: Sequence[str]
    relay_ca: Path
    flower_key: Path
    superexec_secret: Path
    flower: Path
    logs: Path
    runner: Sequence[str]
    threads: int
    supernode_lock: Path


@dataclass(frozen=True)
class RelayPorts:
    """Where the relay listens on the loopback: for SuperNode, and for the control plane's tunnel."""

    fleet: int
    tunnel: int


def start_relay(supervisor: Supervisor, files: SiteFiles) -> RelayPorts:
    """Start the relay, once for as long as the site runs, and do not wait for it: who wants out tries again until it listens.

    Raises:
        HostError: PF907, a command is missing.
    """
    ports = RelayPorts(free_port(), free_port())
    relay = [*files.relay, str(ports.fleet), str(ports.tunnel)]
    log = files.logs / "relay.log"
    supervisor.start(ProcessSpec(name="relay", argv=relay, log=log, restarts=_RESTARTS, restart_delay_s=_RELAY_DELAY_S))
    return ports


def start_site(supervisor: Supervisor, files: SiteFiles, ports: RelayPorts) -> None:
    """Start SuperNode and runner, and wait for neither. SuperNode knows the relay's port alone, and no way to the server but that.

    Each is watched from its first moment on: a SuperNode that the server does not let in ends within seconds, which is told, with its
    reason, as it would be later (`Supervisor.poll`), and tried again. The runner waits for the SuperNode by itself.

    Raises:
        HostError: PF907, a command is missing.
    """
    port = free_port()
    environment = flower_environment(files.flower)
    supernode = [
        *module_command("pathfed_client.transport.supernode"),
        *("--root-certificates", str(files.relay_ca), "--superlink", f"{LOOPBACK}:{ports.fleet}"),
        *("--auth-supernode-private-key", str(files.flower_key)),
        *("--isolation", "process", "--superexec-auth-secret-file", str(files.superexec_secret)),
        *("--host", LOOPBACK, "--port", str(port)),
    ]
    supervisor.start(
        ProcessSpec(
            name="supernode",
            argv=supernode,
            log=files.logs / "supernode.log",
            environment=environment | {LOCK_VARIABLE: str(files.supernode_lock)},
            restarts=_RESTARTS,
            restart_delay_s=_SUPERNODE_DELAY_S,
        )
    )
    runner = [*files.runner, f"{LOOPBACK}:{port}", str(ports.tunnel)]
    threads = {name: str(files.threads) for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
    supervisor.start(
        ProcessSpec(name="runner", argv=runner, log=files.logs / "runner.log", environment=environment | threads, restarts=_RESTARTS)
    )
