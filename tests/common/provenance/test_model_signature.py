"""Model signatures: those of the OpenSSF's own tool and ours are read by each other's verifier, and nothing else passes."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from pathfed_common import digest
from pathfed_common.errors import ErrorCode, HostError, ProvenanceError
from pathfed_common.provenance.keys import SigningKey
from pathfed_common.provenance.model_signature import ModelKey, SignedModel, open_model_signature, sign_model

FILES = {"model.safetensors": b"weights", "config.json": b"{}", "README.md": b"# card"}
MODEL = SignedModel("run-1", {name: digest.of_bytes(data) for name, data in FILES.items()})


@pytest.fixture(scope="module")
def key() -> ModelKey:
    return ModelKey.generate()


def _openssf(folder: Path, key: ModelKey, signature: bytes) -> subprocess.CompletedProcess[str]:
    """What the OpenSSF's tool says, with no network: every address is one that refuses."""
    (folder / "model.sig").write_bytes(signature)
    (folder / "key.pem").write_bytes(key.public_pem)
    arguments = [
        "verify",
        "key",
        str(folder / "encoder"),
        "--signature",
        str(folder / "model.sig"),
        "--public_key",
        str(folder / "key.pem"),
    ]
    blocked = {"HTTPS_PROXY": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9", "NO_PROXY": ""}
    command = [sys.executable, "-m", "model_signing", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, env={**os.environ, **blocked})


def test_the_openssf_tool_verifies_what_we_sign_and_refuses_a_changed_file(key: ModelKey, tmp_path: Path) -> None:
    (tmp_path / "encoder").mkdir()
    for name, data in FILES.items():
        (tmp_path / "encoder" / name).write_bytes(data)
    signature = sign_model(MODEL, key)
    good = _openssf(tmp_path, key, signature)
    assert good.returncode == 0, good.stderr
    (tmp_path / "encoder" / "model.safetensors").write_bytes(b"other weights")
    assert _openssf(tmp_path, key, signature).returncode != 0


def test_a_signature_is_the_same_each_time_and_read_back(key: ModelKey) -> None:
    data = sign_model(MODEL, key)
    assert sign_model(MODEL, ModelKey.from_pem(key.to_pem())) == data
    assert open_model_signature(data, key.public_pem) == MODEL


def _refused(data: bytes, pem: bytes) -> None:
    with pytest.raises(ProvenanceError) as caught:
        open_model_signature(data, pem)
    assert caught.value.code is ErrorCode.MODEL_SIGNATURE


def test_another_key_or_a_changed_byte_is_refused(key: ModelKey) -> None:
    data = sign_model(MODEL, key)
    _refused(data, ModelKey.generate().public_pem)
    _refused(data, key.public_pem + b"\n")
    _refused(data, b"")
    for place in range(0, len(data), 7):
        _refused(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :], key.public_pem)
    _refused(json.dumps(json.loads(data)).encode(), key.public_pem)


def test_a_model_key_shows_nothing_and_is_read_strictly(key: ModelKey) -> None:
    assert "hidden" in repr(key)
    with pytest.raises(TypeError):
        pickle.dumps(key)
    for pem in (b"", SigningKey.generate().to_pem(), key.public_pem):
        with pytest.raises(HostError) as caught:
            ModelKey.from_pem(pem)
        assert caught.value.code is ErrorCode.KEY_FILE
