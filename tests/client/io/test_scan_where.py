import os
import sys
from pathlib import Path

import pytest

from pathfed_client.io.scan_where import ScanWhere, make_executor
from pathfed_client.io.scan_workers import ProcessExecutor
from pathfed_common.errors import HostError


def test_a_scan_reads_with_the_cpus_it_may_use_unless_told_otherwise():
    with make_executor(ScanWhere()) as all_cpus, make_executor(ScanWhere(workers=7)) as seven:
        assert isinstance(all_cpus, ProcessExecutor)
        assert (all_cpus.slots, seven.slots) == (len(os.sched_getaffinity(0)), 7)


def test_without_dask_a_scheduler_is_refused_with_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    monkeypatch.delitem(sys.modules, "pathfed_client.io.scan_dask", raising=False)
    with pytest.raises(HostError, match=r"PF907.*distributed.*client,dask"):
        make_executor(ScanWhere(scheduler="127.0.0.1:8786"))


@pytest.mark.parametrize("given", [{"scheduler_ca": Path("a")}, {"scheduler_ca": Path("a"), "scheduler_key": Path("b")}])
def test_tls_takes_all_of_its_files(given):
    with pytest.raises(HostError, match=r"PF905.*all three"):
        make_executor(ScanWhere(scheduler="127.0.0.1:8786", **given))
