"""A site's home folder: settings, policy, keys, database, sealed updates, logs. Everything of a client's is under it but the slides.

site.toml  policy.toml  server-card.dsse  site-card.dsse  ca.pem  site.db  egress.db
keys/      evidence.pem  flower  pseudonym.key  superexec.secret   (0600, in a folder of 0700)
secrets/   one chain of secrets per run (pathfed_client.io.run_secrets), the ledger's head (io.ledger_head); leave it out of backups
updates/   sealed updates, resent as they are
logs/      one file per process
*.lock     held while the site runs (`hold`)
stopped    there while the site is stopped (`io.stop_switch`)
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import Field, field_validator

from pathfed_client.gate.site_policy import SitePolicy
from pathfed_client.io.ledger_head import HeadFile
from pathfed_client.io.run_secrets import RunSecrets
from pathfed_client.io.stop_switch import StopSwitch
from pathfed_common import files, process_lock
from pathfed_common.errors import ErrorCode, HostError
from pathfed_common.ids import SiteName, site_name
from pathfed_common.provenance.documents import ServerCard, SiteCard
from pathfed_common.provenance.keys import SigningKey
from pathfed_common.settings import Settings, read_settings, to_toml

_SECRET_BYTES = 32
_LOOK_AGAIN_S = 0.2


class PatientListColumns(Settings):
    """`[patient_list]` of `site.toml`: the headers of the patient list's columns. A role that is not given goes by well-known headers."""

    #: Header of the column that names the slide: its path, its file name with or without suffix, or its DICOM folder.
    slide: str | None = None
    #: Header of the column that names the patient. A case or block is a patient only where each truly is one person.
    patient: str | None = None
    #: Header of the column that names the case; it is not used, but never taken for a patient. Empty, as below: there is no such column.
    case: str | None = None
    #: Header of the column that names the block.
    block: str | None = None
    #: Header of the column that names the organ.
    organ: str | None = None
    #: Header of the column that names the cancer type.
    cancer_type: str | None = None
    #: Header of the column that names the stain.
    stain: str | None = None
    #: Header of the column with the day of acquisition.
    acquired: str | None = None
    #: Header of the column that names the scanner.
    scanner: str | None = None
    #: Header of the column with the resolution of level 0, um/px, where the file's own is missing or wrong.
    mpp: str | None = None

    def configured(self) -> dict[str, str]:
        """Role -> header, of the roles that are given."""
        return {role: text for role, text in self.model_dump().items() if text is not None}


class SiteSettings(Settings):
    """`site.toml` of a site."""

    #: The site's name in the consortium: lower-case letters, digits and inner hyphens.
    name: str = Field(pattern=r"^[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?$")
    #: Folders with the slides, searched with all that is below them and only ever read. None may lie inside another.
    slides: tuple[str, ...] = Field(min_length=1)
    #: CSV export of the lab system: which slide is which patient's, and optional columns.
    patients: str
    #: Headers of the patient list's columns; a table of its own, below.
    patient_list: PatientListColumns = PatientListColumns()

    @field_validator("slides", mode="before")
    @classmethod
    def _as_tuple(cls, value: object) -> object:
        """A list, as TOML gives it, or one folder's name alone."""
        return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


