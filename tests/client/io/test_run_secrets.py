"""Run secrets: the same until advanced, gone afterwards, and safe at every crash."""

from pathlib import Path

import pytest

from pathfed_client.io import run_secrets as module
from pathfed_client.io.run_secrets import RunSecrets, secret_id
from pathfed_common import files
from pathfed_common.errors import ErrorCode, HostError, TransportError
from pathfed_common.ids import run_name

ROOT = bytes(range(32))
A, B = run_name("run-a"), run_name("run-b")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "secrets"


@pytest.fixture
def chain(folder: Path) -> RunSecrets:
    return RunSecrets.create(folder, root=ROOT)


def everything(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.iterdir())


def on_disk(secret: bytes, folder: Path) -> bool:
    return secret in everything(folder) or secret.hex().encode() in everything(folder)


def test_a_rounds_secret_is_the_same_until_it_is_advanced(chain: RunSecrets, folder: Path) -> None:
    first = chain.current(A, 1)
    assert chain.current(A, 1) == first == RunSecrets(folder).current(A, 1)
    chain.advance(A, 1)
    assert chain.current(A, 2) != first


def test_a_past_round_is_refused(chain: RunSecrets) -> None:
    chain.current(A, 1)
    chain.advance(A, 1)
    with pytest.raises(TransportError, match="round 1, the chain is at 2") as caught:
        chain.current(A, 1)
    assert caught.value.code is ErrorCode.ROUND_OUT_OF_ORDER


def test_an_advanced_secret_is_nowhere_on_the_disk_and_follows_from_nothing_there(chain: RunSecrets, folder: Path) -> None:
    secret = chain.current(A, 1)
    assert on_disk(secret, folder)
    assert not on_disk(ROOT, folder)  # the root moved on with the fork, so it cannot make the run's first secret again
    chain.advance(A, 1)
    assert not on_disk(secret, folder)


def test_the_old_files_blocks_are_overwritten(chain: RunSecrets, folder: Path) -> None:
    chain.current(A, 1)
    path = folder / "run-run-a.secret"
    with path.open("rb") as old:  # still open: shows the blocks of the file that is replaced
        before = old.read()
        chain.advance(A, 1)
        old.seek(0)
        assert old.read() == bytes(len(before))


def test_runs_and_rounds_have_different_secrets(chain: RunSecrets) -> None:
    secrets = [chain.current(A, 1), chain.current(B, 1), chain.current(A, 2), chain.current(B, 2)]
    assert len(set(secrets)) == 4
    assert all(len(secret) == 32 for secret in secrets)


def test_rounds_that_were_missed_are_passed_over_and_past(chain: RunSecrets, tmp_path: Path) -> None:
    chain.current(A, 1)
    later = chain.current(A, 4)
    with pytest.raises(TransportError):
        chain.current(A, 3)
    other = RunSecrets.create(tmp_path / "other", root=ROOT)
    for index in (1, 2, 3):
        other.current(A, index)
        other.advance(A, index)
    assert other.current(A, 4) == later


def test_advancing_again_or_for_a_past_round_is_harmless(chain: RunSecrets) -> None:
    chain.current(A, 1)
    chain.advance(A, 1)
    second = chain.current(A, 2)
    chain.advance(A, 1)
    assert chain.current(A, 2) == second


def test_a_sealed_rounds_secret_is_erased_where_a_crash_came_before_that(chain: RunSecrets, folder: Path) -> None:
    secret = chain.current(A, 1)
    after = RunSecrets(folder)
    after.settle(A, 1)
    assert not on_disk(secret, folder)
    second = after.current(A, 2)
    after.settle(A, 1)
    assert after.current(A, 2) == second
    after.settle(B, 7)
    assert sorted(path.name for path in folder.iterdir()) == ["root.secret", "run-run-a.secret"]


def test_a_fixed_root_gives_fixed_secrets_and_a_random_one_does_not(chain: RunSecrets, tmp_path: Path) -> None:
    assert RunSecrets.create(tmp_path / "b", root=ROOT).current(A, 1) == chain.current(A, 1)
    assert RunSecrets.create(tmp_path / "c").current(A, 1) != RunSecrets.create(tmp_path / "d").current(A, 1)


def test_files_are_readable_by_their_owner_only(chain: RunSecrets, folder: Path) -> None:
    chain.current(A, 1)
    chain.advance(A, 1)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}
    (folder / "run-run-a.secret").chmod(0o644)
    with pytest.raises(HostError) as caught:
        chain.current(A, 2)
    assert caught.value.code is ErrorCode.KEY_FILE


