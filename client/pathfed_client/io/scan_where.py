"""Where a scan reads slides: processes of this machine, or a Dask cluster."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from pathfed_client.io.scan_reading import SlideExecutor
from pathfed_client.io.scan_workers import SLIDE_TIMEOUT_S, ProcessExecutor, usable_cpus
from pathfed_common.errors import ErrorCode, HostError


@dataclass(frozen=True, kw_only=True)
class ScanWhere:
    """What a person chose.

    Attributes:
        workers: reading processes on this machine; None for one a CPU that this process may use.
        slide_timeout_s: seconds a slide may take.
        scheduler: HOST:PORT of a Dask scheduler to read with instead, or None.
        scheduler_ca: PEM of the CA that signed the scheduler's certificate.
        scheduler_cert: PEM of this client's certificate.
        scheduler_key: PEM of its key.
    """

    workers: int | None = None
    slide_timeout_s: float = SLIDE_TIMEOUT_S
    scheduler: str | None = None
    scheduler_ca: Path | None = None
    scheduler_cert: Path | None = None
    scheduler_key: Path | None = None


def make_executor(where: ScanWhere) -> AbstractContextManager[SlideExecutor]:
    """The executor, to be closed by leaving it.

    Raises:
        HostError: PF905, TLS is needed or incomplete; PF907, Dask is not installed; PF908, the scheduler cannot be used.
    """
    if where.scheduler is None:
        return ProcessExecutor(where.workers or usable_cpus(), timeout_s=where.slide_timeout_s)
    try:
        from pathfed_client.io.scan_dask import DaskExecutor, SchedulerTls
    except ModuleNotFoundError as error:
        raise HostError(
            ErrorCode.TOOL_MISSING, "Dask is not installed", value=error.name, remedy="pip install 'pathfed[client,dask]'"
        ) from None
    files = (where.scheduler_ca, where.scheduler_cert, where.scheduler_key)
    given = [path for path in files if path is not None]
    if 0 < len(given) < len(files):
        raise HostError(ErrorCode.SETTINGS_INVALID, "TLS takes all three: --scheduler-ca, --scheduler-cert, --scheduler-key")
    tls = SchedulerTls(ca=given[0], certificate=given[1], key=given[2]) if given else None
    return DaskExecutor(where.scheduler, timeout_s=where.slide_timeout_s, tls=tls)
