"""Virtual sites on Flower's simulation engine: the `SitePort` that the round loop talks through, and the engine around it.

Flower's engine runs a process a core (Ray's actors) and hands each message to whichever is free; the messages are Flower's own, the same
offers and statements as between a real server and its sites. Base states and updates lie in files of this machine, named in the message.
"""

import logging
import os
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from pathfed_common.errors import ErrorCode, HostError, PathfedError
from pathfed_common.ids import SiteName
from pathfed_common.protocol import wire
from pathfed_local.simulation.virtual_site import Fleet, answer
from pathfed_server.rounds.ports import Consent, Offer, Reply, Sending

_log = logging.getLogger(__name__)
_STATES, _FOLDER, _UPDATE = "states", "folder", "update"
_POLL_S = 0.1
#: Attempts at starting Ray.
_STARTS = 5
#: Shared memory of Ray's own, bytes; messages are small, so the least that Ray takes.
_OBJECT_STORE = 80_000_000
#: Neither Flower nor Ray reports to anybody.
_QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DISABLE_IMPORT_WARNING": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "OMP_NUM_THREADS": "1",
}


class SimulationEndedError(Exception):
    """The engine has ended, so nobody will answer any more."""


class SimulatedSites:
    """`SitePort` over Flower's grid, to virtual sites.

    Args:
        grid: Flower's connection to the engine.
        sites: the virtual sites; each gets a node of its own.
        folder: where virtual sites keep what is theirs.
        states: where the run's states lie.
        ended: asked again and again; once it is set, whatever runs here ends with SimulationEndedError.
    """

    def __init__(self, grid: Grid, sites: Sequence[SiteName], folder: Path, states: Path, ended: threading.Event) -> None:
        self._grid, self._folder, self._states, self._ended = grid, folder, states, ended
        while len(nodes := list(grid.get_nodes())) < len(sites):  # the engine registers them while the server's half starts
            self._wait()
        self._nodes = {site: node.node_id for site, node in zip(sites, nodes, strict=True)}

    def exchange(self, offers: Sequence[Offer], spool: Path, *, withheld: Consent, sending: Sending) -> Iterator[Reply]:
        """Send offers, yield replies as they come; see `SitePort`."""
        expected: dict[str, SiteName] = {}
        for offer in offers:
            code = withheld(offer.site)
            if code is not None:
                yield _code(offer.site, code)
                continue
            sending(offer.site)
            (message_id,) = self._grid.push_messages([self._message(offer)])
            expected[message_id] = offer.site
        deadline = max((offer.deadline for offer in offers), default=0.0)
        while expected and time.time() <= deadline:
            found = list(self._grid.pull_messages(list(expected)))
            for message in found:
                yield _reply(expected.pop(message.metadata.reply_to_message_id), message, spool)
            if not found:
                self._wait()
        for site in expected.values():
            yield _code(site, ErrorCode.SITE_SILENT.value)

    def _wait(self) -> None:
        if self._ended.wait(_POLL_S):
            raise SimulationEndedError

    def _message(self, offer: Offer) -> Message:
        record = ConfigRecord({wire.ENVELOPE: offer.envelope, _STATES: str(self._states), _FOLDER: str(self._folder)})
        ttl = max(1.0, offer.deadline - time.time())
        return Message(RecordDict({wire.OFFER: record}), dst_node_id=self._nodes[offer.site], message_type=wire.MESSAGE_TYPE, ttl=ttl)


def _reply(site: SiteName, message: Message, spool: Path) -> Reply:
    if message.has_error():
        _log.error("%s: %s", site, message.error.reason)
        return _code(site, ErrorCode.SITE_INTERNAL.value)
    record = message.content.config_records[wire.REPLY]
    if record[wire.CODE]:
        return _code(site, str(record[wire.CODE]))
    update = spool / f"{site}.safetensors"
    Path(str(record[_UPDATE])).replace(update)
    statement = record[wire.ENVELOPE]
    return Reply(
        site=site,
        code=None,
        statement=statement if isinstance(statement, bytes) else None,
        update=update,
        received_at=time.time(),
        transfer_s=0.0,
    )


