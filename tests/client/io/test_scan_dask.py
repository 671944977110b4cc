"""A real scheduler and a real worker, processes of their own on loopback."""

import datetime
import ipaddress
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from pathfed_client.io.scan import scan
from pathfed_client.io.scan_dask import DaskExecutor, SchedulerTls, read_apart
from pathfed_client.io.scan_reading import SlideTask
from pathfed_client.io.site_records import SlideStatus
from pathfed_client.io.site_store import SiteStore
from pathfed_client.io.slide_files import file_state
from pathfed_client.slides.tiling import scan_key
from pathfed_common.errors import ErrorCode, HostError
from pathfed_common.plan import CohortPlan
from pathfed_common.processes import accepts_connections, free_port

PLAN = CohortPlan(tile_px=224)
KEY = bytes(range(32))
PATIENCE_S = 120


@dataclass
class Cluster:
    """A scheduler with one worker of one thread."""

    folder: Path
    tls: SchedulerTls | None = None
    port: int = field(default_factory=free_port)
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        options = []
        if self.tls is not None:
            options = ["--tls-ca-file", str(self.tls.ca), "--tls-cert", str(self.tls.certificate), "--tls-key", str(self.tls.key)]
        self._run("dask_scheduler", "--host", "127.0.0.1", "--port", str(self.port), "--no-dashboard", "--no-show", *options)
        wait_until(lambda: accepts_connections("127.0.0.1", self.port))
        worker = ["--nthreads", "1", "--no-dashboard", "--no-nanny", "--death-timeout", "60", "--local-directory", str(self.folder)]
        self._run("dask_worker", f"{'tcp' if self.tls is None else 'tls'}://{self.address}", *worker, *options)
        wait_until(self._has_worker)

    def _has_worker(self) -> bool:
        try:
            DaskExecutor(self.address, timeout_s=60, tls=self.tls).close()
        except HostError:
            return False
        return True

    def _run(self, program: str, *options: str) -> None:
        with (self.folder / f"{program}.log").open("ab") as log:
            command = [sys.executable, "-m", f"distributed.cli.{program}", *options]
            self.processes.append(subprocess.Popen(command, stdout=log, stderr=log, cwd=self.folder, env=environment()))

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
        self.processes.clear()


def environment() -> dict[str, str]:
    """Relative entries of the path, as a developer may have, stay what they are in another folder."""
    path = [str(Path(entry).resolve()) for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path)}


def wait_until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.fixture
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    made = Cluster(tmp_path_factory.mktemp("dask"))
    try:
        made.start()
        yield made
    finally:
        made.kill()


def add_slides(site, count: int = 6) -> None:
    names = [f"s{number}" for number in range(count)]
    site.add(*(f"{name}.tif" for name in names))
    site.map(**{name: f"P{name}" for name in names})


def test_cluster_finds_what_one_machine_finds(site, cluster):
    add_slides(site)
    (site.folder / "s3.tif").write_bytes(b"no slide")
    with DaskExecutor(cluster.address, timeout_s=60) as executor:
        assert executor.slots == 2
        report = site.scan(executor=executor)
    assert report.slides_read == 6
    assert site.statuses()["s3.tif"] == (SlideStatus.REFUSED, ErrorCode.SLIDE_UNOPENABLE)
    with SiteStore(site.folder.parent / "other.db") as other:
        scan(other, site.folder, site.list, PLAN, KEY, now=7.0)
        assert other.cohort(scan_key(PLAN)).digest == site.store.cohort(scan_key(PLAN)).digest
    logs = "".join(path.read_text() for path in cluster.folder.glob("*.log"))
    assert "s1.tif" not in logs


def test_losing_the_scheduler_costs_the_slides_in_flight_and_a_rerun_resumes(site, cluster):
    add_slides(site, 8)
    with DaskExecutor(cluster.address, timeout_s=60) as executor, pytest.raises(HostError, match="PF908"):
        site.scan(executor=executor, progress=lambda done, total: cluster.kill() if done == 3 else None)
    done = len(site.done())
    assert 3 <= done < 8
    assert all(status == SlideStatus.USABLE for status, _ in site.statuses().values() if status != SlideStatus.PENDING)
    assert site.scan().slides_read == 8 - done
    assert site.scan().patients == 8


def test_scheduler_that_is_not_there_is_told(monkeypatch):
    monkeypatch.setattr("pathfed_client.io.scan_dask._CONNECT_S", 1)
    with pytest.raises(HostError, match=r"PF908.*does not answer"):
        DaskExecutor(f"127.0.0.1:{free_port()}", timeout_s=60)


@pytest.mark.parametrize("address", ["10.0.0.1:8786", "tcp://dask.hospital.example:8786", "tls://192.0.2.1:8786", "0.0.0.0:8786"])
def test_scheduler_on_another_machine_is_not_spoken_to_without_tls(address):
    with pytest.raises(HostError, match="PF905"):
        DaskExecutor(address, timeout_s=60)


def make_certificate(folder: Path) -> SchedulerTls:
    """One self-signed certificate that serves both ends."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "scheduler")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    tls = SchedulerTls(ca=folder / "ca.pem", certificate=folder / "ca.pem", key=folder / "key.pem")
    tls.ca.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    tls.key.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
    return tls


def test_slides_are_read_over_tls_and_a_stranger_is_not_let_in(site, tmp_path):
    add_slides(site, 2)
    own, strange = tmp_path / "own", tmp_path / "strange"
    own.mkdir()
    strange.mkdir()
    cluster = Cluster(own, make_certificate(own))
    try:
        cluster.start()
        with DaskExecutor(cluster.address, timeout_s=60, tls=cluster.tls) as executor:
            assert site.scan(executor=executor).patients == 2
        with pytest.raises(HostError, match="PF908"):
            DaskExecutor(cluster.address, timeout_s=60, tls=make_certificate(strange))
    finally:
        cluster.kill()


def test_worker_reads_in_a_process_of_its_own(site, monkeypatch):
    own = threading.local()
    monkeypatch.setattr("pathfed_client.io.scan_dask._OWN", own)
    site.add("a.tif")
    file = site.folder / "a.tif"
    task = SlideTask(number=4, name="a.tif", files=(file,), state=file_state([file]), plan=PLAN, key=KEY)
    assert read_apart(task, 60.0).facts is not None
    assert len(own.executor._idle) == 1
    own.executor.close()
