"""Telling receivers of what happens: at least once, in order, each for itself, and given up visibly."""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from functools import partial

import psycopg
import pytest
from receivers import WebReceiver, mail_receiver, until, web_receiver

from pathfed_common.processes import free_port
from pathfed_server.db.sql_store import SqlStore
from pathfed_server.notifying.notifier import Notifier, notifier_processes
from pathfed_server.notifying.sender import Pace

FAST = Pace(look_s=0.05, gather_s=0.05, retry_s=0.05, longest_retry_s=0.2, database_s=0.1)
HOOK = """
[webhook.{name}]
url = "{scheme}://127.0.0.1:{port}/{name}"
secret_file = "keys/hook.secret"
ca_file = "receivers.pem"
every_s = 0
"""
MAIL = """
[mail.team]
host = "127.0.0.1"
port = {port}
security = "none"
sender = "a@b.org"
recipients = ["c@d.org"]
every_s = 0
"""


def hook(name: str, port: int, *, scheme: str = "http") -> str:
    return HOOK.format(name=name, port=port, scheme=scheme)


@contextmanager
def notifying(home, pace=FAST):
    """The notifier, in threads of this process; the store that it uses."""
    ended, failed = threading.Event(), []
    with SqlStore(home.database_url) as store:

        def work() -> None:
            try:
                Notifier(home, store, ended, pace).run()
            except BaseException as error:
                failed.append(error)
                raise

        thread = threading.Thread(target=work)
        thread.start()
        try:
            yield store
        finally:
            ended.set()
            thread.join(30)
    assert not thread.is_alive()
    assert failed == []


def begun(store: SqlStore, *names: str) -> None:
    """Wait until the receivers are kept: what happens from then on, they are told."""
    until(lambda: {row.receiver for row in store.receivers()} == set(names))


def happens(store: SqlStore, number: int, action: str = "site.refused", **detail: object) -> int:
    """An event of a run; its number in the trail."""
    subject = f"site-{number % 30}" if action.startswith("site.") else "lung-1"
    store.audit(actor="server", action=action, subject=subject, at=float(number), detail={"run": "lung-1", "round": 1, **detail})
    return store.newest_event()


def test_events_are_told_once_each_and_in_order_from_the_beginning_on(home, notify, context):
    with web_receiver(context) as seen:
        notify(home, hook("pager", seen.port, scheme="https"))
        with SqlStore(home.database_url) as before:
            happens(before, 0)
        with notifying(home) as store:
            begun(store, "pager")
            numbers = []
            for number in range(5):
                numbers.append(happens(store, number, code="PF507"))
                happens(store, number, "round.committed")
                until(lambda: seen.ids() == numbers)
            until(lambda: store.receiver("pager").until is None)
            row = store.receiver("pager")
    assert seen.ids() == numbers
    assert (row.sent, row.code, row.given_up) == (5, None, 0)
    assert row.after >= numbers[-1]


def test_a_thousand_events_while_a_receiver_is_away_come_in_one_message_when_it_is_back(home, notify):
    with web_receiver() as seen:
        seen.answer = 503
        notify(home, hook("pager", seen.port))
        with notifying(home) as store:
            begun(store, "pager")
            first = happens(store, 0)
            until(lambda: len(seen.calls) >= 2)
            for number in range(1, 300):
                happens(store, number, code="PF507")
            assert store.receiver("pager").code == "PF580"
            seen.answer = 200
            until(lambda: sum(body["count"] for body in seen.bodies() if body["id"] != seen.bodies()[0]["id"]) >= 299)
            last = store.newest_event()
    told = {body["id"]: body["count"] for body in seen.bodies()}
    assert sum(told.values()) == 300
    assert len(told) == 2
    assert [body["id"] for body in seen.bodies()][:2] == [f"pager-{first}-{first}"] * 2  # the same message again
    assert seen.bodies()[-1]["groups"][0]["last_id"] == last


def test_a_receiver_that_is_dead_or_slow_holds_up_no_other(home, notify):
    with web_receiver() as slow, web_receiver() as good, mail_receiver() as box:
        slow.before = lambda: slow.ended.wait(60)
        dead = hook("dead", free_port())
        notify(home, hook("slow", slow.port) + dead + hook("good", good.port) + MAIL.format(port=box.port))
        with notifying(home) as store:
            begun(store, "slow", "dead", "good", "team")
            numbers = [happens(store, 1, "round.failed", code="PF503")]
            until(lambda: good.ids() == numbers and len(box.mails) == 1)
            numbers.append(happens(store, 2, "run.finished"))
            until(lambda: good.ids() == numbers and len(box.mails) == 2)
            until(lambda: store.receiver("dead").attempts >= 2)
            assert (store.receiver("dead").code, len(slow.calls)) == ("PF583", 1)
            slow.ended.set()


def test_what_cannot_be_delivered_is_given_up_visibly_and_the_next_is_tried(home, notify, caplog):
    caplog.set_level(logging.INFO)
    with web_receiver() as good:
        notify(home, "give_up_hours = 1e-5\n" + hook("dead", free_port()) + hook("good", good.port))
        with notifying(home) as store:
            begun(store, "dead", "good")
            number = happens(store, 1, "round.failed", code="PF503")
            until(lambda: any(event["kind"] == "notification.failed" for body in good.bodies() for event in body["events"]))
            (failed,) = [row for row in store.audit_events() if row.action == "notification.failed"]
            assert failed.subject == "dead"
            assert (failed.detail["code"], failed.detail["events"]) == ("PF583", 1)
            assert failed.detail["after"] < number <= failed.detail["until"]
            row = store.receiver("dead")
            assert (row.given_up, row.until, row.code) == (1, None, "PF583")
            with web_receiver() as back:
                notify(home, hook("dead", back.port) + hook("good", good.port))
                until(lambda: "notify.toml has changed" in caplog.text)
                number = happens(store, 2, "run.failed", code="PF514")
                until(lambda: number in back.ids())
    assert all(event["site"] != "dead" for body in back.bodies() for event in body["events"])


