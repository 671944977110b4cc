"""The server's home folder: settings, keys, database, runs, Flower's own state, logs.

server.toml  server-card.dsse  ca.pem  tls.pem  ports.json (while it runs)  pathfed.db (unless a database URL is set)
keys/        evidence.pem  model.pem (from the first release on)  ca.key  tls.key  superexec.secret   (0600, in a folder of 0700)
checkpoints/ <digest>.safetensors: imported encoders that plans start from
runs/<run>/  states/ optimiser/ spool/ quarantine/ record/
flower/      SuperLink's database and bundles: an engine's state, not the truth
logs/        one file per process
"""

import datetime
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pydantic import Field

from pathfed_common import files
from pathfed_common.digest import Digest
from pathfed_common.errors import ErrorCode, HostError
from pathfed_common.ids import RunName, SiteName
from pathfed_common.processes import free_port
from pathfed_common.provenance.documents import ServerCard
from pathfed_common.provenance.keys import SigningKey
from pathfed_common.provenance.model_signature import ModelKey
from pathfed_common.settings import Settings, checked, read_settings, to_toml
from pathfed_server.transport.authority import Authority, AuthorityFiles
from pathfed_server.transport.certificates import make_tls

_SECRET_BYTES = 32
_LOOPBACK = ("127.0.0.1", "localhost")


class ServerSettings(Settings):
    """`server.toml` of a server."""

    #: The consortium's name, in the server card and the certificates.
    consortium: str = Field(pattern=r"^[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?$")
    #: Name or address that sites connect to.
    host: str = "127.0.0.1"
    #: Address that the ports for sites listen on.
    listen: str = "127.0.0.1"
    #: TCP port of the fleet door, for the sites' SuperNodes.
    fleet_port: int = Field(ge=1, le=65535)
    #: TCP port of the control service, for the sites' agents.
    control_port: int = Field(ge=1, le=65535)
    #: TCP port of the enrolment service, for sites that are invited.
    enrolment_port: int = Field(ge=1, le=65535)
    #: Keep every admitted update in its run's record: whoever is given them can recompute the states (`pathfed verify --replay`).
    retain_updates: bool = False
    #: Days that a site's TLS certificate holds; the site renews it by itself when two thirds are over.
    certificate_days: int = Field(default=30, ge=1, le=397)
    #: A site whose updates are refused in so many rounds running, for reasons of its own, is suspended; 0: never.
    suspend_after: int = Field(default=3, ge=0, le=1000)
    #: SQLAlchemy URL of the metadata database; empty: a SQLite file in the home.
    database: str = ""

    @property
    def hosts(self) -> list[str]:
        """Names and addresses that the server's certificate is for."""
        return list(dict.fromkeys([self.host, *_LOOPBACK]))

    @property
    def fleet_address(self) -> str:
        """HOST:PORT of the fleet door, as sites see it."""
        return f"{self.host}:{self.fleet_port}"

    @property
    def control_address(self) -> str:
        """HOST:PORT of the control service, as sites see it."""
        return f"{self.host}:{self.control_port}"

    @property
    def enrolment_address(self) -> str:
        """HOST:PORT of the enrolment service, as sites see it."""
        return f"{self.host}:{self.enrolment_port}"


