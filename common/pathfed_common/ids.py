"""Names that travel: consortia, sites, operators and runs.

A site name is chosen by the operator and the hospital together and is public. Run names are made by the server. An operator's name is
that of a person, and stands in the audit trail.
"""

import re
from typing import NewType

SiteName = NewType("SiteName", str)
RunName = NewType("RunName", str)

_LABEL = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")


def site_name(text: str) -> SiteName:
    """Check a site name: 1 to 63 lower-case letters, digits or inner hyphens (a DNS label, so that it fits certificates).

    Raises:
        ValueError: it is not of that form.
    """
    return SiteName(_label("site", text))


def run_name(text: str) -> RunName:
    """Check a run name, of the same form as a site name.

    Raises:
        ValueError: it is not of that form.
    """
    return RunName(_label("run", text))


def consortium_name(text: str) -> str:
    """Check a consortium's name, of the same form as a site name.

    Raises:
        ValueError: it is not of that form.
    """
    return _label("consortium", text)


def operator_name(text: str) -> str:
    """Check an operator's name, of the same form as a site name.

    Raises:
        ValueError: it is not of that form.
    """
    return _label("operator", text)


def _label(what: str, text: str) -> str:
    if _LABEL.fullmatch(text) is None:
        raise ValueError(f"a {what} name is 1 to 63 of a-z, 0-9 and inner '-', got {text[:80]!r}")
    return text
