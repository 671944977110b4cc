"""Handing messages to real receivers: a web server with TLS, a mail server with STARTTLS and a login, and what goes wrong with each."""

import email
import hashlib
import hmac
import json
import socket
import ssl
import threading
import time
from contextlib import contextmanager

import pytest
from receivers import mail_receiver, web_receiver
from tests.server.notifying.conftest import PASSWORD, SECRET

from pathfed_common.errors import RoundError
from pathfed_common.processes import free_port
from pathfed_server.notifying.delivering import deliver
from pathfed_server.notifying.message import trial_message
from pathfed_server.notifying.settings import receivers

pytestmark = [
    pytest.mark.parametrize("backend", ["sqlite"], indirect=True),
    pytest.mark.filterwarnings("ignore:Requiring AUTH while not requiring TLS"),  # the connection has TLS from its start
]
MESSAGE = trial_message("x", "lakes", at=1.0)


@pytest.fixture
def hook(home, notify):
    def make(url: str, ca: str = "receivers.pem"):
        notify(home, f'[webhook.x]\nurl = "{url}"\nsecret_file = "keys/hook.secret"\nca_file = "{ca}"\n')
        return receivers(home).each["x"]

    return make


@pytest.fixture
def box(home, notify):
    def make(port: int, security: str, *, login: bool = True, ca: str = "receivers.pem", to: str = '"b@example.org"'):
        who = 'user = "pathfed"\npassword_file = "keys/mail.password"\n' if login else ""
        text = f'[mail.x]\nhost = "127.0.0.1"\nport = {port}\nsecurity = "{security}"\nca_file = "{ca}"\n{who}'
        notify(home, text + f'sender = "a@example.org"\nrecipients = [{to}]\n')
        return receivers(home).each["x"]

    return make


def fails(receiver, code: str, named: str = "", within_s: float = 10.0) -> RoundError:
    with pytest.raises(RoundError) as caught:
        deliver(receiver, MESSAGE, within_s=within_s)
    assert caught.value.code.value == code
    assert named in str(caught.value)
    return caught.value


def test_a_webhook_is_called_with_a_signature_over_the_exact_bytes(hook, context):
    with web_receiver(context) as seen:
        done = deliver(hook(f"https://127.0.0.1:{seen.port}/take?x=1"), MESSAGE)
    assert done.answer == 204
    ((headers, body),) = seen.calls
    assert headers["X-Pathfed-Signature"] == "sha256=" + hmac.new(SECRET, body, hashlib.sha256).hexdigest()
    assert headers["Content-Type"] == "application/json"
    assert json.loads(body)["test"] is True
    assert abs(json.loads(body)["sent_at"] - time.time()) < 60


@pytest.mark.parametrize("status", [400, 401, 404, 410, 429, 500, 503, 300, 304])
def test_an_answer_that_is_no_yes_is_a_refusal(hook, context, status):
    with web_receiver(context) as seen:
        seen.answer = status
        fails(hook(f"https://127.0.0.1:{seen.port}/"), "PF580", f"HTTP {status}")


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_is_not_followed(hook, context, status):
    with web_receiver() as inside, web_receiver(context) as seen:
        seen.answer, seen.location = status, f"http://127.0.0.1:{inside.port}/admin"
        fails(hook(f"https://127.0.0.1:{seen.port}/"), "PF580", f"HTTP {status}")
    assert inside.calls == []


def test_a_certificate_that_is_not_trusted_ends_it_before_anything_is_sent(hook, context):
    with web_receiver(context) as seen:
        fails(hook(f"https://127.0.0.1:{seen.port}/", ca=""), "PF582", "not trusted")
    assert seen.calls == []


def test_a_certificate_of_another_name_is_not_trusted(hook, context):
    with web_receiver(context) as seen:
        fails(hook(f"https://127.0.0.2:{seen.port}/"), "PF583" if _not_listening("127.0.0.2", seen.port) else "PF582")
    assert seen.calls == []


