"""Tiles come out the same with any number of processes, and a process that dies costs a slide at most."""

import os
import signal

import numpy as np
import psutil
import pytest

from pathfed_client.io import tile_workers
from pathfed_client.io.scan import scan
from pathfed_client.io.site_store import SiteStore
from pathfed_client.io.tile_stream import TileStream
from pathfed_client.io.tile_workers import CHUNK, TileWorkers
from pathfed_client.slides.tiling import scan_key
from pathfed_common.plan import CohortPlan

PLAN = CohortPlan(tile_px=96, play_px=32, tissue_share=0.1)


@pytest.fixture(scope="module")
def site(tmp_path_factory, tissue):
    """A scanned site of five one-slide patients."""
    from pathfed_local.generator import slide_bytes

    root = tmp_path_factory.mktemp("site")
    (root / "slides").mkdir()
    for number in range(5):
        (root / "slides" / f"{number}.tif").write_bytes(slide_bytes(np.roll(tissue, 40 * number, axis=1)))
    (root / "patients.csv").write_text("slide,patient\n" + "".join(f"{n}.tif,P{n}\n" for n in range(5)))
    with SiteStore(root / "site.db") as store:
        scan(store, root / "slides", root / "patients.csv", PLAN, bytes(32), now=0.0)
        yield store, root / "slides"


@pytest.fixture(scope="module")
def batches(site):
    """What five patients' draws ask for: 1 to 21 tiles each, at drawn places."""
    store, _ = site
    random = np.random.default_rng(0)
    drawn = []
    for number, patient in enumerate(store.cohort(scan_key(PLAN)).patients):
        numbers = random.integers(0, patient.tile_count, 1 + 5 * number)
        drawn.append([patient.tile(int(tile), *random.random(2)) for tile in numbers])
    return drawn


@pytest.fixture(scope="module")
def expected(site, batches):
    store, folder = site
    with TileStream(store, folder, PLAN) as stream:
        return [stream.read(refs) for refs in batches]


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("announced", [True, False])
def test_tiles_do_not_depend_on_the_number_of_workers(site, batches, expected, workers, announced):
    store, folder = site
    with TileWorkers(folder, 96, workers, slots=CHUNK) as pool, TileStream(store, folder, PLAN, workers=pool) as stream:
        for _ in range(2):
            if announced:
                stream.expect(batches)
            for refs, tiles in zip(batches, expected, strict=True):
                np.testing.assert_array_equal(stream.read(refs), tiles)
        assert stream.left_out == 0


def test_what_was_announced_and_not_asked_for_is_passed_over(site, batches, expected):
    store, folder = site
    with TileWorkers(folder, 96, 1) as pool, TileStream(store, folder, PLAN, workers=pool) as stream:
        stream.expect(batches)
        np.testing.assert_array_equal(stream.read(batches[3]), expected[3])
        np.testing.assert_array_equal(stream.read(batches[1]), expected[1])
        stream.expect(batches[2:])
        np.testing.assert_array_equal(stream.read(batches[2]), expected[2])


def test_a_slide_that_ends_its_process_costs_that_slide_alone(site, batches, expected, tmp_path, monkeypatch):
    """Real processes really killed, each time they come to the second patient's slide."""
    store, folder = site
    fatal = {record.path for number, record in store.slides(scan_key(PLAN)).items() if number == batches[1][0].slide}
    script = tmp_path / "killed_by_a_slide.py"
    script.write_text(
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from pathfed_client.io import tile_workers\n"
        "real = tile_workers.read_into\n"
        "def read_into(tile, reader, job):\n"
        f"    if job.slide.path in {fatal!r}:\n"
        "        os.kill(os.getpid(), signal.SIGSEGV)\n"
        "    return real(tile, reader, job)\n"
        "tile_workers.read_into = read_into\n"
        "tile_workers.main(*[int(word) for word in sys.argv[1:7]], [Path(word) for word in sys.argv[7:]])\n"
    )
    monkeypatch.setattr(tile_workers, "_MODULE", script.stem)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    with TileWorkers(folder, 96, 2) as pool, TileStream(store, folder, PLAN, workers=pool) as stream:
        stream.expect(batches)
        assert stream.read(batches[0]).shape == expected[0].shape
        assert len(stream.read(batches[1])) == 0
        assert stream.left_out == len(batches[1])
        for refs, tiles in zip(batches[2:], expected[2:], strict=True):
            np.testing.assert_array_equal(stream.read(refs), tiles)


