"""TLS of the gRPC ports: certificates are read from their files, and read again when these have changed."""

import grpc

from pathfed_common import files
from pathfed_server.transport.authority import AuthorityFiles


def server_credentials(where: AuthorityFiles, *, asks_clients: bool) -> grpc.ServerCredentials:
    """TLS with the server's certificate and the chain to its authority.

    Args:
        where: the files.
        asks_clients: whether callers must show a certificate from a trusted authority.

    Raises:
        HostError: PF904, PF906, a file is missing or a key may be read by others.
    """
    watched = (where.server_certificate, where.server_key, where.bundle)

    def stamp() -> tuple[int, ...]:
        return tuple(path.stat().st_mtime_ns if path.exists() else 0 for path in watched)

    def read() -> grpc.ServerCertificateConfiguration:
        pair = (files.read_secret(where.server_key), files.read_given(where.server_certificate))
        return grpc.ssl_server_certificate_configuration([pair], files.read_given(where.bundle) if asks_clients else None)

    seen = stamp()

    held = read()

    def latest() -> grpc.ServerCertificateConfiguration:
        """Asked at each handshake. An error here leaves the certificates as they are."""
        nonlocal seen, held
        now = stamp()
        if now != seen:
            held, seen = read(), now
        return held

    return grpc.dynamic_ssl_server_credentials(held, latest, require_client_authentication=asks_clients)
