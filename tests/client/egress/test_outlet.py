"""No entry, no byte."""

from pathlib import Path

import pytest

from pathfed_client.egress.entry import EgressKind
from pathfed_client.egress.outlet import Outlet
from pathfed_client.io.egress_log import EgressLog
from pathfed_common import digest
from pathfed_common.errors import HostError


def test_a_message_is_on_the_disk_before_it_may_leave(tmp_path: Path):
    EgressLog.create(tmp_path / "egress.db")
    with EgressLog(tmp_path / "egress.db", now=lambda: 12.5) as record, EgressLog(tmp_path / "egress.db") as reader:
        plan = digest.of_bytes(b"plan")
        Outlet(record).message("server.example:9094", EgressKind.DECISION, b"signed word", plan=plan)
        (entry,) = reader.entries()
    assert (entry.at, entry.sent.destination, entry.sent.kind) == (12.5, "server.example:9094", EgressKind.DECISION)
    assert (entry.sent.size, entry.sent.digest, entry.sent.plan) == (11, digest.of_bytes(b"signed word"), plan)
    assert entry.sent.epsilon_charged is None


def test_a_message_that_cannot_be_written_down_must_not_leave(tmp_path: Path):
    EgressLog.create(tmp_path / "egress.db")
    record = EgressLog(tmp_path / "egress.db")
    record.close()
    with pytest.raises(HostError, match="PF904"):
        Outlet(record).message("server.example:9094", EgressKind.REPORT, b"state")
