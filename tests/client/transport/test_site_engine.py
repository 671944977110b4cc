"""A site's processes are watched from their first moment on. What they do together is in tests/end_to_end."""

import sys
import time

from pathfed_client.transport.site_engine import SiteFiles, start_relay, start_site
from pathfed_common.processes import ProcessEnd, Supervisor


def test_a_supernode_that_ends_at_once_is_told_later_and_does_not_end_the_site(tmp_path):
    """As one does whose key the server does not know: its end is explained to people, and it is started again."""
    (tmp_path / "flower").mkdir()
    files = SiteFiles(
        relay=[sys.executable, "-c", "import time; time.sleep(600)"],
        relay_ca=tmp_path / "no-ca.pem",
        flower_key=tmp_path / "no-key",
        superexec_secret=tmp_path / "no-secret",
        flower=tmp_path / "flower",
        logs=tmp_path / "logs",
        runner=[sys.executable, "-c", "import time; time.sleep(600)"],
        threads=1,
        supernode_lock=tmp_path / "supernode.lock",
    )
    supervisor = Supervisor()
    ends: list[ProcessEnd] = []
    try:
        start_site(supervisor, files, start_relay(supervisor, files))
        assert {"relay", "runner"} <= set(supervisor.pids())
        until = time.monotonic() + 400
        while not ends and time.monotonic() < until:
            ends += supervisor.poll()
            time.sleep(0.05)
        assert [(end.name, end.restarted) for end in ends] == [("supernode", True)], (tmp_path / "logs" / "supernode.log").read_text()
        assert "runner" in supervisor.pids()
    finally:
        supervisor.stop()