def test_killed_idle_processes_are_replaced_and_no_tile_is_lost(site, batches, expected):
    store, folder = site
    with TileWorkers(folder, 96, 2) as pool, TileStream(store, folder, PLAN, workers=pool) as stream:
        np.testing.assert_array_equal(stream.read(batches[4]), expected[4])
        for pid in pool.pids:
            os.kill(pid, signal.SIGKILL)
            psutil.Process(pid).wait(10)
        for refs, tiles in zip(batches, expected, strict=True):
            np.testing.assert_array_equal(stream.read(refs), tiles)


def test_processes_that_end_again_and_again_are_given_up(site, batches, expected):
    store, folder = site
    with TileWorkers(folder, 96, 1) as pool, TileStream(store, folder, PLAN, workers=pool) as stream:
        for _ in range(30):
            assert len(stream.read(batches[0])) == 1
            if pool.is_open:
                (pid,) = pool.pids
                os.kill(pid, signal.SIGKILL)
                psutil.Process(pid).wait(10)
        assert not pool.is_open
        np.testing.assert_array_equal(stream.read(batches[4]), expected[4])


def test_a_slide_that_hangs_is_given_up(site, batches, expected, tmp_path, monkeypatch):
    store, folder = site
    hanging = {record.path for number, record in store.slides(scan_key(PLAN)).items() if number == batches[1][0].slide}
    script = tmp_path / "hung_by_a_slide.py"
    script.write_text(
        "import sys, time\n"
        "from pathlib import Path\n"
        "from pathfed_client.io import tile_workers\n"
        "real = tile_workers.read_into\n"
        "def read_into(tile, reader, job):\n"
        f"    if job.slide.path in {hanging!r}:\n"
        "        time.sleep(600)\n"
        "    return real(tile, reader, job)\n"
        "tile_workers.read_into = read_into\n"
        "tile_workers.main(*[int(word) for word in sys.argv[1:7]], [Path(word) for word in sys.argv[7:]])\n"
    )
    monkeypatch.setattr(tile_workers, "_MODULE", script.stem)
    monkeypatch.setattr(tile_workers, "TILE_TIMEOUT_S", 4.0)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    with TileWorkers(folder, 96, 1) as pool, TileStream(store, folder, PLAN, workers=pool) as stream:
        assert len(stream.read(batches[1])) == 0
        np.testing.assert_array_equal(stream.read(batches[3]), expected[3])


def test_where_no_process_starts_this_one_reads(site, batches, expected, monkeypatch):
    store, folder = site
    monkeypatch.setattr(tile_workers, "_MODULE", "pathfed_client.no_such_module")
    with TileWorkers(folder, 96, 1) as pool, TileStream(store, folder, PLAN, workers=pool) as stream:
        stream.expect(batches)
        for refs, tiles in zip(batches, expected, strict=True):
            np.testing.assert_array_equal(stream.read(refs), tiles)
        assert not pool.is_open


def test_no_process_outlives_its_workers(site):
    _, folder = site
    with TileWorkers(folder, 96, 2) as pool:
        pids = pool.pids
    assert not any(psutil.pid_exists(pid) for pid in pids)


@pytest.mark.parametrize("change", [{"workers": 0}, {"slots": CHUNK - 1}])
def test_too_few_of_anything_is_refused(site, change):
    with pytest.raises(ValueError, match="need at least"):
        TileWorkers(site[1], 96, **({"workers": 1} | change))
