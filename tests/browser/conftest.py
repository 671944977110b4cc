"""One Chromium for all browser tests, and reports to open in it."""

from collections.abc import Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
from browser_fixtures import chromium
from playwright.sync_api import Browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Closed when its file is done: Playwright bears no second one in the same process, and end-to-end tests open theirs."""
    with chromium() as running:
        yield running


@pytest.fixture(scope="session")
def build_report():
    """The report builder of tests/server/report."""
    place = Path(__file__).parent.parent / "server" / "report" / "conftest.py"
    spec = spec_from_file_location("report_example", place)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.build
