"""The control plane as the process that `pathfed-server start` runs."""

import signal
import subprocess
import sys

import grpc
import pytest
from control_peer import Peer, enroll

from pathfed_common.ids import SiteName
from pathfed_common.processes import Supervisor
from pathfed_common.protocol import control_pb2 as pb
from pathfed_server import members
from pathfed_server.control import control_process


def test_the_process_serves_when_it_is_ready_and_ends_when_it_is_told(server_home, refused):
    supervisor = Supervisor()
    try:
        supervisor.start(control_process(server_home))
        invitation = members.invite(server_home.root, SiteName("north"), hours=1).text
        assert enroll(server_home, Peer.make("north").request(invitation)).state == pb.EnrollReply.State.PENDING
        with refused("PF412"):
            enroll(server_home, Peer.make("north").request(invitation))
    finally:
        supervisor.stop()
    with pytest.raises(grpc.RpcError) as caught:
        enroll(server_home, Peer.make("north").request(invitation))
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    log = (server_home.logs / "control.log").read_text()
    assert "PF412" in log
    assert "Traceback" not in log


@pytest.mark.parametrize(
    ("missing", "code"), [("keys/ca.key", "PF906"), ("keys/tls.key", "PF906"), ("ca.pem", "PF904"), ("pathfed.db", "PF512")]
)
def test_a_home_with_a_part_missing_ends_the_process_with_its_code(server_home, missing, code):
    (server_home.root / missing).unlink()
    argv = [sys.executable, "-m", "pathfed_server.control", "--home", str(server_home.root)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode not in (0, 1, -signal.SIGTERM)
    assert code in done.stderr
    assert "Traceback" not in done.stderr