@pytest.mark.parametrize("write", [1, 2], ids=["before the run's file", "before the root moves on"])
def test_a_crash_inside_a_fork_changes_no_secret_and_leaves_no_root(
    write: int, chain: RunSecrets, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = files.write_atomic, []

    def crash(path, data, *, secret):
        calls.append(path)
        if len(calls) == write:
            raise KeyboardInterrupt
        original(path, data, secret=secret)

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_atomic", crash)
        with pytest.raises(KeyboardInterrupt):
            chain.current(A, 1)
    after, undisturbed = RunSecrets(folder), RunSecrets.create(tmp_path / "undisturbed", root=ROOT)
    assert after.current(A, 1) == after.current(A, 1) == undisturbed.current(A, 1)
    assert not on_disk(ROOT, folder)
    assert after.current(B, 1) == undisturbed.current(B, 1)


def test_a_crash_before_an_advance_keeps_the_secret_and_one_after_has_advanced(
    chain: RunSecrets, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = chain.current(A, 1)

    def crash(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_atomic", crash)
        with pytest.raises(KeyboardInterrupt):
            chain.advance(A, 1)
    assert RunSecrets(folder).current(A, 1) == secret
    with monkeypatch.context() as patch:
        patch.setattr(module, "_overwrite", crash)
        with pytest.raises(KeyboardInterrupt):
            chain.advance(A, 1)
    with pytest.raises(TransportError):
        RunSecrets(folder).current(A, 1)


def test_a_crash_between_replacing_and_overwriting_leaves_no_old_secret_once_the_folder_is_opened(
    chain: RunSecrets, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder / "run-run-a.secret"
    chain.current(A, 1)
    before = path.read_bytes()

    def crash(*args, **kwargs):
        raise KeyboardInterrupt

    with path.open("rb") as old:
        with monkeypatch.context() as patch:
            patch.setattr(module, "_overwrite", crash)
            with pytest.raises(KeyboardInterrupt):
                chain.advance(A, 1)
        assert old.read() == before
        RunSecrets(folder)
        old.seek(0)
        assert old.read() == bytes(len(before))
    assert sorted(each.name for each in folder.iterdir()) == ["root.secret", "run-run-a.secret"]


def test_a_crash_before_the_replacement_does_not_overwrite_the_secret_that_counts(
    chain: RunSecrets, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has two names then."""
    secret = chain.current(A, 1)

    def crash(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_atomic", crash)
        with pytest.raises(KeyboardInterrupt):
            chain.advance(A, 1)
    assert len(list(folder.iterdir())) == 3
    assert RunSecrets(folder).current(A, 1) == secret
    assert sorted(each.name for each in folder.iterdir()) == ["root.secret", "run-run-a.secret"]


def test_what_a_crash_left_half_written_is_erased(chain: RunSecrets, folder: Path) -> None:
    part = folder / ".run-run-a.secret.123.part"
    part.write_bytes(b"half a secret")
    with part.open("rb") as old:
        RunSecrets(folder)
        assert not part.exists()
        assert old.read() == bytes(13)


def test_names_of_secrets_tell_them_apart_and_are_not_them(chain: RunSecrets) -> None:
    first, second = chain.current(A, 1), chain.current(B, 1)
    assert secret_id(first) == secret_id(first) != secret_id(second)
    assert first.hex() not in secret_id(first)


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[]", b'{"round":0,"run":"run-a","secret":""}', b'{"round":1,"run":"run-b","secret":"%s"}' % (b"00" * 32)]
)
def test_a_damaged_file_is_refused_without_showing_it(content: bytes, chain: RunSecrets, folder: Path) -> None:
    chain.current(A, 1)
    (folder / "run-run-a.secret").write_bytes(content)
    with pytest.raises(HostError, match="not the secret of this run") as caught:
        chain.current(A, 1)
    assert "00000000" not in str(caught.value)


def test_a_missing_or_short_root_is_refused(chain: RunSecrets, folder: Path) -> None:
    (folder / "root.secret").write_bytes(b"short")
    with pytest.raises(HostError, match="not 32 bytes"):
        chain.current(A, 1)
    (folder / "root.secret").unlink()
    with pytest.raises(HostError) as caught:
        chain.current(A, 1)
    assert caught.value.code is ErrorCode.KEY_FILE


def test_a_second_root_in_one_folder_is_refused(chain: RunSecrets, folder: Path) -> None:
    with pytest.raises(HostError, match="holds a root secret already"):
        RunSecrets.create(folder)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(HostError):
        RunSecrets.create(tmp_path / "file")


def test_misuse_is_refused(chain: RunSecrets, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        chain.current(A, 0)
    with pytest.raises(ValueError, match="no chain"):
        chain.advance(A, 1)
    with pytest.raises(ValueError, match="a run name is"):
        chain.current("../evil", 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="root must be 32 bytes"):
        RunSecrets.create(tmp_path / "x", root=b"short")


def test_repr_shows_the_place_and_no_secret(chain: RunSecrets, folder: Path) -> None:
    secret = chain.current(A, 1)
    assert repr(chain) == f"RunSecrets({str(folder)!r})"
    assert secret.hex() not in repr(module._Link(1, secret))
