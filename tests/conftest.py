"""What holds for every test: one process a file, end-to-end tests first and never beside each other, one thread each, fixed examples."""

import os
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# Read by torch and BLAS when they are first imported. Two test processes share two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# The same examples in every run, here and in CI, and no limit of time an example: a loaded machine must not decide whether a property
# holds. Look for new examples with `make test T=--hypothesis-profile=search`.
settings.register_profile("pathfed", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("search", deadline=None, max_examples=1000, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("pathfed")

#: Folders whose tests start a whole consortium: all of them go to one test process, one after the other, so that two consortia never
#: run beside each other. They wait more than they compute, so the other process has the files below them meanwhile; they are handed out
#: first, because the longest unit of work decides how long the suite takes.
CONSORTIA = ("end_to_end", "chaos")


def unit_of_work(nodeid: str) -> str:
    """What one test process does in one go: a file, whose servers then start once, or all tests of `CONSORTIA`."""
    file = nodeid.split("::", 1)[0]
    return "consortia" if any(folder in file.split("/") for folder in CONSORTIA) else file


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests that start a consortium first."""
    items.sort(key=lambda item: unit_of_work(item.nodeid) != "consortia")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Hand out tests by `unit_of_work`. (xdist 3.8 has groups for this, which pytest 9.2 does not see.)"""
    from xdist.scheduler.loadscope import LoadScopeScheduling

    class ByUnitOfWork(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return unit_of_work(nodeid)

    return ByUnitOfWork(config, log)