def test_settings_are_taken_up_while_it_runs_and_bad_ones_are_not(home, notify, caplog):
    with web_receiver() as one, web_receiver() as two:
        notify(home, hook("one", one.port))
        with notifying(home) as store:
            begun(store, "one")
            notify(home, hook("one", one.port) + "nonsense = 1\n")
            until(lambda: "going on with the settings before it" in caplog.text)
            number = happens(store, 1)
            until(lambda: one.ids() == [number])
            notify(home, hook("two", two.port))
            begun(store, "two")
            number = happens(store, 2)
            until(lambda: two.ids() == [number])
    assert len(one.ids()) == 1


def test_kinds_are_chosen_and_a_change_of_kinds_leaves_nothing_under_way(home, notify):
    with web_receiver() as seen:
        notify(home, hook("pager", seen.port) + 'events = ["round.failed"]\n')
        with notifying(home) as store:
            begun(store, "pager")
            happens(store, 1)
            number = happens(store, 2, "round.failed")
            until(lambda: seen.ids() == [number])
            seen.answer = 500
            happens(store, 3, "round.failed")
            until(lambda: store.receiver("pager").until is not None and store.receiver("pager").attempts > 0)
            notify(home, hook("pager", seen.port) + 'events = ["run.finished"]\n')
            until(lambda: store.receiver("pager").until is None)
            seen.answer = 200
            number = happens(store, 4, "run.finished")
            until(lambda: number in seen.ids())


def test_waiting_grows_to_a_bound_and_is_drawn():
    pace = Pace()
    assert [pace.wait_s(attempts, lambda: 1.0) for attempts in (1, 2, 3, 99)] == [5.0, 10.0, 20.0, 900.0]
    assert pace.wait_s(3, lambda: 0.0) == 10.0


def is_told(seen: WebReceiver, numbers: list[int]) -> bool:
    return set(seen.ids()) >= set(numbers)


@contextmanager
def process_of(home):
    (spec,) = notifier_processes(home)
    with spec.log.open("ab") as log, subprocess.Popen(spec.argv, stdout=log, stderr=log) as process:
        try:
            yield process
        finally:
            process.kill()


def test_killed_between_sending_and_noting_it_tells_again_and_loses_nothing(home, notify, context):
    """Twice: killed when the call has come, before it is answered; the last call is taken."""
    victims: list[subprocess.Popen[bytes]] = []
    with web_receiver(context) as seen, SqlStore(home.database_url) as store:
        notify(home, hook("pager", seen.port, scheme="https"))

        def kill() -> None:
            if len(seen.calls) <= 2:
                os.kill(victims[-1].pid, signal.SIGKILL)

        seen.before = kill
        numbers: list[int] = []
        for life in range(3):
            with process_of(home) as process:
                victims.append(process)
                if life == 0:
                    begun(store, "pager")
                    numbers += [happens(store, 1, code="PF507"), happens(store, 2, "round.failed", code="PF503")]
                if life < 2:
                    assert process.wait(60) == -signal.SIGKILL
                    numbers.append(happens(store, 10 + life, "run.failed", code="PF514"))
                else:
                    until(partial(is_told, seen, numbers))
                    until(lambda: store.receiver("pager").until is None)
        row = store.receiver("pager")
    assert set(seen.ids()) == set(numbers)
    assert len({body["id"] for body in seen.bodies()[:3]}) == 1  # what was under way is the same message
    assert row.sent == 2
    log = (home.logs / "notifier.log").read_text()
    assert "Traceback" not in log
    assert "0123456789abcdef" not in log


def test_a_second_notifier_of_a_home_waits_until_the_first_has_ended(home, notify):
    with web_receiver() as seen, SqlStore(home.database_url) as store:
        notify(home, hook("pager", seen.port))
        with process_of(home) as first:
            begun(store, "pager")
            with process_of(home) as second:
                number = happens(store, 1)
                until(lambda: seen.ids() == [number])
                until(lambda: store.receiver("pager").until is None)
                first.terminate()
                assert first.wait(30) == 0
                number = happens(store, 2)
                until(lambda: seen.ids()[-1] == number)
                assert second.poll() is None
    assert len(seen.ids()) == 2


@pytest.mark.parametrize("backend", ["postgresql"], indirect=True)
def test_a_database_that_is_away_is_waited_for(home, notify, postgres):
    name = home.database_url.rsplit("/", 1)[1]
    with web_receiver() as seen:
        notify(home, hook("pager", seen.port))
        with notifying(home) as store:
            begun(store, "pager")
            with psycopg.connect(postgres.url("postgres"), autocommit=True) as admin:
                admin.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false".encode())
                admin.execute("SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = %s", [name])
                time.sleep(0.3)  # long enough for several looks, each of which fails
                admin.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true".encode())
            number = happens(store, 1)
            until(lambda: seen.ids() == [number])


def test_the_process_says_what_is_wrong_with_its_settings_and_waits_for_others(home, notify):
    with web_receiver() as seen, SqlStore(home.database_url) as store:
        notify(home, hook("pager", seen.port))
        argv = [sys.executable, "-m", "pathfed_server.notifying.notifier", "--home", str(home.root)]
        notify(home, "nonsense = 1\n")
        log = home.logs / "notifier.log"
        with log.open("ab") as out, subprocess.Popen(argv, stdout=out, stderr=out) as process:
            try:
                until(lambda: "PF905" in log.read_text())
                notify(home, hook("pager", seen.port))
                begun(store, "pager")
            finally:
                process.kill()