def _not_listening(host: str, port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((host, port)) != 0


def test_nobody_there_is_told_and_so_is_a_name_that_is_none(hook):
    fails(hook(f"https://127.0.0.1:{free_port()}/"), "PF583")
    fails(hook("https://nobody.invalid/"), "PF583")


def test_one_that_speaks_no_tls_is_told(hook):
    with web_receiver() as seen:
        fails(hook(f"https://127.0.0.1:{seen.port}/"), "PF582")
    assert seen.calls == []


def test_one_that_never_answers_or_never_ends_its_answer_is_left_in_time(hook, context):
    with web_receiver(context) as seen:
        receiver = hook(f"https://127.0.0.1:{seen.port}/")
        seen.before = lambda: seen.ended.wait(30)
        begun = time.monotonic()
        fails(receiver, "PF581", within_s=0.5)
        seen.before, seen.dribbles = lambda: None, True
        fails(receiver, "PF581", within_s=0.5)
        assert time.monotonic() - begun < 20


def test_a_proxy_or_netrc_of_the_machine_changes_nothing(hook, context, monkeypatch, tmp_path):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login a password b\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    with web_receiver(context) as seen:
        deliver(hook(f"https://127.0.0.1:{seen.port}/"), MESSAGE)
    assert "Authorization" not in seen.calls[0][0]


@pytest.mark.parametrize("security", ["starttls", "tls"])
def test_a_mail_is_handed_in_after_tls_and_a_login(box, context, security):
    with mail_receiver(context, starttls=security == "starttls", login=("pathfed", PASSWORD)) as seen:
        done = deliver(box(seen.port, security, to='"b@example.org", "c@example.org"'), MESSAGE)
    assert (done.answer, done.refused) == (250, 0)
    ((sender, recipients, content),) = seen.mails
    assert (sender, recipients) == ("a@example.org", ["b@example.org", "c@example.org"])
    assert email.message_from_bytes(content)["Subject"] == "[pathfed lakes] a test"
    assert seen.logins == [(b"pathfed", PASSWORD.encode())]


def test_a_mail_server_on_this_machine_needs_neither(box):
    with mail_receiver() as seen:
        deliver(box(seen.port, "none", login=False), MESSAGE)
    assert len(seen.mails) == 1


def test_without_tls_neither_password_nor_mail_is_sent(box):
    with mail_receiver() as seen:
        fails(box(seen.port, "starttls"), "PF582")
    assert (seen.mails, seen.logins) == ([], [])


@pytest.mark.parametrize("security", ["starttls", "tls"])
def test_a_mail_server_whose_certificate_is_not_trusted_gets_nothing(box, context, security):
    with mail_receiver(context, starttls=security == "starttls", login=("pathfed", PASSWORD)) as seen:
        fails(box(seen.port, security, ca=""), "PF582", "not trusted")
    assert (seen.mails, seen.logins) == ([], [])


def test_a_wrong_password_is_a_refusal_that_does_not_repeat_it(box, context):
    with mail_receiver(context, login=("pathfed", "another")) as seen:
        error = fails(box(seen.port, "starttls"), "PF580", "SMTP 535")
    assert PASSWORD not in str(error)
    assert seen.mails == []


def test_a_recipient_that_is_refused_does_not_keep_the_mail_from_the_others(box):
    with mail_receiver() as seen:
        seen.refuse = frozenset({"gone@example.org"})
        done = deliver(box(seen.port, "none", login=False, to='"b@example.org", "gone@example.org"'), MESSAGE)
        assert (done.refused, seen.mails[0][1]) == (1, ["b@example.org"])
        fails(box(seen.port, "none", login=False, to='"gone@example.org"'), "PF580", "SMTP 550")


@contextmanager
def slow_peer(greeting: bytes):
    """A server that sends a byte now and then, for ever, after a greeting."""
    ended = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(greeting)
                while not ended.wait(0.05):
                    try:
                        connection.sendall(b"2")
                    except OSError:
                        return

        thread = threading.Thread(target=serve)
        thread.start()
        yield listener.getsockname()[1]
        ended.set()
        thread.join(10)


@pytest.mark.parametrize("greeting", [b"", b"220 here\r\n"])
@pytest.mark.parametrize("security", ["none", "tls"])
def test_a_mail_server_that_never_ends_its_answer_is_left_in_time(box, greeting, security):
    with slow_peer(greeting) as port:
        begun = time.monotonic()
        fails(box(port, security, login=False), "PF582" if security == "tls" else "PF581", within_s=0.5)
        assert time.monotonic() - begun < 20


def test_a_mail_server_that_is_not_there_is_told(box):
    fails(box(free_port(), "starttls"), "PF583")


def test_what_a_mail_server_said_before_tls_counts_no_more(box, tmp_path, context):
    """Whoever sits in between may add to the answer to STARTTLS; that must not be read as an answer under TLS."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(b"220 here\r\n")
                connection.recv(1000)
                connection.sendall(b"250-here\r\n250 STARTTLS\r\n")
                connection.recv(1000)
                connection.sendall(b"220 go on\r\n250-injected\r\n250 AUTH PLAIN\r\n")
                try:
                    with context.wrap_socket(connection, server_side=True) as secured:
                        secured.recv(1000)
                        secured.sendall(b"554 not here\r\n")
                        secured.recv(1000)
                        secured.sendall(b"554 not here\r\n")
                except (OSError, ssl.SSLError):
                    return

        thread = threading.Thread(target=serve)
        thread.start()
        fails(box(listener.getsockname()[1], "starttls", login=True), "PF580", "SMTP 554")
        thread.join(10)
