"""Names that travel: sites and runs.

A site name is chosen by the operator and the hospital together and is public. Run names are made by the server.
"""

import re
from typing import NewType

SiteName = NewType("SiteName", str)
RunName = NewType("RunName", str)

_SITE = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
_RUN = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")


def site_name(text: str) -> SiteName:
    """Check a site name: 1 to 63 lower-case letters, digits or inner hyphens (a DNS label, so that it fits certificates).

    Raises:
        ValueError: it is not of that form.
    """
    if _SITE.fullmatch(text) is None:
        raise ValueError(f"a site name is 1 to 63 of a-z, 0-9 and inner '-', got {text[:80]!r}")
    return SiteName(text)


def run_name(text: str) -> RunName:
    """Check a run name, of the same form as a site name.

    Raises:
        ValueError: it is not of that form.
    """
    if _RUN.fullmatch(text) is None:
        raise ValueError(f"a run name is 1 to 63 of a-z, 0-9 and inner '-', got {text[:80]!r}")
    return RunName(text)
