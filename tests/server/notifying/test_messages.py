"""What is told: few fields, bounded size, a signature that fits, and nothing that an event holds besides."""

import hashlib
import hmac
import json

import pytest

from pathfed_server.db.rows import AuditRow
from pathfed_server.notifying.bodies import mail, signature, webhook_body
from pathfed_server.notifying.kinds import KINDS, notice_of
from pathfed_server.notifying.message import GROUPS, SINGLY, SITES, Collector, Message, trial_message

AT = 1_795_000_000.5


def event(seq=1, action="round.failed", subject="lung-1", **detail) -> AuditRow:
    return AuditRow(seq=seq, at=AT + seq, actor="server", action=action, subject=subject, detail=detail)


def message_of(*rows: AuditRow) -> Message:
    collector = Collector()
    for row in rows:
        notice = notice_of(row)
        assert notice is not None
        collector.add(notice)
    return collector.message("pager", "lakes")


def text_of(message: Message) -> tuple[str, str]:
    made = mail(message, sender="pathfed@example.org", recipients=("ann@example.org",), sent_at=AT)
    return str(made["Subject"]), made.get_content()


@pytest.mark.parametrize(
    ("row", "kind", "site"),
    [
        (event(round=4, code="PF503"), "round.failed", None),
        (event(action="site.silent", subject="north", run="lung-1", round=4, code="PF515"), "site.late", "north"),
        (event(action="site.late", subject="north", run="lung-1", round=4, code="PF561"), "site.late", "north"),
        (event(action="site.refused", subject="north", run="lung-1", round=4, code="PF507"), "site.refused", "north"),
        (event(action="notification.failed", subject="pager", code="PF583"), "notification.failed", "pager"),
        (event(action="run.finished"), "run.finished", None),
    ],
)
def test_an_event_is_told_under_its_kind(row, kind, site):
    notice = notice_of(row)
    assert notice is not None
    assert (notice.kind, notice.site, notice.id) == (kind, site, 1)


@pytest.mark.parametrize(
    "row", [event(action="site.refused", subject="north"), event(action="round.committed"), event(action="plan.approved")]
)
def test_of_the_rest_nobody_is_told(row):
    assert notice_of(row) is None


def test_nothing_else_that_an_event_holds_is_told():
    row = event(
        action="site.refused",
        subject="north",
        run="lung-1",
        round=4,
        code="PF507",
        patients=7.25,
        path="/srv/slides/Meyer^Anna.svs",
        note="P-4711",
        sites={"P-4711": "x"},
    )
    message = message_of(row, event(seq=2, subject="<script>P-4711", round="P-4711", code="P-4711"))
    body, (subject, text) = webhook_body(message, sent_at=AT).decode(), text_of(message)
    for leaked in ("4711", "Meyer", "7.25", "svs", "script"):
        assert leaked not in body + subject + text, leaked
    assert json.loads(body)["events"][0] == {
        "id": 1,
        "kind": "site.refused",
        "at": AT + 1,
        "run": "lung-1",
        "round": 4,
        "site": "north",
        "code": "PF507",
    }


def test_ten_thousand_refusals_are_one_message_of_bounded_size():
    rows = [event(seq, "site.refused", f"site-{seq % 40}", run="lung-1", round=1 + seq % 9, code="PF507") for seq in range(5, 10_005)]
    message = message_of(*rows, event(20_000, round=9, code="PF503"))
    assert (message.count, len(message.notices), message.id) == (10_001, SINGLY, "pager-5-20000")
    refused, failed = message.groups
    assert (refused.count, refused.first_id, refused.last_id, refused.first_round, refused.last_round) == (10_000, 5, 10_004, 1, 9)
    assert (len(refused.sites), refused.more_sites, failed.count) == (SITES, True, 1)
    subject, text = text_of(message)
    assert subject == "[pathfed lakes] site refused 10,000, round failed 1"
    assert len(webhook_body(message, sent_at=AT)) < 16_000
    assert len(text) < 4_000
    assert "pathfed-server events --since 4" in text


def test_many_runs_at_once_are_bounded_too_and_the_rest_is_counted():
    message = message_of(*(event(seq, "run.failed", f"run-{seq}", code="PF514") for seq in range(1, 1001)))
    assert len(message.groups) == GROUPS
    assert f"{1000 - GROUPS:,} events more." in text_of(message)[1]
    assert len(webhook_body(message, sent_at=AT)) < 64_000


def test_a_mail_says_what_happened_where_and_what_to_do():
    subject, text = text_of(message_of(event(153, round=4, code="PF503")))
    assert subject == "[pathfed lakes] round failed: lung-1 round 4 (PF503)"
    assert "Too few updates" in text
    assert "event 153" in text
    assert text_of(trial_message("pager", "lakes", at=AT))[0] == "[pathfed lakes] a test"
    made = mail(message_of(event(153)), sender="a@example.org", recipients=("b@example.org", "c@example.org"), sent_at=AT)
    assert made["Message-ID"] == "<pager-153-153@lakes.pathfed>"
    assert made["To"] == "b@example.org, c@example.org"


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_a_mail(kind):
    family = kind.split(".")[0]
    subject, text = text_of(message_of(event(1, kind, "north" if family in ("site", "notification") else "lung-1", run="lung-1")))
    assert KINDS[kind] in subject
    assert text


def test_a_signature_is_of_these_bytes_and_this_secret():
    body = webhook_body(message_of(event()), sent_at=AT)
    made = signature(b"k" * 32, body)
    assert made == "sha256=" + hmac.new(b"k" * 32, body, hashlib.sha256).hexdigest()
    assert made != signature(b"k" * 32, body + b" ")
    assert made != signature(b"j" * 32, body)
