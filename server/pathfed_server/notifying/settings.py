"""Who is told of what: `notify.toml` in the server's home, and the secrets that it names."""

import ipaddress
import re
import ssl
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import SplitResult, urlsplit

from pydantic import AfterValidator, Field, field_validator, model_validator

from pathfed_common import files
from pathfed_common.errors import ErrorCode, HostError
from pathfed_common.settings import Settings, read_settings
from pathfed_server.home import ServerHome
from pathfed_server.notifying.kinds import KINDS

FILE = "notify.toml"
_SECRET_BYTES = (16, 4096)
_MOST_RECEIVERS = 16
_RECEIVER = re.compile(r"^[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?$")
_ADDRESS = re.compile(r"^[A-Za-z0-9.!#$%&'*+/=?^_`{|}~-]{1,64}@[A-Za-z0-9](?:[A-Za-z0-9.-]{0,251}[A-Za-z0-9])?$")
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_HOST = re.compile(rf"^(?=.{{1,253}}$){_LABEL}(?:\.{_LABEL})*$")


def is_loopback(host: str) -> bool:
    """Whether a host is this machine by its very name: ``localhost``, or an address of the loopback network."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _is_host(text: str) -> bool:
    """Whether a text is a host's name or address."""
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return _HOST.match(text) is not None
    return True


def _url(text: str) -> str:
    try:
        parts = urlsplit(text)
        good = _well_formed(text, parts)
    except ValueError:
        good = False
    if not good:
        raise ValueError("must be https://HOST[:PORT]/PATH, without user, password or fragment")
    if parts.scheme == "http" and not is_loopback(parts.hostname or ""):
        raise ValueError("http goes to this machine alone (127.0.0.1, ::1, localhost); anywhere else must be https")
    return text


def _well_formed(text: str, parts: SplitResult) -> bool:
    printable = text.isascii() and text.isprintable() and " " not in text and "\\" not in text
    named = parts.port != 0 and _is_host(parts.hostname or "")
    return printable and named and parts.scheme in ("http", "https") and "@" not in parts.netloc and not parts.fragment


def _address(text: str) -> str:
    if not _ADDRESS.match(text):
        raise ValueError(f"must be a plain mail address such as name@example.org, got {text!r}")
    return text


def _host_name(text: str) -> str:
    if not _is_host(text):
        raise ValueError("must be a host's name or address, without port")
    return text


