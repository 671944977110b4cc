"""What the pages name must exist: files, tests, plans, make targets, links."""

import re
import tomllib

import pytest

from pathfed_common import __version__
from pathfed_common.plan import load_plan

PATHS = re.compile(
    r"`((?:common|client|server|deploy|tests|docs)/[\w./-]+|(?:Makefile|pyproject\.toml|constraints\.txt|\.ci/run))(?:::(\w+))?`"
)


def test_files_and_tests_that_the_pages_name_exist(root, written_pages):
    named = 0
    for page, text in written_pages.items():
        for path, test in PATHS.findall(text):
            named += 1
            place = root / path
            assert place.exists(), f"{page.name} names {path}"
            if test:
                assert f"def {test}(" in place.read_text(encoding="utf-8"), f"{page.name} names {path}::{test}"
    assert named > 50


def test_files_that_the_code_names_exist(root):
    named = 0
    for package in ("common", "client", "server", "deploy"):
        for source in (root / package).rglob("*.py"):
            for path in re.findall(
                r"\b(?:common|client|server|deploy|tests|docs)/[\w./-]+\.(?:py|md|toml)\b", source.read_text(encoding="utf-8")
            ):
                named += 1
                assert (root / path).exists(), f"{source.relative_to(root)} names {path}"
    assert named > 5


def test_links_lead_somewhere(root, written_pages):
    for page, text in written_pages.items():
        for link in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", text):
            assert (page.parent / link).exists(), f"{page.relative_to(root)} links to {link}"


def test_plans_in_the_pages_are_plans(written_pages):
    shown = [
        (page.name, block)
        for page, text in written_pages.items()
        for block in re.findall(r"```toml\n(.*?)```", text, flags=re.DOTALL)
        if "privacy" in tomllib.loads(block)
    ]
    assert shown
    for name, block in shown:
        load_plan(block, where=name)


def test_ready_plans_are_plans(root):
    plans = sorted((root / "deploy").rglob("*.toml"))
    plans = [plan for plan in plans if "privacy" in tomllib.loads(plan.read_text(encoding="utf-8"))]
    assert plans
    for plan in plans:
        assert load_plan(plan.read_text(encoding="utf-8"), where=plan).name


def test_make_targets_that_the_pages_name_exist(root, written_pages):
    targets = set(re.findall(r"^([a-z]+):", (root / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    for page, text in written_pages.items():
        for target in re.findall(r"(?:^|`)make ([a-z]+)", text, flags=re.MULTILINE):
            assert target in targets, f"{page.name}: make {target}"


def test_changelog_knows_this_version(root):
    assert f"## {__version__}" in (root / "CHANGELOG.md").read_text(encoding="utf-8")


def test_decisions_are_numbered_without_gaps_and_say_why(root):
    decisions = sorted((root / "docs" / "decisions").glob("[0-9]*.md"))
    assert [int(page.name[:4]) for page in decisions] == list(range(1, len(decisions) + 1))
    assert len(decisions) >= 5
    for page in decisions:
        text = page.read_text(encoding="utf-8")
        assert "\nStatus: " in text
        for heading in ("## Context", "## Decision", "## Consequences"):
            assert heading in text, f"{page.name} lacks {heading}"


def test_every_dependency_has_its_reason(root):
    page = (root / "docs" / "decisions" / "0003-dependencies.md").read_text(encoding="utf-8")
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for requirement in [*project["dependencies"], *(each for extra in project["optional-dependencies"].values() for each in extra)]:
        assert f"`{requirement}`" in page, f"0003-dependencies.md does not explain {requirement}"


@pytest.mark.parametrize("page", ["README.md", "docs/tutorial.md"])
def test_newcomer_meets_the_two_commands_first(root, page):
    text = (root / page).read_text(encoding="utf-8")
    first = re.search(r"```sh\n(.*?)```", text, flags=re.DOTALL)
    assert first is not None
    assert first.group(1).split()[:2] == ["make", "demo"]
