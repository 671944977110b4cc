"""`pathfed verify` without a record. What it finds in one is in tests/common/provenance and tests/end_to_end."""

import json
from typing import Any

import pytest

from pathfed_common.errors import ErrorCode, HostError, ProvenanceError
from pathfed_common.provenance.keys import SigningKey
from pathfed_common.provenance.record import MANIFEST
from pathfed_common.provenance.verify import Verdict
from pathfed_local import cli
from pathfed_local.verifying import find_record, summary, trusted_keys


@pytest.mark.parametrize("place", ["", "record"])
def test_the_record_is_found_in_a_run_and_in_a_demo(tmp_path, place):
    (tmp_path / place).mkdir(exist_ok=True)
    (tmp_path / place / MANIFEST).write_text("")
    assert find_record(tmp_path) == tmp_path / place


def test_a_folder_without_a_record_is_told(tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(ProvenanceError) as caught:
            find_record(folder)
        assert caught.value.code is ErrorCode.RECORD_INCOMPLETE


def test_trusted_keys_are_read_strictly(tmp_path):
    assert trusted_keys(None) is None
    file = tmp_path / "trust.json"
    key = SigningKey.generate().public
    file.write_text(json.dumps({"server": key.to_text(), "sites": {"site-a": key.to_text()}}))
    trusted = trusted_keys(file)
    assert trusted is not None
    assert trusted.server == key
    for text in ("[]", "not json", json.dumps({"server": "ed25519:AA==", "sites": {}})):
        file.write_text(text)
        with pytest.raises(ProvenanceError, match="PF604"):
            trusted_keys(file)
    with pytest.raises(HostError, match="PF904"):
        trusted_keys(tmp_path / "none.json")
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(HostError, match="PF904"):
        trusted_keys(file)


@pytest.mark.parametrize("arguments", [("NOTHING",), ("NOTHING", "--json")])
def test_the_command_says_that_there_is_no_record_and_ends_with_its_familys_status(tmp_path, monkeypatch, capsys, arguments):
    monkeypatch.setattr("sys.argv", ["pathfed", "verify", *(str(tmp_path) if word == "NOTHING" else word for word in arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 16
    told = capsys.readouterr()
    if "--json" in arguments:
        assert json.loads(told.out)["error"]["code"] == "PF605"
    else:
        assert "PF605" in told.err


def test_a_summary_is_a_json_value():
    fields: dict[str, Any] = dict.fromkeys(Verdict.__dataclass_fields__)
    fields.update(sites=(), notes=(), findings=())
    verdict = Verdict(**fields)
    assert json.loads(json.dumps(summary(verdict)))["sites"] == {}
