"""Handing a mail to a mail server: TLS first, then the login, then the mail; the whole of it within a time."""

import smtplib
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from email.message import EmailMessage
from typing import Literal

from pathfed_common.errors import ErrorCode, RoundError
from pathfed_server.transport.delivery import Delivered, delivery_error

_READY = 220
_TAKEN = 250


@dataclass(frozen=True)
class MailServer:
    """Where mails are handed in, and how.

    Attributes:
        host: its name.
        port: its TCP port.
        security: "starttls", "tls" or "none".
        user: who logs in; empty: nobody.
        password: the password, or None.
        tls: what its certificate is checked against.
    """

    host: str
    port: int
    security: Literal["starttls", "tls", "none"]
    user: str
    password: str | None = field(repr=False)
    tls: ssl.SSLContext = field(repr=False)


def hand_in(mail: EmailMessage, server: MailServer, *, within_s: float) -> Delivered:
    """Hand a mail in for all its recipients; taken is what the server takes for one of them at least.

    Raises:
        RoundError: PF580, the server takes no login or no mail; PF581, not done within `within_s` seconds; PF582, TLS fails or is not
            offered; PF583, nobody is reached.
    """
    begun = time.monotonic()
    late = threading.Event()
    try:
        with _connection(server, within_s, late) as smtp:
            if server.user and server.password is not None:
                smtp.login(server.user, server.password)
            refused = smtp.send_message(mail)
    except (OSError, smtplib.SMTPException, UnicodeError) as error:
        raise _trouble(TimeoutError() if late.is_set() else error, within_s) from None
    return Delivered(answer=_TAKEN, seconds=time.monotonic() - begun, refused=len(refused))


def _trouble(error: BaseException, within_s: float) -> RoundError:
    if isinstance(error, smtplib.SMTPNotSupportedError):
        return RoundError(ErrorCode.NOTICE_TLS, "the mail server offers no TLS, or no way to log in that we know")
    if isinstance(error, smtplib.SMTPRecipientsRefused):
        return _refused(min(code for code, _ in error.recipients.values()))
    if isinstance(error, smtplib.SMTPResponseException):
        return _refused(error.smtp_code)
    return delivery_error(error, within_s)


def _refused(code: int) -> RoundError:
    return RoundError(ErrorCode.NOTICE_REFUSED, "the mail server did not take the mail", value=f"SMTP {code}")


@contextmanager
def _connection(server: MailServer, within_s: float, late: threading.Event) -> Iterator[smtplib.SMTP]:
    """A connection after TLS, which is cut when the time is over: the limit of a socket begins anew with each byte."""
    raw = socket.create_connection((server.host, server.port), timeout=within_s)

    def cut() -> None:
        late.set()
        with suppress(OSError):
            raw.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(within_s, cut)
    timer.daemon = True
    timer.start()
    smtp = smtplib.SMTP()
    try:
        smtp.sock = _secured(raw, server) if server.security == "tls" else raw
        _demand(smtp.getreply()[0], _READY)
        if server.security == "starttls":
            _begin_tls(smtp, raw, server)
        yield smtp
        with suppress(OSError, smtplib.SMTPException):  # the mail is taken
            smtp.quit()
    finally:
        timer.cancel()
        smtp.close()
        raw.close()


def _secured(raw: socket.socket, server: MailServer) -> ssl.SSLSocket:
    return server.tls.wrap_socket(raw, server_hostname=server.host)


def _begin_tls(smtp: smtplib.SMTP, raw: socket.socket, server: MailServer) -> None:
    """`SMTP.starttls` takes the server's name from its own connecting, which cannot be cut."""
    smtp.ehlo()
    if not smtp.has_extn("starttls"):
        raise smtplib.SMTPNotSupportedError
    _demand(smtp.docmd("STARTTLS")[0], _READY)
    smtp.sock = _secured(raw, server)
    # What was said before TLS counts no more, nor what came with it.
    smtp.file = smtp.helo_resp = smtp.ehlo_resp = None
    smtp.esmtp_features = {}
    smtp.does_esmtp = False


def _demand(code: int, wanted: int) -> None:
    if code != wanted:
        raise smtplib.SMTPResponseException(code, "")
