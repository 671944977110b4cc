"""Reading what a client said over TLS 1.3, from the bytes on the wire and a key log (SSLKEYLOGFILE): RFC 8446, sections 5 and 7."""

from collections.abc import Iterator
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

_HANDSHAKE, _DATA, _ENCRYPTED = 22, 23, 23
_FINISHED = 20
#: Header, inner content type and authentication tag of a record.
RECORD_OVERHEAD = 5 + 1 + 16
_RANDOM = slice(5 + 4 + 2, 5 + 4 + 2 + 32)


class KeyLog:
    """The secrets of a key log file, by label and client random."""

    def __init__(self, path: Path) -> None:
        self._secrets: dict[tuple[str, bytes], bytes] = {}
        for line in path.read_text(encoding="ascii").splitlines():
            if line and not line.startswith("#"):
                label, random, secret = line.split()
                self._secrets[label, bytes.fromhex(random)] = bytes.fromhex(secret)

    def secret(self, label: str, random: bytes) -> bytes:
        """Raises KeyError where the connection is not in the log."""
        return self._secrets[label, random]


def records(stream: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    """The whole TLS records of a stream: type, header, body."""
    start = 0
    while start + 5 <= len(stream):
        size = int.from_bytes(stream[start + 3 : start + 5], "big")
        if start + 5 + size > len(stream):
            return
        yield stream[start], stream[start : start + 5], stream[start + 5 : start + 5 + size]
        start += 5 + size


def client_said(stream: bytes, log: KeyLog) -> bytes:
    """What the client of a connection sent, decrypted; empty where it ended before it said anything.

    Raises:
        ValueError: not TLS 1.3 from its beginning.
        KeyError: the log has no secret for it.
    """
    if len(stream) < 64 or stream[0] != _HANDSHAKE:
        raise ValueError("does not begin with a ClientHello")
    random = stream[_RANDOM]
    encrypted = [(header, body) for kind, header, body in records(stream) if kind == _ENCRYPTED]
    if not encrypted:
        return b""
    handshake = log.secret("CLIENT_HANDSHAKE_TRAFFIC_SECRET", random)
    key, finished = next((key, inner) for key in _keys(handshake) if (inner := key.open(*encrypted[0])) is not None)
    if finished[-1] != _HANDSHAKE:
        return b""  # an alert: the certificate was refused
    if finished[0] != _FINISHED:
        raise ValueError(f"the client's first encrypted message is of type {finished[0]}, expected Finished")
    application = key.again(log.secret("CLIENT_TRAFFIC_SECRET_0", random))
    said = b""
    for header, body in encrypted[1:]:
        inner = application.open(header, body)
        if inner is None:
            raise ValueError("a record cannot be opened: not from the beginning, or bytes are missing")
        if inner[-1] == _DATA:
            said += inner[:-1]
    return said


class _Key:
    """One direction's key: its secret, cipher and running number."""

    def __init__(self, secret: bytes, cipher: type[AESGCM] | type[ChaCha20Poly1305], size: int) -> None:
        self._cipher, self._size = cipher, size
        self._aead = cipher(_expand(secret, b"key", size))
        self._iv = int.from_bytes(_expand(secret, b"iv", 12), "big")
        self._number = 0

    def again(self, secret: bytes) -> "_Key":
        return _Key(secret, self._cipher, self._size)

    def open(self, header: bytes, body: bytes) -> bytes | None:
        """A record's content with its type as the last byte; None where it does not open."""
        nonce = (self._iv ^ self._number).to_bytes(12, "big")
        try:
            inner = self._aead.decrypt(nonce, body, header)
        except InvalidTag:
            return None
        self._number += 1
        return inner.rstrip(b"\0")


def _keys(secret: bytes) -> list[_Key]:
    if len(secret) == 48:
        return [_Key(secret, AESGCM, 32)]
    return [_Key(secret, AESGCM, 16), _Key(secret, ChaCha20Poly1305, 32)]


def _expand(secret: bytes, label: bytes, size: int) -> bytes:
    full = b"tls13 " + label
    info = size.to_bytes(2, "big") + bytes([len(full)]) + full + b"\0"
    return HKDFExpand(hashes.SHA384() if len(secret) == 48 else hashes.SHA256(), size, info).derive(secret)
