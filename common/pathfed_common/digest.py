"""Digests and canonical bytes: the one way pathfed names content.

A digest is the text ``sha256:<64 lower-case hex digits>``. Canonical bytes of a value are its JSON with sorted keys, no spaces, ASCII
only and floats in Python's shortest round-trip form, so that equal values have equal bytes on every machine.
"""

import hashlib
import hmac
import json
import re
from collections.abc import Iterable
from typing import NewType

Digest = NewType("Digest", str)

_FORM = re.compile(r"sha256:[0-9a-f]{64}")


def of_bytes(data: bytes | memoryview) -> Digest:
    """Digest of a byte string."""
    return Digest("sha256:" + hashlib.sha256(data).hexdigest())


def of_chunks(chunks: Iterable[bytes]) -> Digest:
    """Digest of a stream of byte strings, in constant memory."""
    state = hashlib.sha256()
    for chunk in chunks:
        state.update(chunk)
    return Digest("sha256:" + state.hexdigest())


def of_value(value: object) -> Digest:
    """Digest of a JSON value's canonical bytes."""
    return of_bytes(canonical(value))


def canonical(value: object) -> bytes:
    """Canonical JSON bytes of a value.

    Raises:
        ValueError: the value holds a NaN, an infinity, a type JSON does not have, or a key that is not a text.
    """
    try:
        text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    except TypeError as error:
        raise ValueError(f"not a JSON value: {error}") from None
    _check_keys(value)
    return text.encode("ascii")


def _check_keys(value: object) -> None:
    """Python's encoder turns other keys into texts, so that 1 and "1" would have the same bytes."""
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ValueError(f"not a JSON value: keys must be texts, got {key!r}")
            _check_keys(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _check_keys(item)


def parse(text: str) -> Digest:
    """Check that a text has the form of a digest.

    Raises:
        ValueError: it has not.
    """
    if _FORM.fullmatch(text) is None:
        raise ValueError(f"not a digest (sha256:<64 hex>): {text[:80]!r}")
    return Digest(text)


def equal(left: str, right: str) -> bool:
    """Compare two digests in constant time."""
    return hmac.compare_digest(left.encode(), right.encode())


def short(digest: str) -> str:
    """The first 12 hex digits, for people."""
    return digest.removeprefix("sha256:")[:12]
