"""A file that arrives in parts: what counts is on the disk and is what its name says, whatever was cut, changed or full."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_fixtures import small_disk  # noqa: F401 - a fixture
from hypothesis import given
from hypothesis import strategies as st

from pathfed_common import digest, shards
from pathfed_common.errors import ErrorCode, HostError, TransportError
from pathfed_common.part_file import PartFile, manifest_of
from pathfed_common.shards import LARGEST_FILE, Manifest, pieces_of, shard_count

SHARD = 4096
PIECE = 1024
DATA = os.urandom(2 * SHARD + 1500)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", SHARD)
    monkeypatch.setattr(shards, "PIECE_BYTES", PIECE)


def made(data: bytes = DATA, **changes: object) -> Manifest:
    parts = [data[at : at + SHARD] for at in range(0, len(data), SHARD)]
    values = {"file": digest.of_bytes(data), "size": len(data), "shards": tuple(map(digest.of_bytes, parts))}
    return Manifest(**{**values, **changes})  # type: ignore[arg-type]


def pieces(data: bytes = DATA, start: int = 0) -> Iterator[bytes]:
    while start < len(data):
        end = min(start + PIECE, (start // SHARD + 1) * SHARD, len(data))
        yield data[start:end]
        start = end


def write_all(part: PartFile, data: bytes = DATA) -> None:
    while not part.is_whole:
        part.write(data[part.here : min(part.here + shards.PIECE_BYTES, part.manifest.extent(part.index)[1])])


def test_a_file_that_arrives_is_the_file_that_was_sent(tmp_path):
    with PartFile(tmp_path / "part", made()) as part:
        for piece in pieces():
            assert not part.is_whole
            part.write(piece)
        assert (part.is_whole, part.here, part.index) == (True, len(DATA), 3)
        part.finish(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == DATA
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@given(cut=st.integers(0, len(DATA)))
def test_after_a_cut_anywhere_nothing_is_sent_twice(tmp_path_factory, cut):
    path = tmp_path_factory.mktemp("cut") / "part"
    path.write_bytes(DATA[:cut])
    with PartFile(path, made()) as part:
        assert part.here == cut
        for piece in pieces(start=cut):
            part.write(piece)
        part.finish(path.with_name("file"))
    assert path.with_name("file").read_bytes() == DATA


@pytest.mark.parametrize("at", [0, SHARD - 1, SHARD, 2 * SHARD - 1])
def test_a_byte_that_changed_on_the_disk_costs_its_shard_and_what_follows(tmp_path, at):
    """What a power cut may leave: a length without its bytes."""
    changed = bytearray(DATA)
    changed[at] ^= 1
    (tmp_path / "part").write_bytes(changed)
    with PartFile(tmp_path / "part", made()) as part:
        assert part.here == at // SHARD * SHARD
    assert (tmp_path / "part").stat().st_size == at // SHARD * SHARD


def test_a_changed_byte_of_the_begun_shard_is_found_when_it_is_whole(tmp_path):
    (tmp_path / "part").write_bytes(DATA[:SHARD] + b"\0" * 10)
    with PartFile(tmp_path / "part", made()) as part:
        assert part.here == SHARD + 10
        with pytest.raises(TransportError) as caught:
            write_all(part)
        assert caught.value.code is ErrorCode.SHARD_DAMAGED
        assert part.here == SHARD, "the shard is taken back, and none before it"
        for piece in pieces(start=SHARD):
            part.write(piece)
        assert part.is_whole


def test_a_shard_whose_digest_lies_never_counts(tmp_path):
    lie = made(shards=(made().shards[0], digest.of_bytes(b"a lie"), made().shards[2]))
    with PartFile(tmp_path / "part", lie) as part:
        with pytest.raises(TransportError, match="PF463"):
            write_all(part)
        assert part.here == SHARD


def test_more_bytes_than_the_shard_or_the_file_has_are_refused(tmp_path):
    with PartFile(tmp_path / "part", made()) as part:
        with pytest.raises(TransportError, match="PF463"):
            part.write(DATA[: SHARD + 1])
        assert part.here == 0
        for piece in pieces():
            part.write(piece)
        with pytest.raises(TransportError, match="PF463"):
            part.write(b"x")
        assert part.is_whole, "what is whole stays whole"
    (tmp_path / "longer").write_bytes(DATA + b"more")
    with PartFile(tmp_path / "longer", made()) as part:
        assert part.is_whole


def test_what_is_not_whole_gets_no_name(tmp_path):
    with PartFile(tmp_path / "part", made()) as part:
        part.write(DATA[:PIECE])
        with pytest.raises(ValueError, match="1024 of"):
            part.finish(tmp_path / "file")
    assert not (tmp_path / "file").exists()


def test_a_link_in_the_parts_place_is_not_followed(tmp_path):
    (tmp_path / "elsewhere").write_bytes(b"mine")
    (tmp_path / "part").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(HostError, match="PF904"):
        PartFile(tmp_path / "part", made())
    assert (tmp_path / "elsewhere").read_bytes() == b"mine"


WRITER = """
import os, sys
from pathlib import Path
from pathfed_common import shards
from pathfed_common.part_file import PartFile
from pathfed_common.shards import Manifest
shards.SHARD_BYTES, shards.PIECE_BYTES = 4096, 1024
folder = Path(sys.argv[1])
data = (folder / "data").read_bytes()
part = PartFile(folder / "part", Manifest.from_bytes((folder / "manifest").read_bytes()))
for at in range(part.here, int(sys.argv[2]), 1024):
    part.write(data[at : at + 1024])
