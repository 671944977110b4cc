"""`notify.toml`: what may stand in it, and that secrets stay where they are."""

import pytest
from tests.server.notifying.conftest import PASSWORD, SECRET

from pathfed_common.errors import HostError
from pathfed_server.notifying.notifier import notifier_processes
from pathfed_server.notifying.settings import Mailbox, Webhook, receivers

HOOK = 'url = "https://hooks.example.org/T00/s3cr3t-path"\nsecret_file = "keys/hook.secret"\n'
MAIL = """
host = "mail.example.org"
user = "pathfed"
password_file = "keys/mail.password"
sender = "a@example.org"
recipients = ["b@example.org"]
"""
pytestmark = pytest.mark.parametrize("backend", ["sqlite"], indirect=True)


def test_receivers_are_read_with_their_secrets_which_show_nowhere(home, notify):
    notify(home, f'[webhook.pager]\n{HOOK}events = ["run.failed"]\n[mail.team]\n{MAIL}')
    found = receivers(home)
    assert set(found.each) == {"pager", "team"}
    assert found.give_up_s == 86_400
    pager, team = found.each["pager"], found.each["team"]
    assert isinstance(pager, Webhook)
    assert isinstance(team, Mailbox)
    assert (pager.secret, team.password) == (SECRET, PASSWORD)
    shown = repr(found) + str(found) + pager.place + team.place
    for secret in (SECRET.decode(), PASSWORD, "s3cr3t-path"):
        assert secret not in shown
    assert pager.place == "https://hooks.example.org"
    assert len(notifier_processes(home)) == 1


def test_without_the_file_nobody_is_told_and_no_process_runs(home):
    assert receivers(home).each == {}
    assert notifier_processes(home) == []


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("give_up = 1", "give_up"),
        ("give_up_hours = 0", "give_up_hours"),
        ("[webhook.pager]\n" + HOOK + "retries = 3", "retries"),
        ("[webhook.pager]\nsecret_file = 'keys/hook.secret'", "url"),
        ("[webhook.pager]\nurl = 'https://example.org/'", "secret_file"),
        ("[webhook.pager]\n" + HOOK + "events = ['round.committed']", "round.committed"),
        ("[webhook.pager]\n" + HOOK + "events = []", "events"),
        ("[webhook.Pager]\n" + HOOK, "Pager"),
        ("[webhook.'a/b']\n" + HOOK, "a/b"),
        (f"[webhook.x]\n{HOOK}[mail.x]\n{MAIL}", "same name"),
        ("".join(f"[webhook.x{number}]\n{HOOK}" for number in range(17)), "at most 16"),
        ("[mail.team]\n" + MAIL + "security = 'none'", "this machine alone"),
        ("[mail.team]\n" + MAIL.replace('user = "pathfed"\n', ""), "go together"),
        ("[mail.team]\n" + MAIL.replace("b@example.org", "b@example.org\\nBcc: c@example.org"), "mail address"),
        ("[mail.team]\n" + MAIL.replace('["b@example.org"]', "[]"), "recipients"),
        ("[mail.team]\n" + MAIL.replace("mail.example.org", "mail.example.org:25"), "host"),
        ("[mail.team]\n" + MAIL + "port = 0", "port"),
        ("[webhook.pager]\n" + HOOK + "ca_file = 'keys/hook.secret'", "no certificates"),
        ("webhook = 1", "webhook"),
        ("= 1", "TOML"),
    ],
)
def test_a_setting_that_cannot_be_used_is_told(home, notify, text, named):
    notify(home, text)
    with pytest.raises(HostError) as caught:
        notifier_processes(home)
    assert caught.value.code.value == "PF905"
    assert named in str(caught.value)
    assert SECRET.decode() not in str(caught.value)


@pytest.mark.parametrize(
    "place",
    [
        "http://hooks.example.org/",
        "http://10.0.0.1/",
        "http://127.0.0.1.example.org/",
        "http://0.0.0.0/",
        "http://[::ffff:10.0.0.1]/",
        "ftp://example.org/",
        "https://",
        "https:///path",
        "https://user:pass@example.org/",
        "https://example.org/#x",
        "https://exa mple.org/",
        "https://a..b/",
        f"https://{'a' * 64}.org/",
        "https://example.org:0/",
        "https://example.org:99999/",
        "https://example.org\\\\@evil.org/",
        "file:///etc/passwd",
        "//example.org/",
        "",
    ],
)
def test_a_webhook_goes_by_https_or_to_this_machine(home, notify, place):
    notify(home, "[webhook.pager]\n" + HOOK.replace("https://hooks.example.org/T00/s3cr3t-path", place))
    with pytest.raises(HostError, match="PF905"):
        receivers(home)


@pytest.mark.parametrize("place", ["http://127.0.0.1:8000/x", "http://localhost/", "http://[::1]:80/", "https://10.0.0.1:8443/a?b=c"])
def test_these_are_good(home, notify, place):
    notify(home, "[webhook.pager]\n" + HOOK.replace("https://hooks.example.org/T00/s3cr3t-path", place))
    assert set(receivers(home).each) == {"pager"}


def test_a_url_with_a_secret_in_it_is_not_repeated_in_the_error(home, notify):
    notify(home, "[webhook.pager]\n" + HOOK.replace("https", "http"))
    with pytest.raises(HostError) as caught:
        receivers(home)
    assert "s3cr3t" not in str(caught.value)


@pytest.mark.parametrize(
    ("break_it", "code"),
    [
        (lambda path: path.unlink(), "PF906"),
        (lambda path: path.chmod(0o640), "PF906"),
        (lambda path: path.write_bytes(b"short\n"), "PF906"),
        (lambda path: path.write_bytes(b"x" * 5000), "PF906"),
    ],
)
def test_a_secret_that_is_missing_short_or_open_to_others_is_told(home, notify, break_it, code):
    notify(home, "[webhook.pager]\n" + HOOK)
    break_it(home.root / "keys" / "hook.secret")
    with pytest.raises(HostError, match=code):
        receivers(home)


@pytest.mark.parametrize("content", [b"", b"\n", b"two\nlines", b"\xff\xfe", b"nul\0"])
def test_a_password_is_one_line_of_text(home, notify, content):
    notify(home, "[mail.team]\n" + MAIL)
    (home.root / "keys" / "mail.password").write_bytes(content)
    with pytest.raises(HostError, match="PF906"):
        receivers(home)