def _code(site: SiteName, code: str) -> Reply:
    return Reply(site=site, code=code, statement=None, update=None, received_at=time.time(), transfer_s=0.0)


def client_app(fleet: Fleet) -> ClientApp:
    """The virtual sites' half: whichever site an offer is for answers it."""
    app = ClientApp()

    def train(message: Message, context: Context) -> Message:
        del context  # who answers is named in the offer
        asked = message.content.config_records[wire.OFFER]
        try:
            done = answer(fleet, bytes(asked[wire.ENVELOPE]), Path(str(asked[_STATES])), Path(str(asked[_FOLDER])))  # type: ignore[arg-type]
        except PathfedError as error:
            record = ConfigRecord({wire.CODE: error.code.value, wire.ENVELOPE: b"", _UPDATE: ""})
        else:
            record = ConfigRecord({wire.CODE: "", wire.ENVELOPE: done.statement, _UPDATE: str(done.update)})
        return Message(RecordDict({wire.REPLY: record}), reply_to=message)

    app.train()(train)
    return app


def run_engine(fleet: Fleet, sites: int, processes: int, main: Callable[[Grid], None], ended: threading.Event) -> None:
    """Start Flower's simulation engine with so many virtual sites, and run `main` as its server's half, to its end.

    Args:
        fleet: what the virtual sites share.
        sites: how many.
        processes: how many of them compute at a time.
        main: gets the grid; runs in a thread of its own.
        ended: set when this is interrupted, or the engine has ended: `main` MUST end soon after.

    Raises:
        HostError: PF907, Ray is not installed; PF935, it does not start.
        Exception: whatever `main` raised.
    """
    from flwr.simulation import run_simulation

    app, config = ServerApp(), {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}}

    def serve(grid: Grid, context: Context) -> None:
        del context
        try:
            main(grid)
        except SimulationEndedError:
            _log.info("the server's half has ended with the engine")

    app.main()(serve)

    def engine() -> None:
        try:
            run_simulation(app, client_app(fleet), num_supernodes=sites, backend_config=config)  # type: ignore[arg-type]
        finally:
            ended.set()

    # In a thread: interrupted in the middle, Flower's engine would wait for its own threads for ever. So it is let end.
    with _ray(processes), ThreadPoolExecutor(1) as pool:
        running = pool.submit(engine)
        try:
            running.result()
        finally:
            ended.set()


@contextmanager
def _ray(processes: int) -> Iterator[None]:
    """Ray on this machine, until the block ends. Flower takes the one that runs; its own would be given up after the first failure.

    Ray gives its processes 30 s to start, which a busy machine exceeds. It listens on every address of the machine, so it is told to ask
    for a password, which its own processes inherit.
    """
    os.environ.update(_QUIET, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    try:
        import ray
    except ImportError as error:
        remedy = "pip install 'pathfed[client,server,simulation]'"
        raise HostError(ErrorCode.TOOL_MISSING, "Ray is not installed", value=error.name, remedy=remedy) from None
    terminate = signal.getsignal(signal.SIGTERM)
    for attempt in range(1, _STARTS + 1):
        try:
            ray.init(
                num_cpus=processes,
                object_store_memory=_OBJECT_STORE,
                include_dashboard=False,
                logging_level=logging.WARNING,
                log_to_driver=False,
            )
            break
        except Exception as error:  # Ray has no narrower type for a start that failed
            _log.warning("Ray did not start: %s", error)
            ray.shutdown()
            _end_children()  # those that came up stay behind, and slow the next start down
            if attempt == _STARTS:
                remedy = "look whether the machine is busy or short of memory, and try again"
                raise HostError(
                    ErrorCode.SIMULATION_ENGINE, f"Ray did not start, {_STARTS} times", value=str(error)[:200], remedy=remedy
                ) from None
    signal.signal(signal.SIGTERM, terminate)  # Ray takes it for its own
    try:
        yield
    finally:
        ray.shutdown()


def _end_children() -> None:
    """End every process that this one has started, and theirs."""
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            child.kill()