os.kill(os.getpid(), 9)
"""


def test_a_writer_killed_again_and_again_still_ends_with_the_file(tmp_path):
    (tmp_path / "data").write_bytes(DATA)
    (tmp_path / "manifest").write_bytes(made().to_bytes())
    for stop in (2 * PIECE, SHARD + PIECE, 2 * SHARD):
        done = subprocess.run([sys.executable, "-c", WRITER, tmp_path, str(stop)], capture_output=True, check=False)
        assert done.returncode == -9, done.stderr
        with PartFile(tmp_path / "part", made()) as part:
            assert part.here == stop
    with PartFile(tmp_path / "part", made()) as part:
        for piece in pieces(start=part.here):
            part.write(piece)
        part.finish(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == DATA


def test_a_full_disk_keeps_what_counted_and_takes_the_rest_when_there_is_room(small_disk: Path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(shards, "SHARD_BYTES", 2**16)
    monkeypatch.setattr(shards, "PIECE_BYTES", 2**14)
    free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
    ballast = small_disk / "ballast"
    ballast.write_bytes(b"\0" * (free - 3 * 2**16))
    data = os.urandom(6 * 2**16)
    parts = [data[at : at + 2**16] for at in range(0, len(data), 2**16)]
    manifest = Manifest(file=digest.of_bytes(data), size=len(data), shards=tuple(map(digest.of_bytes, parts)))
    with PartFile(small_disk / "part", manifest) as part:
        with pytest.raises(HostError, match="PF901"):
            write_all(part, data)
        stopped = part.here
        assert 0 < stopped < len(data)
        ballast.unlink()
        write_all(part, data)
        part.finish(small_disk / "file")
    assert (small_disk / "file").read_bytes() == data


def test_the_manifest_of_a_file_names_it_and_its_shards(tmp_path):
    (tmp_path / "file").write_bytes(DATA)
    found = manifest_of(tmp_path / "file")
    assert found == made()
    assert Manifest.from_bytes(found.to_bytes()) == found
    assert [found.extent(index) for index in range(3)] == [(0, SHARD), (SHARD, 2 * SHARD), (2 * SHARD, len(DATA))]
    assert list(pieces_of(*found.extent(2))) == [(2 * SHARD, 2 * SHARD + 1024), (2 * SHARD + 1024, len(DATA))]
    (tmp_path / "empty").touch()
    with pytest.raises(ValueError, match="size"):
        manifest_of(tmp_path / "empty")


@pytest.mark.parametrize(
    "changes",
    [{"size": 0}, {"size": -1}, {"size": LARGEST_FILE + 1}, {"shards": ()}, {"file": "sha256:1"}, {"shards": ("x", "y", "z")}],
)
def test_a_manifest_that_no_file_has_is_refused(changes):
    with pytest.raises(ValueError):
        made(**changes)


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b'{"file":1,"size":1,"shards":[]}', b'{"file":"sha256:1","size":"x","shards":[]}'])
def test_other_bytes_are_no_manifest(data):
    with pytest.raises(ValueError):
        Manifest.from_bytes(data)


def test_a_shard_that_is_not_there_has_no_extent():
    for index in (-1, 3):
        with pytest.raises(ValueError, match="index"):
            made().extent(index)
    assert (shard_count(1), shard_count(SHARD), shard_count(SHARD + 1)) == (1, 1, 2)
