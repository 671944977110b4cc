import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pathfed_common import files
from pathfed_common.errors import ErrorCode, HostError


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.binary(max_size=50), max_size=5))
def test_bytes_and_streams_arrive_whole(tmp_path, chunks):
    files.write_atomic(tmp_path / "a", iter(chunks))
    files.write_atomic(tmp_path / "b", b"".join(chunks))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == b"".join(chunks)
    assert left(tmp_path) == ["a", "b"]


def test_a_stream_that_breaks_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a"
    files.write_atomic(path, b"old")

    def broken():
        yield b"new"
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        files.write_atomic(path, broken())
    assert path.read_bytes() == b"old"
    assert left(tmp_path) == ["a"]


def test_readers_see_the_old_file_or_the_new_one_and_never_a_part(tmp_path):
    path = tmp_path / "a"
    whole = [bytes([number]) * 200_000 for number in range(2)]
    files.write_atomic(path, whole[0])
    seen = {True: 0, False: 0}  # whole: how many reads
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            seen[path.read_bytes() in whole] += 1

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for number in range(20):
            files.write_atomic(path, whole[number % 2])
    finally:
        done.set()
        reader.join()
    assert seen[True]
    assert not seen[False]


def test_a_secret_is_readable_by_its_owner_alone_while_it_is_written(tmp_path):
    modes = []

    def chunks():
        yield b"secret"
        modes.extend(path.stat().st_mode & 0o777 for path in tmp_path.iterdir())

    old = os.umask(0)
    try:
        files.write_atomic(tmp_path / "key", chunks(), secret=True)
    finally:
        os.umask(old)
    assert modes == [0o600]
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
    assert files.read_secret(tmp_path / "key") == b"secret"


def test_a_full_disk_is_told_and_leaves_nothing_half_written(small_disk):
    files.write_atomic(small_disk / "old", b"x" * 400_000)
    for path in (small_disk / "new", small_disk / "old"):
        with pytest.raises(HostError) as caught:
            files.write_atomic(path, b"y" * 2_000_000)
        assert caught.value.code is ErrorCode.DISK_FULL
    assert left(small_disk) == ["old"]
    assert (small_disk / "old").read_bytes() == b"x" * 400_000
    files.write_atomic(small_disk / "new", b"y" * 400_000)  # the space is free again


def test_a_disk_that_fills_up_when_it_is_flushed_is_told(tmp_path, monkeypatch):
    """As network and quota file systems do."""

    def flush(handle: int) -> None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(os, "fsync", flush)
    with pytest.raises(HostError, match="PF901"):
        files.write_atomic(tmp_path / "a", b"x")
    assert left(tmp_path) == []


def test_a_folder_that_is_not_there_is_told(tmp_path):
    with pytest.raises(HostError, match=r"PF904.*No such file"):
        files.write_atomic(tmp_path / "none" / "a", b"x")


def test_a_process_killed_while_it_writes_leaves_no_file(tmp_path):
    script = """
import os, signal, sys
from pathlib import Path
from pathfed_common import files
def chunks():
    yield b"x" * 100_000
    os.kill(os.getpid(), signal.SIGKILL)
files.write_atomic(Path(sys.argv[1]), chunks())
"""
    ended = subprocess.run([sys.executable, "-c", script, str(tmp_path / "a")], check=False).returncode
    assert ended == -signal.SIGKILL
    assert not (tmp_path / "a").exists()


def fill(part: Path) -> None:
    (part / "inner").mkdir()
    files.write_atomic(part / "inner" / "a", b"x")


@pytest.mark.parametrize("there", [False, True])
def test_a_folder_appears_with_all_that_belongs_in_it(tmp_path, there):
    root = tmp_path / "deep" / "root"
    if there:
        root.mkdir(parents=True)
    files.create_folder(root, fill)
    assert (root / "inner" / "a").read_bytes() == b"x"
    assert root.stat().st_mode & 0o777 == 0o700
    assert left(root.parent) == ["root"]


def test_a_folder_whose_filling_fails_does_not_appear(tmp_path):
    def broken(part: Path) -> None:
        fill(part)
        raise HostError(ErrorCode.KEY_FILE, "broken")

    with pytest.raises(HostError, match="PF906"):
        files.create_folder(tmp_path / "root", broken)
    assert left(tmp_path) == []


def test_a_folder_that_fills_the_disk_does_not_appear(small_disk):
    with pytest.raises(HostError, match="PF901"):
        files.create_folder(small_disk / "root", lambda part: files.write_atomic(part / "a", b"x" * 2_000_000))
    assert left(small_disk) == []


def test_what_is_there_is_left_as_it_is(tmp_path):
    folder, file = tmp_path / "folder", tmp_path / "file"
    folder.mkdir()
    (folder / "mine").write_text("mine")
    file.write_text("mine")
    for root in (folder, file):
        with pytest.raises(HostError, match="PF904"):
            files.create_folder(root, fill)
    assert (folder / "mine").read_text() == file.read_text() == "mine"
    assert left(tmp_path) == ["file", "folder"]


def test_the_current_folder_is_not_pulled_from_under_the_reader(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for root in (Path(), Path("../") / tmp_path.name, tmp_path):
        with pytest.raises(HostError, match=r"PF904.*folder below"):
            files.create_folder(root, fill)
    assert left(tmp_path) == []
    files.create_folder(Path("below"), fill)
    assert left(tmp_path) == ["below"]


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o660, 0o601])
def test_a_key_file_that_others_may_read_is_refused(tmp_path, mode):
    path = tmp_path / "key"
    files.write_atomic(path, b"secret", secret=True)
    path.chmod(mode)
    with pytest.raises(HostError, match=r"PF906.*chmod 600") as caught:
        files.read_secret(path)
    assert caught.value.value == oct(mode)
    assert "secret" not in str(caught.value)


def test_a_missing_key_file_is_told(tmp_path):
    with pytest.raises(HostError, match=r"PF906.*No such file"):
        files.read_secret(tmp_path / "key")


def test_a_folder_is_made_with_those_above_it_each_flushed_into_its_parent(tmp_path, monkeypatch):
    flushed: list[Path] = []
    monkeypatch.setattr(files, "sync_folder", flushed.append)
    files.make_folder(tmp_path / "a" / "b" / "c", mode=0o700)
    assert flushed == [tmp_path, tmp_path / "a", tmp_path / "a" / "b"]
    assert (tmp_path / "a" / "b" / "c").stat().st_mode & 0o777 == 0o700
    files.make_folder(tmp_path / "a" / "b")
    assert len(flushed) == 3
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        files.make_folder(tmp_path / "file" / "below")
