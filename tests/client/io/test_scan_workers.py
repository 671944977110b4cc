import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from pathfed_client.io.scan import scan
from pathfed_client.io.scan_planning import MOST_ATTEMPTS
from pathfed_client.io.scan_reading import SlideTask
from pathfed_client.io.scan_workers import ProcessExecutor
from pathfed_client.io.site_records import SlideStatus
from pathfed_client.io.site_store import SiteStore
from pathfed_client.io.slide_files import file_state
from pathfed_client.slides.tiling import scan_key
from pathfed_common.errors import ErrorCode, HostError
from pathfed_common.plan import CohortPlan

PLAN = CohortPlan(tile_px=224)
KEY = bytes(range(32))
USED = (SlideStatus.USABLE, None)

#: A reading process that does something else with the slide of one name.
PLANTED = """
import ctypes, os, signal, sys, time
from pathfed_client.io import scan_reading, scan_workers
real = scan_reading.examine
def examine(reader, plan, *, where, **more):
    if where == "b.tif":
        {deed}
    return real(reader, plan, where=where, **more)
scan_reading.examine = examine
scan_workers.serve(int(sys.argv[1]))
"""


def planted(deed: str) -> list[str]:
    return [sys.executable, "-c", PLANTED.format(deed=deed)]


def test_what_is_found_does_not_depend_on_how_many_read(site):
    names = "abcdefgh"
    site.add(*(f"{name}.tif" for name in names))
    (site.folder / "d.tif").write_bytes(b"no slide")
    site.write_slide(site.folder / "f.tif", mpp=28.97)
    site.map(**{name: f"P{ord(name) % 3}" for name in names})
    alone = site.scan()
    for workers in (1, 3):
        with SiteStore(site.folder.parent / f"{workers}.db") as store, ProcessExecutor(workers) as executor:
            report = scan(store, site.folder, site.list, PLAN, KEY, now=7.0, executor=executor)
            assert replace(report, slides_read=0) == replace(alone, slides_read=0)
            assert store.cohort(scan_key(PLAN)).digest == site.store.cohort(scan_key(PLAN)).digest


@pytest.mark.parametrize(
    "deed",
    ["ctypes.string_at(0)", "os.kill(os.getpid(), signal.SIGKILL)", "os._exit(0)", "raise AssertionError('a bug of ours')"],
    ids=["segmentation fault", "out of memory", "exit", "bug"],
)
def test_slide_that_ends_its_process_costs_that_slide_only(site, deed):
    site.add("a.tif", "b.tif", "c.tif", "d.tif")
    site.map(a="P1", b="P2", c="P3", d="P4")
    with ProcessExecutor(2, command=planted(deed)) as executor:
        for _ in range(MOST_ATTEMPTS):
            report = site.scan(executor=executor)
            assert report.slides_read >= 1
        assert site.statuses() == {
            "a.tif": USED,
            "b.tif": (SlideStatus.REFUSED, ErrorCode.SLIDE_CRASHED),
            "c.tif": USED,
            "d.tif": USED,
        }
        assert site.scan(executor=executor).slides_read == 0


def test_slide_that_hangs_its_decoder_is_given_up(site):
    site.add("a.tif", "b.tif", "c.tif")
    site.map(a="P1", b="P2", c="P3")
    with ProcessExecutor(1, command=planted("time.sleep(3600)"), timeout_s=5.0) as executor:
        site.scan(executor=executor)
    assert site.statuses() == {"a.tif": USED, "b.tif": (SlideStatus.REFUSED, ErrorCode.SLIDE_TIMEOUT), "c.tif": USED}


def test_process_that_does_not_start_is_no_slides_fault(site):
    site.add("a.tif")
    site.map(a="P1")
    with ProcessExecutor(1, command=[sys.executable, "-c", "raise SystemExit(3)"]) as executor, pytest.raises(HostError, match="PF903"):
        site.scan(executor=executor)
    assert site.statuses()["a.tif"] == (SlideStatus.PENDING, None)
    assert site.scan().patients == 1


def test_process_that_ended_while_idle_is_replaced(site):
    site.add("a.tif")
    task = SlideTask(number=1, name="a.tif", files=(site.folder / "a.tif",), state=file_state([site.folder / "a.tif"]), plan=PLAN, key=KEY)
    with ProcessExecutor(1) as executor:
        executor.submit(task)
        assert executor.finished()[0].facts is not None
        executor._idle[0]._process.kill()
        executor._idle[0]._process.wait()
        executor.submit(task)
        assert executor.finished()[0].facts is not None


def test_at_least_one_process_reads():
    with pytest.raises(ValueError, match="workers must be at least 1"):
        ProcessExecutor(0)


def test_tasks_and_readings_show_no_name_when_printed(site):
    site.add("secret.tif")
    task = SlideTask(
        number=1, name="secret.tif", files=(site.folder / "secret.tif",), state=file_state([site.list.parent]), plan=PLAN, key=KEY
    )
    assert "secret" not in repr(task)
    assert KEY.hex() not in repr(task)


KILLED = """
import os, signal, sys
from pathlib import Path
from pathfed_client.io.scan import scan
from pathfed_client.io.scan_workers import ProcessExecutor
from pathfed_client.io.site_store import SiteStore
from pathfed_common.plan import CohortPlan

home = Path(sys.argv[1])

def progress(done, total):
    if done == 4:
        print(" ".join(str(one.pid) for one in (*executor._idle, *(busy for busy, _ in executor._busy.values()))), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

with SiteStore(home / "site.db") as store, ProcessExecutor(2) as executor:
    scan(store, home / "slides", home / "patients.csv", CohortPlan(tile_px=224), bytes(range(32)), progress, executor=executor)
"""


def test_killed_scan_leaves_no_process_and_goes_on_where_it_was(site, tmp_path):
    names = [f"s{number:02d}" for number in range(12)]
    site.add(*(f"{name}.tif" for name in names))
    site.map(**{name: f"P{name}" for name in names})
    ended = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False, capture_output=True, text=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    for process in map(int, ended.stdout.split()):
        for _ in range(600):
            if not Path(f"/proc/{process}/cmdline").exists() or not Path(f"/proc/{process}/cmdline").read_bytes():
                break
            time.sleep(0.1)
        else:
            pytest.fail("a reading process outlived the scan")
    done = len(site.done())
    assert done >= 4
    with ProcessExecutor(2) as executor:
        assert site.scan(executor=executor).slides_read == 12 - done
    with SiteStore(tmp_path / "other.db") as undisturbed:
        scan(undisturbed, site.folder, site.list, PLAN, KEY, now=7.0)
        assert undisturbed.cohort(scan_key(PLAN)).digest == site.store.cohort(scan_key(PLAN)).digest
