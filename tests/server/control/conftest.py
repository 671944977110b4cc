"""A server's control plane on loopback, in this process: real gRPC, real TLS, a real database."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import grpc
import pytest
from control_peer import Peer, code_of, enroll

from pathfed_common.ids import SiteName
from pathfed_server import app, members
from pathfed_server.control import start_control
from pathfed_server.db.sql_store import SqlStore
from pathfed_server.home import ServerHome

Refused = Callable[..., AbstractContextManager[None]]


@pytest.fixture
def serving(server_home: ServerHome) -> Iterator[ServerHome]:
    """A home whose control plane listens."""
    with SqlStore(server_home.database_url) as store:
        listening = start_control(server_home, store)
        try:
            yield server_home
        finally:
            listening.stop(0)


@pytest.fixture
def store(server_home: ServerHome) -> Iterator[SqlStore]:
    """The home's database, as another process would have it open."""
    with SqlStore(server_home.database_url) as opened:
        yield opened


@pytest.fixture
def enrolled(serving: ServerHome) -> Callable[[str], Peer]:
    """A site that has gone the whole way: invited, asked, compared, admitted."""

    def make(name: str) -> Peer:
        peer, invitation = Peer.make(name), members.invite(serving.root, SiteName(name), hours=1).text
        enroll(serving, peer.request(invitation))
        members.admit(serving.root, peer.name, peer.fingerprint)
        return peer.certified(enroll(serving, peer.request(invitation)))

    return make


@pytest.fixture
def refused() -> Refused:
    """`with refused("PF412", grpc.StatusCode.UNAUTHENTICATED): ...`: the call in it is answered so, and with a constant text."""

    @contextmanager
    def expect(code: str | None, status: grpc.StatusCode | None = None) -> Iterator[None]:
        with pytest.raises(grpc.RpcError) as caught:
            yield
        assert code_of(caught.value) == code, caught.value
        if status is not None:
            assert caught.value.code() is status

    return expect


@pytest.fixture
def plan(serving: ServerHome, plan_file: Path) -> str:
    """A published plan's digest."""
    return app.publish_plan(serving.root, plan_file, plan_file.with_suffix(".dsse")).digest
