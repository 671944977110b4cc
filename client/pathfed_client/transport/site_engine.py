"""A site's processes: the relay, which is the way out; Flower's SuperNode, which keeps the connection; our resident runner, which works."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pathfed_common.flower_environment import flower_environment
from pathfed_common.processes import ProcessSpec, Supervisor, free_port

LOOPBACK = "127.0.0.1"
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
        runner: command of the runner; the SuperNode's address is appended.
        threads: CPU threads the runner's libraries may use.
    """

    relay: Sequence[str]
    relay_ca: Path
    flower_key: Path
    superexec_secret: Path
    flower: Path
    logs: Path
    runner: Sequence[str]
    threads: int


def start_site(supervisor: Supervisor, files: SiteFiles) -> int:
    """Start relay, SuperNode and runner, and wait for none. SuperNode knows the relay's port alone, and no way to the server but that.

    Each is watched from its first moment on: a SuperNode that the server does not let in ends within seconds, which is told, with its
    reason, as it would be later (`Supervisor.poll`), and tried again. The runner waits for the SuperNode by itself.

    Returns:
        The port of the relay's tunnel to the control plane, on the loopback.

    Raises:
        HostError: PF907, a command is missing.
    """
    relay_port, tunnel_port, port = free_port(), free_port(), free_port()
    relay = [*files.relay, str(relay_port), str(tunnel_port)]
    supervisor.start(
        ProcessSpec(name="relay", argv=relay, log=files.logs / "relay.log", restarts=_RESTARTS, restart_delay_s=_RELAY_DELAY_S)
    )
    environment = flower_environment(files.flower)
    supernode = [
        *(sys.executable, "-m", "pathfed_client.transport.supernode"),
        *("--root-certificates", str(files.relay_ca), "--superlink", f"{LOOPBACK}:{relay_port}"),
        *("--auth-supernode-private-key", str(files.flower_key)),
        *("--isolation", "process", "--superexec-auth-secret-file", str(files.superexec_secret)),
        *("--host", LOOPBACK, "--port", str(port)),
    ]
    supervisor.start(
        ProcessSpec(
            name="supernode",
            argv=supernode,
            log=files.logs / "supernode.log",
            environment=environment,
            restarts=_RESTARTS,
            restart_delay_s=_SUPERNODE_DELAY_S,
        )
    )
    runner = [*files.runner, f"{LOOPBACK}:{port}"]
    threads = {name: str(files.threads) for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
    supervisor.start(
        ProcessSpec(name="runner", argv=runner, log=files.logs / "runner.log", environment=environment | threads, restarts=_RESTARTS)
    )
    return tunnel_port