@dataclass(frozen=True)
class SiteHome:
    """The home at `root`. Reading a part that is not there raises HostError PF904."""

    root: Path

    @cached_property
    def settings(self) -> SiteSettings:
        """`site.toml`."""
        return read_settings(SiteSettings, self.root / "site.toml")

    @cached_property
    def policy(self) -> SitePolicy:
        """`policy.toml`, as it was when it was first read."""
        return self.policy_now()

    def policy_now(self) -> SitePolicy:
        """`policy.toml` as it is now."""
        return read_settings(SitePolicy, self.root / "policy.toml")

    @property
    def stop_switch(self) -> StopSwitch:
        """The switch that stops the site."""
        return StopSwitch(self.root)

    def lock(self, what: str) -> Path:
        """The lock that the process which does `what` holds (`hold`)."""
        return self.root / f"{what}.lock"

    @property
    def name(self) -> SiteName:
        """The site's name."""
        return site_name(self.settings.name)

    @property
    def slides(self) -> tuple[Path, ...]:
        """The slides' folders."""
        return tuple(Path(folder) for folder in self.settings.slides)

    @property
    def patients(self) -> Path:
        """The patient list."""
        return Path(self.settings.patients)

    @property
    def database(self) -> Path:
        """The site database."""
        return self.root / "site.db"

    @property
    def egress(self) -> Path:
        """The record of what left."""
        return self.root / "egress.db"

    @property
    def relay_files(self) -> Path:
        """Folder of the relay's loopback certificate, made anew at every start."""
        return self.root / "flower" / "relay"

    @property
    def updates(self) -> Path:
        """Folder of sealed updates."""
        return self.root / "updates"

    @property
    def run_secrets(self) -> Path:
        """Folder of the runs' secret chains."""
        return self.root / "secrets"

    @property
    def logs(self) -> Path:
        """Folder of logs."""
        return self.root / "logs"

    @property
    def ca_file(self) -> Path:
        """The consortium's CA certificate, pinned at init."""
        return self.root / "ca.pem"

    @property
    def flower_key(self) -> Path:
        """Private Flower node key, OpenSSH form."""
        return self.root / "keys" / "flower"

    @property
    def superexec_secret(self) -> Path:
        """Secret between SuperNode and runner."""
        return self.root / "keys" / "superexec.secret"

    @cached_property
    def evidence_key(self) -> SigningKey:
        """The key that signs what this site states."""
        return SigningKey.from_pem(files.read_secret(self.root / "keys" / "evidence.pem"))

    @cached_property
    def pseudonym_key(self) -> bytes:
        """Key of the patients' pseudonyms. Never leaves the site."""
        return files.read_secret(self.root / "keys" / "pseudonym.key")

    @cached_property
    def server_card(self) -> ServerCard:
        """The server this site belongs to, pinned at init."""
        return ServerCard.from_bytes(self._read("server-card.dsse"))

    @property
    def card_file(self) -> Path:
        """The site's own card, to hand to the operator."""
        return self.root / "site-card.dsse"

    def _read(self, name: str) -> bytes:
        path = self.root / name
        try:
            return path.read_bytes()
        except OSError as error:
            raise HostError(
                ErrorCode.HOME_UNUSABLE,
                f"cannot be read: {error.strerror}",
                where=path,
                remedy="run `pathfed-site init` first, or give the right --home",
            ) from None


def create_home(root: Path, settings: SiteSettings, policy: SitePolicy, server_card: bytes) -> SiteHome:
    """Make a site's home with fresh keys; whole or not at all.

    Raises:
        HostError: PF904, something is there already, or it cannot be written.
        ProvenanceError: PF602, the server card does not verify.
    """
    card = ServerCard.from_bytes(server_card)
    files.create_folder(root, lambda part: _fill(part, settings, policy, card, server_card))
    return SiteHome(root)


@contextmanager
def hold(home: SiteHome, what: str, *, patience_s: float = 0.0) -> Iterator[None]:
    """Be the only process that does `what` ("site", "runner") in this home, as long as the context lasts or the process lives.

    A killed process lets go at once: the lock is the operating system's (flock), and the file `what`.lock means nothing by itself.

    Args:
        home: the site's home.
        what: names the lock.
        patience_s: how long to wait for another process to let go, seconds.

    Raises:
        HostError: PF904, another process holds it, or the home cannot be written.
    """
    path = home.lock(what)
    last = time.monotonic() + patience_s
    while True:
        try:
            held = process_lock.take(path)
        except OSError as error:
            raise files.disk_error(error, path) from error
        if held is not None:
            break
        if time.monotonic() >= last:
            raise HostError(
                ErrorCode.HOME_UNUSABLE,
                "another process runs this site already",
                where=path,
                remedy="stop the other `pathfed-site start` of this home; two would spend and erase each other's secrets",
            )
        time.sleep(_LOOK_AGAIN_S)
    with held:
        yield


def _fill(part: Path, settings: SiteSettings, policy: SitePolicy, card: ServerCard, server_card: bytes) -> None:
    for folder in ("keys", "updates", "logs"):
        (part / folder).mkdir(mode=0o700)
    RunSecrets.create(part / "secrets")
    HeadFile.create(part / "secrets")
    evidence = SigningKey.generate()
    flower = ec.generate_private_key(ec.SECP384R1())
    private = flower.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption())
    public = flower.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    secrets = {
        "evidence.pem": evidence.to_pem(),
        "flower": private,
        "pseudonym.key": os.urandom(_SECRET_BYTES),
        "superexec.secret": os.urandom(_SECRET_BYTES).hex().encode(),
    }
    for name, data in secrets.items():
        files.write_atomic(part / "keys" / name, data, secret=True)
    own = SiteCard(site=site_name(settings.name), evidence_key=evidence.public, flower_key=public.decode())
    files.write_atomic(part / "site-card.dsse", own.to_bytes(evidence))
    files.write_atomic(part / "server-card.dsse", server_card)
    files.write_atomic(part / "ca.pem", card.ca_pem.encode())
    files.write_atomic(part / "site.toml", to_toml(settings, "pathfed site; see docs/reference/settings.md").encode())
    files.write_atomic(part / "policy.toml", to_toml(policy, "This hospital's own limits; see docs/reference/settings.md").encode())
