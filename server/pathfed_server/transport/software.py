"""What a site says of its software: shown to people, so only what a version can hold."""

import re

from pathfed_common.errors import ErrorCode, TransportError

_VERSION = re.compile(r"[A-Za-z0-9.+!_-]{1,40}")


def check_software(text: str) -> str:
    """Check a version that a site states.

    Raises:
        TransportError: PF416, empty, too long, or other letters.
    """
    if _VERSION.fullmatch(text) is None:
        raise TransportError(ErrorCode.REQUEST_REFUSED, "not a version", value=repr(text[:40]))
    return text
