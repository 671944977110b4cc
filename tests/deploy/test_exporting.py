"""Exports of a verified release: read by other people's libraries, and never made of a bundle that does not verify."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from prov.model import ProvDocument
from record_fixtures import Scene, small_plan, small_preset, write_files
from release_fixtures import Files, ReleaseScene

from pathfed_common import digest
from pathfed_common.provenance import release
from pathfed_local import cli


@pytest.fixture(scope="module")
def files() -> Iterator[Files]:
    with small_preset():
        yield ReleaseScene(Scene(small_plan())).files(evaluation=b'{"kNN": 0.9}')


@pytest.fixture
def export(run_main: Any) -> Any:
    return lambda *arguments: run_main(cli.main, "pathfed", "export", *arguments, "--json")


@pytest.fixture
def exported(files: Files, tmp_path: Path, export: Any) -> dict[str, bytes]:
    folder = write_files(tmp_path / "bundle", files)
    done = export(folder, "--prov", tmp_path / "prov.json", "--ml-bom", tmp_path / "bom.json")
    assert done.status == 0, done.err
    return {name: (tmp_path / f"{name}.json").read_bytes() for name in ("prov", "bom")}


def test_the_lineage_is_prov_that_its_library_reads(exported: dict[str, bytes], files: Files) -> None:
    raw = json.loads(exported["prov"])
    document = ProvDocument.deserialize(content=exported["prov"].decode(), format="json")
    assert len(list(document.get_records())) == sum(len(group) for name, group in raw.items() if name != "prefix")
    entities = raw["entity"]
    updates = {name: entity for name, entity in entities.items() if name.startswith("pf:update-")}
    assert len(updates) == 8
    encoder = json.loads(files[release.CARD])["encoder"]
    assert entities["pf:encoder"]["pf:digest"] == encoder
    assert entities["pf:encoder"]["pf:release"] == digest.of_bytes(files[release.RELEASE])
    derived = {(link["prov:generatedEntity"], link["prov:usedEntity"]) for link in raw["wasDerivedFrom"].values()}
    assert ("pf:encoder", "pf:state-0003") in derived
    assert all((f"pf:state-{index:04d}", f"pf:state-{index - 1:04d}") in derived for index in (1, 2, 3))
    for link in (*raw["used"].values(), *raw["wasDerivedFrom"].values(), *raw["wasAttributedTo"].values()):
        assert {value for name, value in link.items() if name not in ("prov:agent", "prov:activity")} <= entities.keys()


def test_the_bill_of_materials_keeps_the_cyclonedx_schema(exported: dict[str, bytes], files: Files) -> None:
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(exported["bom"].decode()) is None
    component = json.loads(exported["bom"])["metadata"]["component"]
    assert component["type"] == "machine-learning-model"
    assert component["hashes"][0]["content"] == json.loads(files[release.CARD])["encoder"].removeprefix("sha256:")
    assert component["modelCard"]["quantitativeAnalysis"]["performanceMetrics"] == [{"type": "kNN", "value": "0.9"}]


def test_sites_that_did_not_agree_are_named_in_no_export(exported: dict[str, bytes]) -> None:
    for data in exported.values():
        assert b"site 1, not named" in data
        assert b"/a.dsse" not in data
        assert b"/a.safetensors" not in data


def test_a_bundle_that_does_not_verify_is_not_exported(files: Files, tmp_path: Path, export: Any) -> None:
    folder = write_files(tmp_path / "bundle", {**files, "extra": b""})
    assert export(folder, "--prov", tmp_path / "prov.json").code == "PF616"
    assert export(tmp_path / "nothing", "--prov", tmp_path / "prov.json").code == "PF615"
    assert export(folder).code == "PF905"
    assert not (tmp_path / "prov.json").exists()
