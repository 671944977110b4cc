import io
import stat

import pytest

from pathfed_common import key_files
from pathfed_common.errors import HostError
from pathfed_common.provenance.keys import SigningKey

KEY = SigningKey.generate()


@pytest.fixture
def words(tmp_path):
    path = tmp_path / "passphrase"
    path.write_text("correct horse\nsecond line")
    return str(path)


def test_a_key_is_written_under_its_passphrase_for_its_owner_and_opens_with_it(tmp_path, words):
    path = tmp_path / "anna.pem"
    key_files.write_key(path, KEY, words)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert b"ENCRYPTED" in path.read_bytes()
    assert key_files.open_key(path, words).public == KEY.public
    (tmp_path / "other").write_text("wrong horse")
    with pytest.raises(HostError, match=r"PF906.*anna.pem"):
        key_files.open_key(path, str(tmp_path / "other"))
    with pytest.raises(HostError, match="PF904"):
        key_files.write_key(path, KEY, words)


def test_a_passphrase_may_come_from_standard_input(tmp_path, words, monkeypatch):
    path = tmp_path / "anna.pem"
    for call in (lambda: key_files.write_key(path, KEY, "-"), lambda: key_files.open_key(path, "-")):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"correct horse\r\n")))
        call()
    assert key_files.open_key(path, words).public == KEY.public


def test_a_key_of_its_owners_own_may_be_without_a_passphrase(tmp_path):
    path = tmp_path / "anna.pem"
    path.write_bytes(KEY.to_pem())
    path.chmod(0o600)
    assert key_files.open_key(path, None).public == KEY.public
    path.chmod(0o640)
    with pytest.raises(HostError, match="PF906"):
        key_files.open_key(path, None)


def test_without_a_terminal_nobody_is_asked(tmp_path, words, monkeypatch):
    key_files.write_key(tmp_path / "anna.pem", KEY, words)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"")))
    with pytest.raises(HostError, match=r"PF906.*--passphrase-from"):
        key_files.open_key(tmp_path / "anna.pem", None)
    with pytest.raises(HostError, match="PF906"):
        key_files.write_key(tmp_path / "new.pem", KEY, None)
    assert not (tmp_path / "new.pem").exists()


def test_a_short_passphrase_and_a_missing_one_write_nothing(tmp_path):
    (tmp_path / "short").write_text("horse\n")
    with pytest.raises(HostError, match=r"PF906.*at least 8"):
        key_files.write_key(tmp_path / "new.pem", KEY, str(tmp_path / "short"))
    with pytest.raises(HostError, match="PF904"):
        key_files.write_key(tmp_path / "new.pem", KEY, str(tmp_path / "none"))
    assert not (tmp_path / "new.pem").exists()
