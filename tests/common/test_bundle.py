import hashlib
import importlib
import io
import tomllib
import zipfile

from pathfed_common.bundle import bundle_bytes, bundle_hash


def test_the_bundle_holds_one_toml_file_and_its_list_of_contents():
    with zipfile.ZipFile(io.BytesIO(bundle_bytes())) as archive:
        assert archive.namelist() == ["pyproject.toml", ".info/CONTENT"]
        text = archive.read("pyproject.toml")
        name, sha256, bits = archive.read(".info/CONTENT").decode().split(",")
    assert (name, sha256, int(bits)) == ("pyproject.toml", hashlib.sha256(text).hexdigest(), len(text) * 8)
    assert tomllib.loads(text.decode())["project"]["dependencies"] == []


def test_the_bundle_names_modules_that_are_installed():
    with zipfile.ZipFile(io.BytesIO(bundle_bytes())) as archive:
        components = tomllib.loads(archive.read("pyproject.toml").decode())["tool"]["flwr"]["app"]["components"]
    assert set(components) == {"serverapp", "clientapp"}
    for place in components.values():
        module, _, attribute = place.partition(":")
        assert attribute == "flower_app"
        assert hasattr(importlib.import_module(module), "__getattr__")


def test_the_hash_is_that_of_the_bytes_and_does_not_depend_on_the_clock():
    first = bundle_bytes()
    assert bundle_hash() == hashlib.sha256(first).hexdigest()
    assert bundle_bytes() == first
    with zipfile.ZipFile(io.BytesIO(first)) as archive:
        assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
