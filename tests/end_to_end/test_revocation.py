"""A site that is taken out while it runs is out on both planes: its certificate at the control port, its node at SuperLink."""

import json
from collections.abc import Iterator

import pytest
from flwr.proto.control_pb2 import ListNodesRequest

from pathfed_local.consortium import Consortium, find_hospitals
from pathfed_server.home import ServerHome
from pathfed_server.transport.flower_control import FlowerControl

pytestmark = pytest.mark.timeout(900)
_WITHIN_S = 300


@pytest.fixture
def consortium(tmp_path, hospitals, leaves_no_process) -> Iterator[Consortium]:
    """A server and two enrolled, running sites."""
    made = Consortium(tmp_path / "out", find_hospitals(hospitals, 2), restarts=20)
    try:
        made.server_command("init")
        made.start_server()
        made.enrol({one.name: ["--slides", one.slides, "--patients", one.patients] for one in made.hospitals})
        made.start_sites()
        yield made
    finally:
        made.stop()


def test_a_revoked_site_is_out_on_both_planes_and_the_other_goes_on(consortium: Consortium, wait_for) -> None:
    gone, stays = (one.name for one in consortium.hospitals)
    told: list[str] = []

    def said() -> str:
        consortium.watch(told.append)
        return "\n".join(told)

    def nodes() -> int:
        port = json.loads((consortium.server / "ports.json").read_text())["superlink"]
        with FlowerControl(f"127.0.0.1:{port}", ServerHome(consortium.server).ca_file) as control:
            return sum(node.status != "unregistered" for node in control._client.ListNodes(ListNodesRequest()).nodes_info)

    def reports() -> dict[str, str | None]:
        return {row["site"]: row["reports"] for row in consortium.server_command("sites", "list")}

    assert wait_for(reports, until=lambda found: set(found.values()) == {"running"}, within_s=_WITHIN_S)
    assert wait_for(nodes, until=lambda found: found == 2, within_s=_WITHIN_S) == 2
    consortium.server_command("sites", "revoke", gone)
    assert wait_for(nodes, until=lambda found: found == 1, within_s=_WITHIN_S) == 1
    text = wait_for(said, until=lambda text: f"{gone}: PF402" in text, within_s=_WITHIN_S)
    assert f"{gone}: PF402" in text, text

    def refused() -> str:
        return (consortium.site(gone) / "logs" / "agent.log").read_text()

    assert "PF415" in wait_for(refused, until=lambda text: "PF415" in text, within_s=_WITHIN_S)
    assert f"{stays}: PF" not in said()
    assert {row["site"]: row["state"] for row in consortium.server_command("sites", "list")} == {gone: "revoked", stays: "enrolled"}
