"""A real engine (SuperLink, fleet door, superexec) with real keys, started once for the folder's tests."""

import datetime
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.proto.fleet_pb2 import ActivateNodeRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from pathfed_common import files
from pathfed_common.errors import HostError
from pathfed_common.processes import Supervisor, free_port
from pathfed_server.transport.certificates import make_tls
from pathfed_server.transport.engine import EngineFiles, start_engine
from pathfed_server.transport.flower_control import FlowerControl, node_key

_PORTS_TRIED = 3


@dataclass
class Engine:
    """A running engine."""

    root: Path
    superlink_port: int
    fleet_port: int
    supervisor: Supervisor

    @property
    def ca(self) -> Path:
        return self.root / "ca.pem"


def _write_node_key(path: Path) -> str:
    key = ec.generate_private_key(ec.SECP384R1())
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption())
    files.write_atomic(path, pem, secret=True)
    return key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()


def _engine_files(root: Path, fleet_port: int, app_environment: Mapping[str, str]) -> EngineFiles:
    """Keys, certificates and folders for an engine under `root`."""
    tls = make_tls("test", ["127.0.0.1", "localhost"], now=datetime.datetime.now(datetime.UTC))
    parts = {"ca.pem": tls.ca_certificate, "tls.pem": tls.certificate, "tls.key": tls.key, "secret": os.urandom(32).hex().encode()}
    for name, data in parts.items():
        files.write_atomic(root / name, data, secret=True)
    (root / "flower").mkdir()
    return EngineFiles(
        ca=root / "ca.pem",
        certificate=root / "tls.pem",
        key=root / "tls.key",
        superexec_secret=root / "secret",
        flower=root / "flower",
        logs=root / "logs",
        listen="127.0.0.1",
        fleet_port=fleet_port,
        app_environment=app_environment,
    )


@pytest.fixture(scope="session")
def write_node_key() -> Callable[[Path], str]:
    """Write a private Flower node key; gives its public half as OpenSSH text."""
    return _write_node_key


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    root = tmp_path_factory.mktemp("engine")
    supervisor = Supervisor()
    made = _engine_files(root, free_port(), {})
    try:
        for _ in range(_PORTS_TRIED):
            try:
                port = start_engine(supervisor, made)
                break
            except HostError as error:  # a port was snatched between its choice and its use
                supervisor.stop()
                made, failed = replace(made, fleet_port=free_port()), error
        else:
            raise failed
        yield Engine(root, port, made.fleet_port, supervisor)
    finally:
        supervisor.stop()


@dataclass(frozen=True)
class SignedIn:
    """A node as SuperLink knows it, and its client, which goes through the fleet door."""

    public: bytes
    node: Node
    client: FleetHttpClient


@pytest.fixture
def sign_in(engine: Engine, tmp_path: Path) -> Iterator[Callable[[str, Any], SignedIn]]:
    """Sign a new node of that name in. The interceptor sees each request as it goes over the wire."""
    made: list[SignedIn] = []

    def sign_in(name: str, interceptor: Any) -> SignedIn:
        public = node_key(_write_node_key(tmp_path / name))
        private = load_ssh_private_key((tmp_path / name).read_bytes(), None)
        assert isinstance(private, ec.EllipticCurvePrivateKey)
        with FlowerControl(f"127.0.0.1:{engine.superlink_port}", engine.ca) as control:
            control.ensure_nodes([*(one.public for one in made), public])
        client = FleetHttpClient.from_server_address(
            server_address=f"127.0.0.1:{engine.fleet_port}",
            insecure=False,
            root_certificates=engine.ca.read_bytes(),
            interceptors=[
                RuntimeVersionHttpInterceptor(component_name="supernode"),
                NodeAuthHttpInterceptor(private, private.public_key()),
                interceptor,
            ],
        )
        node = Node(node_id=client.ActivateNode(ActivateNodeRequest(public_key=public, heartbeat_interval=30.0)).node_id)
        made.append(SignedIn(public, node, client))
        return made[-1]

    yield sign_in
    for one in made:
        one.client.close()
