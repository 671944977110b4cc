import sys

import pytest

from pathfed_common.code_digest import code_digest


@pytest.fixture
def package(tmp_path, monkeypatch):
    root = tmp_path / "planted_package"
    (root / "inner").mkdir(parents=True)
    (root / "__init__.py").write_text("")
    (root / "inner" / "a.py").write_text("x = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield root
    code_digest.cache_clear()
    sys.modules.pop("planted_package", None)


def found(*packages: str) -> str:
    code_digest.cache_clear()
    return code_digest(packages or ("planted_package",))


def test_any_change_of_a_source_file_changes_the_digest(package):
    seen = {found()}
    changes = [
        lambda: (package / "inner" / "a.py").write_text("x = 2\n"),
        lambda: (package / "inner" / "a.py").rename(package / "inner" / "b.py"),
        lambda: (package / "plan.toml").write_text("a = 1\n"),
        lambda: (package / "plan.toml").unlink() or (package / "inner" / "b.py").write_text(""),
    ]
    for change in changes:
        change()
        assert found() not in seen
        seen.add(found())


def test_compiled_files_do_not_count(package):
    before = found()
    (package / "__pycache__").mkdir()
    (package / "__pycache__" / "a.pyc").write_bytes(b"x")
    assert found() == before


def test_the_order_of_packages_does_not_matter(package):
    assert found("planted_package", "pathfed_common") == found("pathfed_common", "planted_package") != found()


def test_a_package_that_is_not_installed_is_a_bug_of_ours():
    with pytest.raises(ValueError, match="not installed"):
        found("no_such_package_here")
