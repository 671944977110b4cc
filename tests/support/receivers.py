"""Receivers of notifications on loopback: a web server with TLS, and a mail server with TLS and a login."""

import contextlib
import json
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from aiosmtpd.controller import Controller
from aiosmtpd.smtp import SMTP, AuthResult, Envelope, LoginPassword, Session

from pathfed_common.processes import free_port
from pathfed_server.transport.certificates import TlsFiles


@dataclass
class WebReceiver:
    """What came, and how it is answered.

    Attributes:
        port: its TCP port.
        calls: headers and body of each call, in order.
        answer: the status that is given, of those calls that it takes.
        before: what is done when a call came, before it is answered.
        location: where an answer redirects to.
        dribbles: whether the answer comes a byte at a time and never ends.
    """

    port: int = 0
    calls: list[tuple[dict[str, str], bytes]] = field(default_factory=list)
    answer: int = 204
    before: Callable[[], object] = lambda: None
    location: str = ""
    dribbles: bool = False
    ended: threading.Event = field(default_factory=threading.Event)

    def bodies(self) -> list[dict[str, Any]]:
        return [json.loads(body) for _, body in self.calls]

    def ids(self) -> list[int]:
        """The events that were told singly, with repetitions."""
        return [event["id"] for body in self.bodies() for event in body["events"]]


def server_context(folder: Path, tls: TlsFiles) -> ssl.SSLContext:
    """The context of a server that shows a certificate, whose files are written to `folder`."""
    folder.mkdir(exist_ok=True)
    for name, data in {"cert": tls.certificate, "key": tls.key}.items():
        (folder / name).write_bytes(data)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "cert", folder / "key")
    return context


@contextlib.contextmanager
def web_receiver(context: ssl.SSLContext | None = None) -> Iterator[WebReceiver]:
    """Take calls until the block ends."""
    seen = WebReceiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            seen.calls.append((dict(self.headers), body))
            seen.before()
            if seen.dribbles:
                with contextlib.suppress(OSError):
                    while not seen.ended.wait(0.05):
                        self.wfile.write(b"H")
                        self.wfile.flush()
                return
            self.send_response(seen.answer)
            if seen.location:
                self.send_header("Location", seen.location)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *_: None  # type: ignore[method-assign]
    if context is not None:
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    seen.port = server.server_port
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield seen
    finally:
        seen.ended.set()
        server.shutdown()
        server.server_close()
        thread.join()


@dataclass
class MailReceiver:
    """What came. `mails`: sender, recipients and bytes of each. `refuse`: recipients that are not taken."""

    port: int = 0
    mails: list[tuple[str, list[str], bytes]] = field(default_factory=list)
    logins: list[tuple[bytes, bytes]] = field(default_factory=list)
    refuse: frozenset[str] = frozenset()

    async def handle_RCPT(self, _s: SMTP, _session: Session, envelope: Envelope, address: str, _o: list[str]) -> str:  # noqa: N802
        if address in self.refuse:
            return "550 no such person"
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(self, _s: SMTP, session: Session, envelope: Envelope) -> str:  # noqa: N802
        assert isinstance(envelope.content, bytes)
        self.mails.append((str(envelope.mail_from), list(envelope.rcpt_tos), envelope.content))
        return "250 taken"


@contextlib.contextmanager
def mail_receiver(
    context: ssl.SSLContext | None = None, *, starttls: bool = True, login: tuple[str, str] | None = None
) -> Iterator[MailReceiver]:
    """Take mails until the block ends; with a context by STARTTLS or from the start, and after a login where one is given."""
    seen = MailReceiver()

    def authenticate(_server: SMTP, _session: Session, _envelope: Envelope, _mechanism: str, data: Any) -> AuthResult:
        assert isinstance(data, LoginPassword)
        seen.logins.append((data.login, data.password))
        good = (data.login, data.password) == tuple(part.encode() for part in login or ())
        return AuthResult(success=good, handled=good)

    options: dict[str, Any] = {"authenticator": authenticate, "auth_required": True} if login else {}
    if context is not None and starttls:
        options |= {"tls_context": context, "require_starttls": True}
    elif context is not None:
        options |= {"ssl_context": context, "auth_require_tls": False}
    controller = Controller(seen, hostname="127.0.0.1", port=free_port(), **options)
    controller.start()
    seen.port = controller.port
    try:
        yield seen
    finally:
        controller.stop()


def until(holds: Callable[[], bool], within_s: float = 60.0) -> None:
    """Wait for a state.

    Raises:
        AssertionError: it did not come.
    """
    end = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)
