"""A server that wants its own code to run at a site: real SuperLink, SuperNode and runner, and a bundle full of code."""

import hashlib
import io
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from flwr.common.serde import fab_to_proto
from flwr.proto.control_pb2 import StartRunRequest
from flwr.supercore.fab import Fab

from pathfed_common.protocol import wire
from pathfed_local.consortium import Consortium, find_hospitals
from pathfed_server.home import ServerHome
from pathfed_server.transport.flower_control import FlowerControl

pytestmark = pytest.mark.timeout(900)
_WITHIN_S = 300

#: The server's half: sends a message to every node, in the server's own process, and writes down what comes back.
SERVER_APP = """
import time
from pathlib import Path
from flwr.app import Message, RecordDict
from flwr.serverapp import ServerApp
app = ServerApp()

@app.main()
def main(grid, context):
    nodes = []
    while not nodes:
        nodes = list(grid.get_node_ids())
        time.sleep(0.5)
    replies = grid.send_and_receive([Message(RecordDict(), dst_node_id=node, message_type={kind!r}) for node in nodes], timeout=120)
    said = [reply.error.reason if reply.has_error() else "answered" for reply in replies]
    Path({heard!r}).write_text(",".join(said))
"""
#: What would be seen if any of it ran at the site: when it is imported, or when it is put in place of the installed package.
MARKING = "from pathlib import Path; Path({mark!r}).write_text('ran')\nfrom flwr.clientapp import ClientApp\napp = ClientApp()\n"
PROJECT = """
[project]
name = "pathfed"
version = "1.0.0"
dependencies = ["evil @ file://{wheel}"]
[tool.flwr.app]
publisher = "evil"
[tool.flwr.app.components]
serverapp = "evil_server:app"
clientapp = "{client}:app"
"""


def hostile_bundle(folder: Path, kind: str, client: str) -> bytes:
    """A bundle with a server app, and client code under the name of the module that the site has installed."""
    files = {
        "pyproject.toml": PROJECT.format(wheel=folder / "evil-1.0-py3-none-any.whl", client=client),
        "evil_server.py": SERVER_APP.format(kind=kind, heard=str(folder / "heard")),
        "evil_client.py": MARKING.format(mark=str(folder / "ran-evil-client")),
        "pathfed_client/__init__.py": MARKING.format(mark=str(folder / "ran-pathfed-client")),
        "pathfed_client/app.py": MARKING.format(mark=str(folder / "ran-app")),
        "sitecustomize.py": MARKING.format(mark=str(folder / "ran-sitecustomize")),
    }
    listed = [f"{name},{hashlib.sha256(text.encode()).hexdigest()},{len(text) * 8}" for name, text in files.items()]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, text in {**files, ".info/CONTENT": "\n".join(listed)}.items():
            archive.writestr(name, text)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def site(tmp_path_factory, hospitals, wait_for, processes_of) -> Iterator[Consortium]:
    """A server and one enrolled, running site."""
    folder = tmp_path_factory.mktemp("malicious")
    made = Consortium(folder / "out", find_hospitals(hospitals, 1))
    try:
        made.server_command("init")
        made.start_server()
        (one,) = made.hospitals
        made.enrol({one.name: ["--slides", one.slides, "--patients", one.patients]})
        made.start_sites()
        yield made
    finally:
        made.stop()
    assert not wait_for(lambda: processes_of(folder), until=lambda found: not found, within_s=60)


@pytest.mark.parametrize("client", ["evil_client", "pathfed_client.app"])
def test_no_code_that_a_server_sends_runs_at_a_site(site: Consortium, tmp_path, wait_for, client: str) -> None:
    data, before = hostile_bundle(tmp_path, wire.MESSAGE_TYPE, client), _refusals(site)
    port = json.loads((site.server / "ports.json").read_text())["superlink"]
    with FlowerControl(f"127.0.0.1:{port}", ServerHome(site.server).ca_file) as control:
        fab = Fab(hashlib.sha256(data).hexdigest(), data, {})
        answer = control._client.StartRun(StartRunRequest(fab=fab_to_proto(fab), override_config={}, federation=""))
        assert answer.HasField("run_id"), answer
        heard = tmp_path / "heard"
        assert wait_for(heard.exists, until=bool, within_s=_WITHIN_S), control.run_status(answer.run_id)
    assert heard.read_text() == "PF404", "the message came, and was refused by the runner itself"
    assert sorted(path.name for path in tmp_path.glob("ran-*")) == []
    assert _refusals(site) == before + 1, "that it refused is in the record of what left"
    logs = site.site(site.hospitals[0].name).glob("logs/*.log")
    assert "".join(path.read_text() for path in logs).count("refused a bundle") == before + 1


def _refusals(site: Consortium) -> int:
    """Refusals in the site's record of what left it."""
    messages = site.site_command(site.hospitals[0].name, "egress")["messages"]
    return int(messages["refusal"]["messages"]) if "refusal" in messages else 0
