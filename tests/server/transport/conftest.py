"""A real engine (SuperLink, fleet door, superexec) with real keys, started once for the folder's tests."""

import datetime
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from pathfed_common import files
from pathfed_common.errors import HostError
from pathfed_common.processes import Supervisor, free_port
from pathfed_server.transport.certificates import make_tls
from pathfed_server.transport.engine import EngineFiles, start_engine

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
