"""Flower's control API on the server's loopback: register sites' node keys, start and watch Flower runs."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx
from flwr.common.serde import fab_to_proto, user_config_to_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    UnregisterNodeRequest,
)
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from pathfed_common.bundle import bundle_bytes, bundle_hash
from pathfed_common.errors import ErrorCode, RoundError
from pathfed_server.transport.node_keys import read_node_key


def node_key(openssh_text: str) -> bytes:
    """A site's Flower node key in the form SuperLink stores.

    Raises:
        TransportError: PF402, not a public key on a NIST curve in OpenSSH form.
    """
    return public_key_to_bytes(read_node_key(openssh_text))


class FlowerControl:
    """A client of the control API. Use as a context manager."""

    def __init__(self, address: str, ca_file: Path) -> None:
        self._client = ControlHttpClient.from_server_address(
            server_address=address,
            insecure=False,
            root_certificates=ca_file.read_bytes(),
            interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr CLI")],
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._client.close()

    def ensure_nodes(self, keys: Iterable[bytes]) -> None:
        """Register node keys that SuperLink does not know yet, and remove registered ones that are not among `keys`."""
        wanted = set(keys)
        known = {
            bytes(node.public_key): node.node_id
            for node in self._client.ListNodes(ListNodesRequest()).nodes_info
            if node.status != "unregistered"
        }
        for key in wanted - set(known):
            self._client.RegisterNode(RegisterNodeRequest(public_key=key))
        for key in set(known) - wanted:
            self._client.UnregisterNode(UnregisterNodeRequest(node_id=known[key]))

    def start_run(self, config: Mapping[str, str]) -> int:
        """Start a Flower run of the shipped bundle; its number.

        Raises:
            RoundError: PF514, SuperLink did not take it.
            httpx.HTTPError: SuperLink does not answer now.
        """
        fab = Fab(bundle_hash(), bundle_bytes(), {})
        request = StartRunRequest(fab=fab_to_proto(fab), override_config=user_config_to_proto(dict(config)), federation="")
        answer = self._client.StartRun(request)
        if not answer.HasField("run_id"):
            raise RoundError(ErrorCode.RUN_FAILED, "SuperLink did not take the run", value=answer.note or None)
        return int(answer.run_id)

    def run_status(self, run_id: int) -> tuple[str, str]:
        """Status and sub-status of a Flower run, as Flower words them, such as ("finished", "failed").

        ("unknown", ...) where SuperLink does not know it: its database was damaged or lost, and a new one is in its place.

        Raises:
            httpx.HTTPError: SuperLink does not answer now.
        """
        unknown = ("unknown", "SuperLink knows it no more")
        try:
            runs = self._client.ListRuns(ListRunsRequest(run_id=run_id)).run_dict
        except httpx.HTTPStatusError as error:
            if error.response.status_code != httpx.codes.NOT_FOUND:
                raise
            return unknown
        if run_id not in runs:
            return unknown
        return (runs[run_id].status.status, runs[run_id].status.sub_status)

    def stop_run(self, run_id: int) -> None:
        """Ask SuperLink to stop a Flower run."""
        self._client.StopRun(StopRunRequest(run_id=run_id))
