"""The run report in a real browser, at a desk and on a telephone."""

import pytest
from axe_core_python.sync_playwright import Axe

from pathfed_server.report.page import render

SIZES = {"desk": (1280, 900), "telephone": (400, 800)}
RUNS = {
    "whole": {},
    "long": {"rounds": 120, "sites": 12, "verdict": "consistent"},
    "failed": {"rounds": 1, "sites": 2, "state": "failed", "verdict": "failed"},
    "empty": {"rounds": 0, "state": "running", "verdict": "unchecked"},
}


@pytest.fixture
def open_report(browser, build_report, tmp_path):
    """Opens a report, collecting what it complains of and what it asks the network for."""
    contexts = []

    def opened(run="whole", size="desk", **options):
        file = tmp_path / f"{run}.html"
        file.write_text(render(build_report(**RUNS[run])), encoding="utf-8")
        width, height = SIZES[size]
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        page = context.new_page()
        page.complaints, page.requests = [], []
        page.on("console", lambda message: page.complaints.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: page.complaints.append(str(error)))
        page.on("request", lambda request: page.requests.append(request.url))
        page.goto(file.as_uri())
        return page

    yield opened
    for context in contexts:
        context.close()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("run", RUNS)
def test_page_loads_without_complaint_and_asks_the_network_for_nothing(open_report, run, size):
    page = open_report(run, size)
    assert page.complaints == []
    assert [address for address in page.requests[1:] if not address.startswith("data:")] == []


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("run", RUNS)
def test_accessibility_rules_pass(open_report, run, size):
    page = open_report(run, size, bypass_csp=True)
    page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
    found = Axe().run(page)
    assert [(each["id"], [node["html"][:120] for node in each["nodes"]]) for each in found["violations"]] == []
    assert len(found["passes"]) > 10, "axe has checked something"


def test_accessibility_check_can_fail(open_report):
    page = open_report(bypass_csp=True)
    page.evaluate("document.querySelector('.sub').style.color = '#2a5070'; document.querySelector('img').removeAttribute('alt')")
    assert {"color-contrast", "image-alt"} <= {each["id"] for each in Axe().run(page)["violations"]}


@pytest.mark.parametrize(("size", "shown"), [("desk", "wide"), ("telephone", "narrow")])
def test_each_figure_is_shown_once_in_the_width_that_fits(open_report, size, shown):
    page = open_report(size=size)
    charts = [chart for chart in page.locator("svg.chart").all() if chart.is_visible()]
    assert len(charts) == 4
    for chart in charts:
        assert shown in chart.get_attribute("class")
        box = chart.bounding_box()
        assert box["width"] > 250
        assert box["height"] > 150
    drawn = page.evaluate("[...document.querySelectorAll('img')].every(each => each.complete && each.naturalWidth === 64)")
    assert drawn


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("run", RUNS)
def test_page_fits_its_window_and_text_stays_readable(open_report, run, size):
    page = open_report(run, size)
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    smallest = page.evaluate(
        """() => {
            const zoom = svg => svg ? svg.getBoundingClientRect().width / svg.viewBox.baseVal.width : 1;
            const written = [...document.querySelectorAll('body *')]
                .filter(each => each.childElementCount === 0 && each.textContent.trim() && each.checkVisibility());
            return Math.min(...written.map(each => parseFloat(getComputedStyle(each).fontSize) * zoom(each.ownerSVGElement)));
        }"""
    )
    assert smallest >= 10.5


def test_page_says_everything_without_scripts(open_report):
    page = open_report(java_script_enabled=False)
    assert page.get_by_role("heading", level=1).inner_text().startswith("demo-2026-11-23")
    for heading in ("Rounds", "Participants", "Memory", "Plan", "Where things are"):
        assert page.get_by_role("heading", name=heading, exact=True).is_visible()
    page.locator("summary").first.click()
    assert page.locator("details table").first.is_visible()
