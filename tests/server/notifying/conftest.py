"""A server that notifies, on a database of either kind, and receivers with certificates of an authority of their own."""

import datetime
import ssl
from collections.abc import Callable

import pytest
from receivers import server_context

from pathfed_server import app
from pathfed_server.home import ServerHome
from pathfed_server.transport.certificates import TlsFiles, make_tls

SECRET = b"0123456789abcdef0123456789abcdef"
PASSWORD = "correct horse battery staple"


@pytest.fixture
def home(tmp_path, url) -> ServerHome:
    return app.init(tmp_path / "server", consortium="lakes", host="127.0.0.1", listen="127.0.0.1", database=url)


@pytest.fixture(scope="session")
def tls() -> TlsFiles:
    return make_tls("receivers", ["127.0.0.1", "localhost"], now=datetime.datetime.now(datetime.UTC))


@pytest.fixture
def context(tmp_path, tls) -> ssl.SSLContext:
    return server_context(tmp_path / "receiver", tls)


@pytest.fixture
def notify(tls) -> Callable[..., None]:
    """Write notify.toml into a home, with the secrets and the receivers' authority beside it."""

    def write(home: ServerHome, text: str) -> None:
        for name, data in {"hook.secret": SECRET + b"\n", "mail.password": PASSWORD.encode() + b"\n"}.items():
            path = home.root / "keys" / name
            path.write_bytes(data)
            path.chmod(0o600)
        (home.root / "receivers.pem").write_bytes(tls.ca_certificate)
        (home.root / "notify.toml").write_text(text)

    return write
