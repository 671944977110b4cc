"""A site's home folder: settings, policy, keys, database, sealed updates, logs. Everything of a client's is under it but the slides.

site.toml  policy.toml  site-card.dsse  site.db  egress.db
server-card.dsse  ca.pem  site.pem  enrolment.json   (once enrolled: the server, its CA, the site's certificate, what it was asked with)
keys/      evidence.pem  flower  tls.pem  pseudonym.key  superexec.secret   (0600, in a folder of 0700)
secrets/   one chain of secrets per run (pathfed_client.io.run_secrets), the ledger's head (io.ledger_head); leave it out of backups
updates/   sealed updates, resent as they are
base-states/   base states of the last rounds, public; a file that is missing is fetched again (pathfed_client.io.state_cache)
logs/      one file per process
*.lock     held while the site runs (`hold`)
stopped    there while the site is stopped (`io.stop_switch`)
"""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pydantic import Field, field_validator

from pathfed_client.gate.site_policy import SitePolicy
from pathfed_client.io.ledger_head import HeadFile
from pathfed_client.io.log_head import LogHeadFile
from pathfed_client.io.run_secrets import RunSecrets
from pathfed_client.io.site_keys import FileKeys, KeyKind, flower_public
from pathfed_client.io.stop_switch import StopSwitch
from pathfed_common import digest, files, process_lock
from pathfed_common.digest import Digest
from pathfed_common.errors import ErrorCode, HostError, TransportError
from pathfed_common.ids import SiteName, site_name
from pathfed_common.provenance.documents import ServerCard, SiteCard
from pathfed_common.provenance.keys import SigningKey, VerifyKey
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
    def base_states(self) -> Path:
        """Folder of base states."""
        return self.root / "base-states"

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
        """The consortium's CA certificate, pinned when the home was enrolled."""
        return self.root / "ca.pem"

    @property
    def certificate_file(self) -> Path:
        """The site's certificate for the control plane; not there before the site is admitted, or in a home that only has cards."""
        return self.root / "site.pem"

    @property
    def next_certificate_file(self) -> Path:
        """A renewed certificate, between being received and being used."""
        return self.root / "site.pem.next"

    @property
    def enrolled(self) -> bool:
        """Whether the control plane knows this home: it has a certificate."""
        return self.certificate_file.exists()

    @property
    def log_head(self) -> LogHeadFile:
        """What this site has cosigned last of the transparency log."""
        return LogHeadFile(self.run_secrets)

    @property
    def server_card_file(self) -> Path:
        """The server's card; not there before the home is enrolled."""
        return self.root / "server-card.dsse"

    @property
    def has_server(self) -> bool:
        """Whether this home belongs to a server."""
        return self.server_card_file.exists()

    @property
    def keys(self) -> FileKeys:
        """The site's private keys."""
        return FileKeys(self.root / "keys")

    @property
    def flower_key(self) -> Path:
        """Private Flower node key, OpenSSH form."""
        return self.keys.flower_key_file()

    @property
    def superexec_secret(self) -> Path:
        """Secret between SuperNode and runner."""
        return self.root / "keys" / "superexec.secret"

    @cached_property
    def evidence_key(self) -> SigningKey:
        """The key that signs what this site states."""
        return self.keys.evidence_key()

    @property
    def former_keys(self) -> tuple[VerifyKey, ...]:
        """Public evidence keys this site had before; what they signed stays this site's.

        Raises:
            HostError: PF906, the file holds something else.
        """
        path = self.root / "former-keys.json"
        if not path.exists():
            return ()
        try:
            return tuple(VerifyKey.from_text(text) for text in json.loads(path.read_bytes()))
        except (ValueError, TypeError) as error:
            raise HostError(ErrorCode.KEY_FILE, f"not a list of public keys: {error}", where=path) from None

    @property
    def evidence_keys(self) -> dict[Digest, VerifyKey]:
        """All public evidence keys this site has or had, by key id."""
        return {key.key_id: key for key in (*self.former_keys, self.evidence_key.public)}

    def add_former_key(self, key: VerifyKey) -> None:
        """Remember an evidence key that is being replaced; once is enough.

        Raises:
            HostError: PF901, PF904, it cannot be written; PF906, see `former_keys`.
        """
        known = [one.to_text() for one in self.former_keys]
        if key.to_text() not in known:
            files.write_atomic(self.root / "former-keys.json", digest.canonical([*known, key.to_text()]))

    @cached_property
    def pseudonym_key(self) -> bytes:
        """Key of the patients' pseudonyms. Never leaves the site."""
        return files.read_secret(self.root / "keys" / "pseudonym.key")

    @cached_property
    def server_card(self) -> ServerCard:
        """The server this site belongs to, pinned when it was enrolled.

        Raises:
            TransportError: PF430, the home is not enrolled.
        """
        self.settings  # noqa: B018 - a folder that is no home has its own error
        if not self.has_server:
            raise TransportError(ErrorCode.NOT_ENROLLED, "this home is not enrolled with a server yet", where=self.root)
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


def create_home(root: Path, settings: SiteSettings, policy: SitePolicy, server_card: bytes | None = None) -> SiteHome:
    """Make a site's home with fresh keys; whole or not at all.

    Args:
        root: the folder.
        settings: `site.toml`.
        policy: `policy.toml`.
        server_card: a card that was handed over, for sites that have no way to the control plane; None: the home is enrolled later.

    Raises:
        HostError: PF904, something is there already, or it cannot be written.
        ProvenanceError: PF602, the server card does not verify.
    """
    card = None if server_card is None else ServerCard.from_bytes(server_card)

    def fill(part: Path) -> None:
        _fill(part, settings, policy)
        if card is not None and server_card is not None:
            files.write_atomic(part / "server-card.dsse", server_card)
            files.write_atomic(part / "ca.pem", card.ca_pem.encode())

    files.create_folder(root, fill)
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


def _fill(part: Path, settings: SiteSettings, policy: SitePolicy) -> None:
    for folder in ("keys", "updates", "logs"):
        (part / folder).mkdir(mode=0o700)
    RunSecrets.create(part / "secrets")
    HeadFile.create(part / "secrets")
    keys = FileKeys.create(part / "keys")
    for name, data in {"pseudonym.key": os.urandom(_SECRET_BYTES), "superexec.secret": os.urandom(_SECRET_BYTES).hex().encode()}.items():
        files.write_atomic(part / "keys" / name, data, secret=True)
    files.write_atomic(part / "site-card.dsse", site_card(keys, site_name(settings.name)))
    files.write_atomic(part / "site.toml", to_toml(settings, "pathfed site; see docs/reference/settings.md").encode())
    files.write_atomic(part / "policy.toml", to_toml(policy, "This hospital's own limits; see docs/reference/settings.md").encode())


def site_card(keys: FileKeys, site: SiteName, staged: KeyKind | None = None) -> bytes:
    """The site's card for its keys, with the staged one of a kind in its place, signed by the evidence key that it names."""
    evidence = keys.evidence_key(staged=staged is KeyKind.EVIDENCE)
    flower = flower_public(keys.flower_key_file(staged=staged is KeyKind.FLOWER))
    return SiteCard(site=site, evidence_key=evidence.public, flower_key=flower).to_bytes(evidence)
