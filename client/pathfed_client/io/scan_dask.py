"""Reading slides on many machines through Dask: an executor and nothing more. Everything that lasts is in the site database.

The scheduler and its workers are the hospital's own; each worker sees the slide folders under the same paths and has pathfed with the
extras `client` and `dask` installed, in the same version. A worker reads each slide in a process of its own (`io.scan_workers`), so a slide
that crashes or hangs its decoder costs neither the worker nor the scan. Losing the scheduler costs the slides in flight.

Outside loopback the connection is mutually authenticated TLS: tasks hold slide names and the key of the site's fingerprints.
"""

import ipaddress
import queue
import threading
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass
from pathlib import Path

from distributed import Client, Future, Security

from pathfed_client.io.scan_reading import SlideReading, SlideTask
from pathfed_client.io.scan_workers import ProcessExecutor
from pathfed_common.errors import ErrorCode, HostError

_CONNECT_S = 20
_LOOK_S = 1.0
_COUNT_S = 10.0
_REMEDY = "start the scheduler and its workers again, then the same command: it resumes"
_OWN = threading.local()


@dataclass(frozen=True, kw_only=True)
class SchedulerTls:
    """PEM files of this client's side of the scheduler's TLS: the CA, and a certificate with its key."""

    ca: Path
    certificate: Path
    key: Path


class DaskExecutor:
    """Reads slides on a Dask cluster; implements `SlideExecutor`. A context manager."""

    def __init__(self, address: str, *, timeout_s: float, tls: SchedulerTls | None = None) -> None:
        """Connect.

        Args:
            address: HOST:PORT of the scheduler, with `tcp://` or `tls://` before it or not.
            timeout_s: seconds a slide may take.
            tls: needed unless the address is on loopback.

        Raises:
            HostError: PF905, no TLS though the scheduler is on another machine; PF908, it does not answer or has no worker.
        """
        self._address = address
        self._timeout_s = timeout_s
        self._scan = uuid.uuid4().hex  # the cluster may serve several scans: no two tasks may share a key
        self._futures: dict[int, Future] = {}
        self._done: queue.SimpleQueue[int] = queue.SimpleQueue()
        place = address.rpartition("://")[2]
        if tls is None and not _on_loopback(place):
            raise HostError(
                ErrorCode.SETTINGS_INVALID,
                "a scheduler on another machine is used over TLS only",
                where="--scheduler",
                value=address,
                remedy="give --scheduler-ca, --scheduler-cert and --scheduler-key",
            )
        security = None
        if tls is not None:
            files = {"tls_ca_file": str(tls.ca), "tls_client_cert": str(tls.certificate), "tls_client_key": str(tls.key)}
            security = Security(require_encryption=True, **files)
        try:
            self._client = Client(
                f"{'tcp' if tls is None else 'tls'}://{place}", security=security, timeout=_CONNECT_S, set_as_default=False
            )
        except (OSError, TimeoutError, ValueError) as error:
            raise self._lost("the scheduler does not answer") from error
        self._slots, self._counted = 0, -_COUNT_S
        if not self.slots:
            self.close()
            raise self._lost("the scheduler has no worker")

    def __enter__(self) -> "DaskExecutor":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def slots(self) -> int:
        """See `SlideExecutor`: two slides for each thread of the cluster, so that none waits. Workers may come and go."""
        self._check()
        if time.monotonic() - self._counted >= _COUNT_S:
            try:
                self._slots = 2 * sum(map(int, self._client.nthreads().values())) or min(1, self._slots)
            except (OSError, TimeoutError) as error:
                raise self._lost("the scheduler was lost") from error
            self._counted = time.monotonic()
        return self._slots

    def _check(self) -> None:
        if self._client.status != "running":
            raise self._lost("the scheduler was lost")

    def submit(self, task: SlideTask, /) -> None:
        """See `SlideExecutor`."""
        self._check()
        future = self._client.submit(read_apart, task, self._timeout_s, key=f"slide-{self._scan}-{task.number}", pure=False)
        self._futures[task.number] = future
        future.add_done_callback(lambda _, number=task.number: self._done.put(number))

    def finished(self) -> Sequence[SlideReading]:
        """See `SlideExecutor`."""
        while True:
            try:
                numbers = [self._done.get(timeout=_LOOK_S)]
                break
            except queue.Empty:
                self._check()
        while not self._done.empty():
            numbers.append(self._done.get())
        return [self._reading(number) for number in numbers]

    def _reading(self, number: int) -> SlideReading:
        future = self._futures.pop(number)
        if future.status == "finished":
            try:
                reading: SlideReading = future.result(timeout=_CONNECT_S)
            except (OSError, TimeoutError, CancelledError) as error:
                raise self._lost("a reading was lost with the scheduler or a worker") from error
            return reading
        if future.status == "error" and self._client.status == "running":
            # `read_apart` never raises: several workers ended while they had this slide.
            detail = f"the workers that read it ended: {type(future.exception()).__name__}"
            return SlideReading(number=number, code=ErrorCode.SLIDE_CRASHED, detail=detail)
        raise self._lost("the scheduler was lost")

    def _lost(self, what: str) -> HostError:
        return HostError(ErrorCode.SCHEDULER_LOST, what, where=self._address, remedy=_REMEDY)

    def close(self) -> None:
        """See `SlideExecutor`."""
        self._futures.clear()
        self._client.close(timeout=2)


def read_apart(task: SlideTask, timeout_s: float) -> SlideReading:
    """What a Dask worker does with a slide: read it in a process that this thread keeps. Never raises."""
    executor: ProcessExecutor | None = getattr(_OWN, "executor", None)
    if executor is None:
        executor = _OWN.executor = ProcessExecutor(1, timeout_s=timeout_s)
    try:
        executor.submit(task)
        return executor.finished()[0]
    except (HostError, OSError) as error:
        executor.close()
        return SlideReading(number=task.number, code=ErrorCode.SLIDE_CRASHED, detail=f"a worker cannot read: {error!r}")


def _on_loopback(place: str) -> bool:
    host = place.rpartition(":")[0].strip("[]")
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