class _Receiver(Settings):
    """What the tables of all receivers have in common."""

    @field_validator("events", "recipients", mode="before", check_fields=False)
    @classmethod
    def _as_tuple(cls, value: object) -> object:
        """A list, as TOML gives it."""
        return tuple(value) if isinstance(value, list) else value

    @field_validator("events", check_fields=False)
    @classmethod
    def _kinds(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for kind in value or ():
            if kind not in KINDS:
                raise ValueError(f"must be of {', '.join(KINDS)}, got {kind!r}")
        return value


class WebhookSettings(_Receiver):
    """`[webhook.NAME]` of `notify.toml`: a receiver that is called over HTTPS, with a signature that proves who calls."""

    #: Where to call: https, or http on this machine alone. Treated as a secret, for many services put one into it.
    url: Annotated[str, AfterValidator(_url), Field(repr=False)]
    #: File with the secret that calls are signed with (HMAC-SHA256), 16 bytes or more, readable by its owner alone; relative to the home.
    secret_file: str
    #: Kinds of events to tell of. All if not given.
    events: tuple[str, ...] | None = Field(default=None, min_length=1)
    #: At least this long between two calls, seconds; what happens meanwhile comes together in the next.
    every_s: Annotated[float, Field(ge=0, le=86_400)] = 1.0
    #: File with the certificates to trust instead of the system's, PEM; relative to the home.
    ca_file: str = ""


class MailSettings(_Receiver):
    """`[mail.NAME]` of `notify.toml`: people who are told by mail."""

    #: The mail server.
    host: Annotated[str, AfterValidator(_host_name)]
    #: Its TCP port.
    port: Annotated[int, Field(ge=1, le=65535)] = 587
    #: "starttls": TLS is begun in the connection, and nothing is sent without it. "tls": from the start (port 465). "none": on this
    #: machine alone.
    security: Literal["starttls", "tls", "none"] = "starttls"
    #: Name to log in with. Empty: no login.
    user: str = ""
    #: File with the password, readable by its owner alone; relative to the home.
    password_file: str = ""
    #: Address that mails come from.
    sender: Annotated[str, AfterValidator(_address)]
    #: Addresses that mails go to.
    recipients: tuple[Annotated[str, AfterValidator(_address)], ...] = Field(min_length=1, max_length=50)
    #: Kinds of events to tell of. All if not given.
    events: tuple[str, ...] | None = Field(default=None, min_length=1)
    #: At least this long between two mails, seconds; what happens meanwhile comes together in the next.
    every_s: Annotated[float, Field(ge=0, le=86_400)] = 60.0
    #: File with the certificates to trust instead of the system's, PEM; relative to the home.
    ca_file: str = ""

    @model_validator(mode="after")
    def _fits(self) -> "MailSettings":
        if self.security == "none" and not is_loopback(self.host):
            raise ValueError('security "none" goes to this machine alone (127.0.0.1, ::1, localhost); anywhere else takes TLS')
        if bool(self.user) != bool(self.password_file):
            raise ValueError("user and password_file go together")
        return self


class NotifySettings(Settings):
    """`notify.toml` of a server: who is told of what happens. Without this file nobody is. A change is taken up while the server runs."""

    #: A message that cannot be delivered for so long is given up, and the audit trail says so (`notification.failed`).
    give_up_hours: Annotated[float, Field(gt=0, le=24 * 30)] = 24.0
    #: Receivers called over HTTPS, by a name of your own; tables of their own, below.
    webhook: dict[str, WebhookSettings] = Field(default_factory=dict)
    #: Receivers of mail, likewise.
    mail: dict[str, MailSettings] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _named(self) -> "NotifySettings":
        names = [*self.webhook, *self.mail]
        for name in names:
            if not _RECEIVER.match(name):
                raise ValueError(f"a receiver's name is 1 to 63 of a-z, 0-9 and inner hyphens, got {name!r}")
        if len(set(names)) != len(names):
            raise ValueError("a webhook and a mail receiver have the same name")
        if len(names) > _MOST_RECEIVERS:
            raise ValueError(f"at most {_MOST_RECEIVERS} receivers, got {len(names)}")
        return self


@dataclass(frozen=True)
class Webhook:
    """A webhook that can be called. `url` may hold a secret of its own: people see `place`."""

    name: str
    settings: WebhookSettings
    secret: bytes = field(repr=False)
    tls: ssl.SSLContext = field(repr=False, compare=False)

    @property
    def place(self) -> str:
        """Where it goes, without anything secret."""
        parts = urlsplit(self.settings.url)
        return f"{parts.scheme}://{parts.netloc}"


@dataclass(frozen=True)
class Mailbox:
    """A mail receiver that can be sent to. `password` is None where there is no login."""

    name: str
    settings: MailSettings
    password: str | None = field(repr=False)
    tls: ssl.SSLContext = field(repr=False, compare=False)

    @property
    def place(self) -> str:
        """Where it goes."""
        return f"{', '.join(self.settings.recipients)} by {self.settings.host}:{self.settings.port}"


Receiver = Webhook | Mailbox


@dataclass(frozen=True)
class Receivers:
    """All receivers, by name, and after how many seconds a message is given up."""

    each: dict[str, Receiver]
    give_up_s: float


def settings_file(home: ServerHome) -> Path:
    """Where the settings are; the file need not exist."""
    return home.root / FILE


def receivers(home: ServerHome) -> Receivers:
    """The receivers, with their secrets; none without `notify.toml`.

    Raises:
        HostError: PF905, a setting cannot be used; PF906, a secret's file is missing, readable by others, or holds no secret; PF904,
            `notify.toml` or a file of certificates cannot be read.
    """
    path = settings_file(home)
    if not path.exists():
        return Receivers({}, 0.0)
    given = read_settings(NotifySettings, path)
    each: dict[str, Receiver] = {}
    for name, hook in given.webhook.items():
        each[name] = Webhook(name, hook, _hook_secret(home, hook.secret_file), _trust(home, hook.ca_file))
    for name, box in given.mail.items():
        password = _password(home, box.password_file) if box.password_file else None
        each[name] = Mailbox(name, box, password, _trust(home, box.ca_file))
    return Receivers(each, give_up_s=given.give_up_hours * 3600)


def _hook_secret(home: ServerHome, name: str) -> bytes:
    path = home.root / name
    secret = files.read_secret(path).strip()
    low, high = _SECRET_BYTES
    if not low <= len(secret) <= high:
        raise HostError(
            ErrorCode.KEY_FILE, f"a webhook's secret has {low} to {high} bytes", where=path, remedy=f"openssl rand -hex 32 > {path}"
        )
    return secret


def _password(home: ServerHome, name: str) -> str:
    path = home.root / name
    try:
        password = files.read_secret(path).decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError:
        password = ""
    if not password or not password.isprintable():
        raise HostError(ErrorCode.KEY_FILE, "the file holds one line, the password, as UTF-8 text", where=path)
    return password


def _trust(home: ServerHome, name: str) -> ssl.SSLContext:
    """What a receiver's certificate is checked against: the system's authorities, or those in a file."""
    if not name:
        return ssl.create_default_context()
    path = home.root / name
    try:
        return ssl.create_default_context(cadata=files.read_given(path).decode("ascii"))
    except (ssl.SSLError, ValueError):
        raise HostError(ErrorCode.SETTINGS_INVALID, "holds no certificates, PEM", where=path) from None
