"""SPIFFE ids: the names that certificates of a consortium carry in their subject alternative name.

    spiffe://<consortium>/site/<site>
    spiffe://<consortium>/operator/<operator>

The consortium is the trust domain. Source: https://github.com/spiffe/spiffe/blob/main/standards/SPIFFE-ID.md. Ours are narrower than the
standard: two path segments, each of the form of a site's name, so that an id has one spelling and holds nothing to escape.
"""

from dataclasses import dataclass
from typing import Final, Literal

from pathfed_common.ids import SiteName, consortium_name, operator_name, site_name

Kind = Literal["site", "operator"]

_SCHEME: Final = "spiffe://"


@dataclass(frozen=True)
class Identity:
    """Who a certificate speaks for.

    Attributes:
        consortium: the trust domain.
        kind: a site or an operator.
        name: its name.
    """

    consortium: str
    kind: Kind
    name: str


def site_uri(consortium: str, site: SiteName) -> str:
    """The SPIFFE id of a site.

    Raises:
        ValueError: the consortium's or the site's name is not one.
    """
    return f"{_SCHEME}{consortium_name(consortium)}/site/{site_name(site)}"


def operator_uri(consortium: str, operator: str) -> str:
    """The SPIFFE id of an operator.

    Raises:
        ValueError: the consortium's or the operator's name is not one.
    """
    return f"{_SCHEME}{consortium_name(consortium)}/operator/{operator_name(operator)}"


def parse(uri: str) -> Identity:
    """Read an id back from exactly the form that `site_uri` and `operator_uri` give.

    Raises:
        ValueError: any other text.
    """
    consortium, _, path = uri.removeprefix(_SCHEME).partition("/")
    kind, _, name = path.partition("/")
    if kind == "site" and uri == site_uri(consortium, SiteName(name)):
        return Identity(consortium, "site", name)
    if kind == "operator" and uri == operator_uri(consortium, name):
        return Identity(consortium, "operator", name)
    raise ValueError(f"not the SPIFFE id of a site or an operator: {uri[:200]!r}")