@dataclass(frozen=True)
class ServerHome:
    """The home at `root`."""

    root: Path

    @cached_property
    def settings(self) -> ServerSettings:
        """`server.toml`."""
        return read_settings(ServerSettings, self.root / "server.toml")

    @property
    def database_url(self) -> str:
        """SQLAlchemy URL of the metadata database."""
        return self.settings.database or f"sqlite:///{self.root.resolve() / 'pathfed.db'}"

    @property
    def logs(self) -> Path:
        """Folder of logs."""
        return self.root / "logs"

    @property
    def flower(self) -> Path:
        """Folder of Flower's own state."""
        return self.root / "flower"

    @property
    def ca_file(self) -> Path:
        """The consortium's CA certificate."""
        return self.root / "ca.pem"

    @property
    def tls_certificate(self) -> Path:
        """The server's TLS certificate."""
        return self.root / "tls.pem"

    @property
    def tls_key(self) -> Path:
        """The server's TLS key."""
        return self.root / "keys" / "tls.key"

    @property
    def superexec_secret(self) -> Path:
        """Secret between SuperLink and superexec."""
        return self.root / "keys" / "superexec.secret"

    @property
    def card_file(self) -> Path:
        """The server's card, to hand to sites."""
        return self.root / "server-card.dsse"

    @property
    def ports_file(self) -> Path:
        """Ports and process id of a running `pathfed-server start`; absent when none runs."""
        return self.root / "ports.json"

    @cached_property
    def evidence_key(self) -> SigningKey:
        """The key that signs plans, offers and round records."""
        return SigningKey.from_pem(files.read_secret(self.root / "keys" / "evidence.pem"))

    def model_key(self) -> ModelKey:
        """The key that signs released encoders; made when it is first asked for."""
        path = self.root / "keys" / "model.pem"
        if not path.exists():
            files.write_atomic(path, ModelKey.generate().to_pem(), secret=True)
        return ModelKey.from_pem(files.read_secret(path))

    @property
    def authority_files(self) -> AuthorityFiles:
        """Where the certificate authority's parts are."""
        return AuthorityFiles(
            bundle=self.ca_file,
            key=self.root / "keys" / "ca.key",
            server_certificate=self.tls_certificate,
            server_key=self.tls_key,
        )

    def authority(self) -> Authority:
        """The certificate authority as its files say now.

        Raises:
            HostError: PF904, PF906, a file is missing or a key may be read by others.
            TransportError: PF420, they do not fit together.
        """
        return Authority(self.settings.consortium, self.authority_files)

    def write_card(self) -> None:
        """Write the server's card anew, from settings, evidence key and trusted authorities."""
        files.write_atomic(self.card_file, _card(self.settings, self.evidence_key, files.read_given(self.ca_file)))

    @property
    def checkpoints(self) -> Path:
        """Folder of imported encoders; made by the first import."""
        return self.root / "checkpoints"

    def checkpoint(self, named: Digest) -> Path:
        """Where the imported encoder of that digest is."""
        return self.checkpoints / f"{named.removeprefix('sha256:')}.safetensors"

    def run_folder(self, run: RunName) -> Path:
        """Folder of one run."""
        return self.root / "runs" / run

    def record(self, run: RunName) -> Path:
        """Folder of a run's record."""
        return self.run_folder(run) / "record"

    def site_card_file(self, site: SiteName) -> Path:
        """Where an enrolled site's card is kept."""
        return self.root / "sites" / f"{site}.dsse"

    def site_card(self, site: SiteName) -> bytes:
        """An enrolled site's card.

        Raises:
            HostError: PF904, it is not there.
        """
        path = self.site_card_file(site)
        try:
            return path.read_bytes()
        except OSError as error:
            raise HostError(ErrorCode.HOME_UNUSABLE, f"the site's card cannot be read: {error.strerror}", where=path) from None


def create_home(
    root: Path,
    *,
    consortium: str,
    host: str,
    listen: str,
    database: str,
    fleet_port: int | None = None,
    control_port: int | None = None,
    enrolment_port: int | None = None,
) -> ServerHome:
    """Make a server's home with fresh keys and certificates; whole or not at all. The database is not touched here.

    Args:
        root: the home's folder.
        consortium: the consortium's name.
        host: name or address that sites connect to.
        listen: address to listen on.
        database: SQLAlchemy URL; empty: SQLite in the home.
        fleet_port: TCP port; this and the other two: a free one where None.
        control_port: TCP port.
        enrolment_port: TCP port.

    Raises:
        HostError: PF904, something is there already, or it cannot be written; PF905, a setting is out of bounds, or a port is given twice.
    """
    ports = {"fleet_port": fleet_port, "control_port": control_port, "enrolment_port": enrolment_port}
    raw = {"consortium": consortium, "host": host, "listen": listen, "database": database, **_chosen(ports)}
    settings = checked(ServerSettings, raw)
    files.create_folder(root, lambda part: _fill(part, settings))
    return ServerHome(root)


def _chosen(ports: Mapping[str, int | None]) -> dict[str, int]:
    """The ports that were given, and free ones for the others."""
    given = [port for port in ports.values() if port is not None]
    if len(set(given)) != len(given):
        raise HostError(ErrorCode.SETTINGS_INVALID, "each service has a port of its own", where="options", value=sorted(given))
    chosen: dict[str, int] = {}
    for name, port in ports.items():
        chosen[name] = port or _other_port({*given, *chosen.values()})
    return chosen


def _other_port(taken: set[int]) -> int:
    while True:
        port = free_port()
        if port not in taken:
            return port


def _fill(part: Path, settings: ServerSettings) -> None:
    for folder in ("keys", "sites", "runs", "flower", "logs"):
        (part / folder).mkdir(mode=0o700)
    tls = make_tls(settings.consortium, settings.hosts, now=datetime.datetime.now(datetime.UTC))
    evidence = SigningKey.generate()
    secrets = {
        "evidence.pem": evidence.to_pem(),
        "ca.key": tls.ca_key,
        "tls.key": tls.key,
        "superexec.secret": os.urandom(_SECRET_BYTES).hex().encode(),
    }
    for name, data in secrets.items():
        files.write_atomic(part / "keys" / name, data, secret=True)
    files.write_atomic(part / "server-card.dsse", _card(settings, evidence, tls.ca_certificate))
    files.write_atomic(part / "ca.pem", tls.ca_certificate)
    files.write_atomic(part / "tls.pem", tls.certificate + tls.ca_certificate)
    files.write_atomic(part / "server.toml", to_toml(settings, "pathfed server; see docs/reference/settings.md").encode())


def _card(settings: ServerSettings, evidence: SigningKey, ca_pem: bytes) -> bytes:
    card = ServerCard(
        name=settings.consortium,
        evidence_key=evidence.public,
        ca_pem=ca_pem.decode(),
        fleet_address=settings.fleet_address,
        control_address=settings.control_address,
        enrolment_address=settings.enrolment_address,
    )
    return card.to_bytes(evidence)
