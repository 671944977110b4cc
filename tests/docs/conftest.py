"""Reads the documentation and the generator of its reference pages."""

import re
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def generate() -> ModuleType:
    """docs/generate.py as a module."""
    spec = spec_from_file_location("docs_generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def written_pages() -> dict[Path, str]:
    """Every page written by hand, with its text: the docs but for generated ones, and the root's."""
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    texts = {page: page.read_text(encoding="utf-8") for page in pages}
    return {page: text for page, text in texts.items() if not text.startswith("<!-- Made by docs/generate.py")}


@pytest.fixture(scope="session")
def shell_lines(written_pages: dict[Path, str]) -> list[tuple[str, str]]:
    """Every command line of ours in the pages' code blocks, continued lines joined: (page, line)."""
    found = []
    for page, text in written_pages.items():
        for block in re.findall(r"```(?:sh|bash|console)\n(.*?)```", text, flags=re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                found.append((str(page.relative_to(ROOT)), line.strip().removeprefix("$ ")))
    return found
