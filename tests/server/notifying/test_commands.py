"""`pathfed-server notify status` and `notify test`, and the notifier under `pathfed-server start`."""

import pytest
from receivers import mail_receiver, until, web_receiver
from tests.server.notifying.conftest import SECRET
from tests.server.notifying.test_sender import begun, happens, hook, notifying

from pathfed_common.processes import Supervisor, free_port
from pathfed_server.db.sql_store import SqlStore
from pathfed_server.notifying.notifier import notifier_processes


def test_status_says_who_is_reached_and_what_is_pending(server_cli, home, notify):
    with web_receiver() as seen:
        notify(home, hook("dead", free_port()) + hook("good", seen.port))
        status = ("notify", "status", "--home", home.root)
        assert [row["state"] for row in server_cli(*status, "--json").json] == ["not begun", "not begun"]
        with notifying(home) as store:
            begun(store, "dead", "good")
            for number in range(3):
                happens(store, number)
            until(lambda: len(seen.ids()) == 3 and store.receiver("dead").attempts > 0 and store.receiver("good").until is None)
        dead, good = server_cli(*status, "--json").json
    assert (dead["receiver"], dead["state"], dead["code"], dead["pending"], dead["sent"]) == ("dead", "failing", "PF583", 3, 0)
    assert (good["state"], good["code"], good["pending"]) == ("idle", None, 0)
    people = server_cli(*status)
    assert "PF583" in people.out
    assert "http://127.0.0.1" in people.out
    for text in (people.out, str(dead)):
        assert SECRET.decode() not in text


@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
def test_a_test_message_says_what_came_back(server_cli, home, notify):
    test = ("notify", "test", "x", "--home", home.root, "--json")
    with web_receiver() as seen:
        notify(home, hook("x", seen.port))
        assert server_cli(*test).json["answer"] == 204
        assert seen.bodies()[0]["test"] is True
        seen.answer = 401
        done = server_cli(*test)
        assert (done.code, done.status) == ("PF580", 15)
        assert "HTTP 401" in done.out
    assert server_cli(*test).code == "PF583"
    with SqlStore(home.database_url) as store:
        tried = [(row.subject, row.detail["code"]) for row in store.audit_events() if row.action == "notification.tested"]
    assert tried == [("x", None), ("x", "PF580"), ("x", "PF583")]
    with mail_receiver() as box:
        text = f'[mail.x]\nhost = "localhost"\nport = {box.port}\nsecurity = "none"\nsender = "a@b.org"\nrecipients = ["c@d.org"]\n'
        notify(home, text)
        assert server_cli(*test).json["answer"] == 250


@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
def test_what_cannot_be_tried_is_told(server_cli, home, notify):
    assert server_cli("notify", "test", "x", "--home", home.root, "--json").code == "PF584"
    assert server_cli("notify", "status", "--home", home.root, "--json").json == []
    notify(home, "nonsense = 1")
    for command in (("test", "x"), ("status",)):
        assert server_cli("notify", *command, "--home", home.root, "--json").code == "PF905"
    assert server_cli("start", "--home", home.root, "--json").code == "PF905"


@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
def test_the_process_is_started_again_however_often_it_ends(home, notify):
    supervisor = Supervisor()
    with web_receiver() as seen, SqlStore(home.database_url) as store:
        notify(home, hook("pager", seen.port))
        (spec,) = notifier_processes(home)
        assert spec.restarts > 10**6
        supervisor.start(spec)
        try:
            begun(store, "pager")
            number = happens(store, 1)
            until(lambda: seen.ids() == [number])
        finally:
            supervisor.stop()
