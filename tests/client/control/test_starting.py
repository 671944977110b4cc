"""`pathfed-site start` of an enrolled home: the agent is up before anything answers, speaks through the relay, and its alarms are told."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

from real_control import serving_in

from pathfed_client.egress.entry import EgressKind
from pathfed_client.io.server_records import Alarm
from pathfed_common.errors import ErrorCode


def until(seen, process: subprocess.Popen[bytes]) -> None:
    last = time.monotonic() + 120
    while not seen():
        assert process.poll() is None, "it ended by itself"
        assert time.monotonic() < last
        time.sleep(0.2)


def test_an_enrolled_site_starts_its_agent_and_tells_its_alarms(tmp_path):
    with serving_in(tmp_path / "server") as server:
        site = server.enrolled(tmp_path / "site", "site")
        log = tmp_path / "start.log"
        program = Path(sys.executable).with_name("pathfed-site")
        with log.open("wb") as out:
            process = subprocess.Popen([program, "start", "--home", site.home.root, "--json"], stdout=out, stderr=out)
            try:
                until(lambda: site.home.log_head.read() is not None, process)
                until(lambda: site.store.facts().get("agent_code") == "", process)  # the head is kept before the pass is over
                plan = server.publish(tmp_path, "one")
                site.approve(plan)
                until(lambda: server.approved(plan) == {"site"}, process)
                until(lambda: site.store.received_plan(plan.digest) is not None, process)
                site.store.raise_alarm(Alarm(at=1.0, code=ErrorCode.LOG_FORKED, subject="7", detail="planted"))
                until(lambda: "ALARM PF434" in log.read_text(), process)
            finally:
                process.send_signal(signal.SIGTERM)
                process.wait(60)
        kinds = [entry.sent.kind for entry in site.record.entries()]
        first = kinds.index(EgressKind.CONNECTION_OPENED)
        assert {EgressKind.REPORT, EgressKind.DECISION, EgressKind.COSIGNATURE} <= set(kinds[first:])
        assert "Traceback" not in log.read_text() + (site.home.logs / "agent.log").read_text()
        told = [json.loads(line)["event"] for line in log.read_text().splitlines() if line.startswith('{"at"')]
        assert sum("ALARM PF434" in line for line in told) == 1
        site.close()
