"""Flower's side of the round benchmark: SuperLink, SuperNodes and ClientApp processes as Flower ships them, and its own FedAvg.

Isolation is `subprocess`, the default: SuperLink and each SuperNode start a superexec, which starts a process for every ServerApp and for
every message to a ClientApp. TLS and node authentication are on. SuperLink's state is in memory, its default, and sites reach it directly:
both spare Flower work that pathfed does.
"""

import contextlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.cli.build import build_fab_from_disk
from flwr.common.serde import fab_to_proto, user_config_to_proto
from flwr.proto.control_pb2 import StartRunRequest
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from tests.benchmarks._round_times import RoundTimes, wait_until

from pathfed_common import digest, files
from pathfed_common.flower_environment import flower_environment
from pathfed_common.processes import ProcessSpec, Supervisor, accepts_connections, free_port
from pathfed_server.transport.engine import flower_command
from pathfed_server.transport.flower_control import FlowerControl, node_key

_HOST = "127.0.0.1"
_APP = Path(__file__).with_name("flower_peer")
_RUN_S = 900.0


@dataclass(frozen=True, kw_only=True)
class Tls:
    """PEM files of a certificate authority, and of a server's certificate and key for 127.0.0.1."""

    ca: Path
    certificate: Path
    key: Path


@dataclass
class FlowerSide:
    """A stock Flower federation under `root`, with the initial state in the safetensors file `state`.

    `flat`: the state travels as one array in place of one for each tensor; Flower moves arrays one by one.
    """

    root: Path
    sites: int
    rounds: int
    train_s: float
    state: Path
    tls: Tls
    flat: bool = False
    supervisor: Supervisor = field(default_factory=Supervisor)

    def start(self) -> None:
        """Start SuperLink, register the nodes' keys, start the SuperNodes."""
        self.root.mkdir()
        self.port = free_port()
        tls = self.tls
        argv = [
            *(flower_command("flower-superlink"), "--host", _HOST, "--port", str(self.port), "--enable-supernode-auth"),
            *("--ssl-certfile", str(tls.certificate), "--ssl-keyfile", str(tls.key), "--ssl-ca-certfile", str(tls.ca)),
        ]
        self._start("superlink", argv, self.port)
        with FlowerControl(f"{_HOST}:{self.port}", tls.ca) as control:
            control.ensure_nodes([node_key(self._key(number)) for number in range(self.sites)])
        for number in range(self.sites):
            port = free_port()
            argv = [
                *(flower_command("flower-supernode"), "--root-certificates", str(tls.ca), "--superlink", f"{_HOST}:{self.port}"),
                *("--auth-supernode-private-key", str(self.root / f"node-{number}"), "--host", _HOST, "--port", str(port)),
            ]
            self._start(f"supernode-{number}", argv, port)
        content = build_fab_from_disk(_APP)
        self.fab = Fab(digest.of_bytes(content).removeprefix("sha256:"), content, {})

    def _start(self, name: str, argv: Sequence[str], port: int) -> None:
        home = self.root / f"home-{name}"
        home.mkdir()
        # Flower looks up its own commands by name. The threads are those that pathfed gives its runners.
        path = {"PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}", "OMP_NUM_THREADS": "1"}
        environment = flower_environment(home) | path
        ready = lambda: accepts_connections(_HOST, port)  # noqa: E731 - one expression, used once
        self.supervisor.start(ProcessSpec(name=name, argv=argv, log=self.root / f"{name}.log", environment=environment, ready=ready))

    def _key(self, number: int) -> str:
        key = ec.generate_private_key(ec.SECP384R1())
        private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption())
        files.write_atomic(self.root / f"node-{number}", private, secret=True)
        return key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()

    def measure(self, block: int) -> list[RoundTimes]:
        """One run of `rounds` rounds."""
        out = self.root / f"rounds-{block}.jsonl"
        config: dict[str, str | int | float | bool] = {
            "rounds": self.rounds,
            "sites": self.sites,
            "train-s": self.train_s,
            "state": str(self.state),
            "flat": self.flat,
            "out": str(out),
        }
        run = self._start_run(config)
        with FlowerControl(f"{_HOST}:{self.port}", self.tls.ca) as control:
            wait_until(lambda: self._over(control, run), _RUN_S, f"Flower's run {run}, see {self.root}")
        rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
        assert len(rows) == self.rounds
        assert all(len(row["began"]) == self.sites for row in rows)
        return [RoundTimes(**row) for row in rows]

    def _start_run(self, config: dict[str, str | int | float | bool]) -> int:
        client = ControlHttpClient.from_server_address(
            server_address=f"{_HOST}:{self.port}",
            insecure=False,
            root_certificates=self.tls.ca.read_bytes(),
            interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr CLI")],
        )
        try:
            request = StartRunRequest(fab=fab_to_proto(self.fab), override_config=user_config_to_proto(config), federation="")
            return int(client.StartRun(request).run_id)
        finally:
            client.close()

    def _over(self, control: FlowerControl, run: int) -> bool:
        for end in self.supervisor.poll():
            raise end.error()
        status, sub_status = control.run_status(run)
        if status == "finished" and sub_status != "completed":
            raise RuntimeError(f"Flower's run {run} {sub_status}, see {self.root}")
        return status == "finished"

    def pids(self) -> Sequence[int]:
        """Process ids of the owners."""
        return list(self.supervisor.pids().values())

    def stop(self) -> None:
        """End every process: ClientApp processes outlive the SuperNode that started them, so they are ended here."""
        owners = [psutil.Process(pid) for pid in self.pids()]
        tree = [each for owner in owners for each in owner.children(recursive=True)]
        self.supervisor.stop(grace_s=20.0)
        _, alive = psutil.wait_procs(tree, timeout=2.0)
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
