import mmap
import subprocess
import sys

import numpy as np
import pytest

from pathfed_client.io.tile_index import MAGIC, IndexEntry, TileIndex, TileIndexWriter, index_file
from pathfed_client.slides.tile_map import DamagedMapError, TileMap, make_map
from pathfed_client.slides.tiling import TileGrid
from pathfed_common import digest
from pathfed_common.errors import HostError


def a_map(seed: int, side: int = 20) -> TileMap:
    grid = TileGrid(level=0, downsample=1, width=side * 256, height=side * 256, step=256, crop=224, reduce=1, tile_px=224, direct=False)
    return make_map(grid, np.random.default_rng(seed).random((side, side)) < 0.5)


@pytest.fixture
def path(tmp_path):
    return index_file(tmp_path / "tiles", digest.of_bytes(b"rules"))


def test_maps_come_back_and_readers_see_what_was_added_later(path):
    with TileIndexWriter(path) as writer, TileIndex(path) as index:
        entries = [writer.add(a_map(seed, side=3 + seed)) for seed in range(6)]
        writer.sync()
        for seed, entry in enumerate(entries):
            np.testing.assert_array_equal(index.read(entry).cells(), a_map(seed, side=3 + seed).cells())
        late = writer.add(a_map(9))
        np.testing.assert_array_equal(index.read(late).cells(), a_map(9).cells())
    assert path.stat().st_mode & 0o077 == 0
    assert all(entry.offset % 8 == 0 for entry in entries)


def test_a_later_scan_adds_at_the_end(path):
    with TileIndexWriter(path) as writer:
        first = writer.add(a_map(1))
    with TileIndexWriter(path) as writer:
        second = writer.add(a_map(2))
    with TileIndex(path) as index:
        assert len(index.read(first)) == len(a_map(1))
        assert len(index.read(second)) == len(a_map(2))


def test_a_map_lies_in_the_mapped_file_and_is_not_copied(path):
    with TileIndexWriter(path) as writer:
        entry = writer.add(a_map(1))
    with TileIndex(path) as index:
        base: object = index.read(entry).bits
        while isinstance(base, np.ndarray):
            base = base.base
        assert isinstance(base, memoryview)
        assert isinstance(base.obj, mmap.mmap)


def test_damage_costs_the_slide_it_hits_and_no_other(path):
    with TileIndexWriter(path) as writer:
        first, second = writer.add(a_map(1)), writer.add(a_map(2))
    data = bytearray(path.read_bytes())
    data[first.offset + first.size // 2] ^= 1
    path.write_bytes(data)
    with TileIndex(path) as index:
        with pytest.raises(DamagedMapError, match="changed"):
            index.read(first)
        assert len(index.read(second)) == len(a_map(2))


@pytest.mark.parametrize("entry", [IndexEntry(0, 80, "00" * 16), IndexEntry(16, 10**9, "00" * 16), IndexEntry(16, 80, "00" * 16)])
def test_entries_that_point_elsewhere_are_noticed(path, entry):
    with TileIndexWriter(path) as writer:
        writer.add(a_map(1))
    with TileIndex(path) as index, pytest.raises(DamagedMapError):
        index.read(entry)


def test_an_index_that_is_gone_is_empty_and_a_file_that_is_none_is_begun_anew(path):
    with TileIndex(path) as index, pytest.raises(DamagedMapError, match="shorter"):
        index.read(IndexEntry(16, 80, "00" * 16))
    path.parent.mkdir()
    path.write_bytes(b"something else entirely")
    with TileIndexWriter(path) as writer:
        entry = writer.add(a_map(1))
    assert path.read_bytes().startswith(MAGIC)
    with TileIndex(path) as index:
        assert len(index.read(entry)) == len(a_map(1))


HOLD = """
import sys
from pathlib import Path
from pathfed_client.io.tile_index import TileIndexWriter
with TileIndexWriter(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_scan_at_the_same_time_is_refused(path):
    command = [sys.executable, "-c", HOLD, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(HostError, match="another scan"):
            TileIndexWriter(path)
        other.communicate()
    with TileIndexWriter(path) as writer:
        writer.add(a_map(1))


def test_full_disk_leaves_nothing_half_written(path, small_disk):
    place = small_disk / "tiles" / "x.tiles"
    with TileIndexWriter(place) as writer:
        entries = []
        with pytest.raises(HostError, match="PF901"):  # noqa: PT012 - it is the loop that fills the disk
            for seed in range(100_000):
                entries.append(writer.add(a_map(seed % 3, side=200)))
        assert entries
        last = entries[-1]
        assert place.stat().st_size == last.offset + last.size
    with TileIndex(place) as index:
        assert len(index.read(last)) > 0
