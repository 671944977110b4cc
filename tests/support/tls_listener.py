"""A server on loopback that shows a certificate, for tests of those who look at it."""

import contextlib
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

from pathfed_server.transport.certificates import TlsFiles


@contextlib.contextmanager
def listening(folder: Path, tls: TlsFiles) -> Iterator[int]:
    """Answer one connection with `hello` and stay until the client goes; gives the port.

    The certificate and its key are written to `folder`. To close while the client still sends would reset the connection, and a reset
    discards what has arrived and was not read yet: `hello` itself.
    """
    for name, data in {"cert": tls.certificate, "key": tls.key}.items():
        (folder / name).write_bytes(data)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "cert", folder / "key")
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with contextlib.suppress(OSError):
                connection, _ = listener.accept()
                with connection, context.wrap_socket(connection, server_side=True) as secured:
                    secured.settimeout(10)
                    secured.sendall(b"hello")
                    while secured.recv(4096):
                        pass

        thread = threading.Thread(target=serve)
        thread.start()
        yield listener.getsockname()[1]
        thread.join(10)
