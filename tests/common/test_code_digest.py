import base64
import hashlib
import shutil
import subprocess
import sys

import pytest

from pathfed_common.code_digest import code_digest, module_command, verify_installation
from pathfed_common.errors import TransportError


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


@pytest.fixture
def wheel(package):
    """The package as if it had come in a wheel, with a RECORD of its files."""
    lines = [
        "planted_package/__init__.py,sha256=47DEQpj8HBSa-_TImW-5JCeuQeRkm5NMpJWZG3hSuFU,0",
        "planted_package/inner/a.py,sha256=" + sha256_of(package / "inner" / "a.py") + ",6",
        "planted_package/__pycache__/__init__.cpython-311.pyc,,",
        "planted_wheel-1.0.dist-info/RECORD,,",
    ]
    info = package.parent / "planted_wheel-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: planted-wheel\nVersion: 1.0\n")
    (info / "RECORD").write_text("\n".join(lines) + "\n")
    return lines


def sha256_of(path) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(path.read_bytes()).digest()).rstrip(b"=").decode()


def test_the_digest_is_that_of_the_wheels_record_as_sha256sum_gives_it(package, wheel):
    """As the documentation says: grep, sort, sha256sum."""
    assert verify_installation(("planted_package",), "planted-wheel")
    text = "".join(f"{line}\n" for line in sorted(wheel) if line.startswith("planted_package/") and "__pycache__" not in line)
    assert found() == "sha256:" + hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize(
    "change",
    [
        lambda root: (root / "inner" / "a.py").write_text("x = 2\n"),
        lambda root: (root / "inner" / "a.py").unlink(),
        lambda root: (root / "inner" / "more.py").write_text(""),
        lambda root: (root / "native.so").write_bytes(b"\x7fELF"),
    ],
)
def test_a_file_that_was_changed_removed_or_added_since_the_installation_is_found(package, wheel, change):
    change(package)
    with pytest.raises(TransportError, match=r"PF446.*planted_package/"):
        verify_installation(("planted_package",), "planted-wheel")


def test_a_package_that_stands_before_the_installed_one_is_found(package, wheel, tmp_path, monkeypatch):
    other = tmp_path / "elsewhere" / "planted_package"
    shutil.copytree(package, other)
    monkeypatch.syspath_prepend(other.parent)
    with pytest.raises(TransportError, match=r"PF447.*elsewhere"):
        verify_installation(("planted_package",), "planted-wheel")


def test_without_a_record_there_is_nothing_to_compare_with(package):
    assert not verify_installation(("planted_package",), "planted-wheel")
    assert not verify_installation(("planted_package",), "pathfed-that-is-not-installed")


def test_a_module_in_the_current_folder_is_not_run_in_place_of_the_installed_one(tmp_path):
    marker = tmp_path / "ran.txt"
    for name in ("pathfed_client", "pathfed_common", "torch", "flwr", "logging"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"open({str(marker)!r}, 'w').write('ran')\n")
    for module in ("pathfed_client.cli", "pathfed_common.code_digest"):
        done = subprocess.run(module_command(module), cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert not marker.exists()
    subprocess.run([sys.executable, "-m", "pathfed_common.code_digest"], cwd=tmp_path, capture_output=True, check=False)
    assert marker.exists(), "the trap works"
