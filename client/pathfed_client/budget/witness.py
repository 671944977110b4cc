"""Witnesses: who has seen this ledger's head before, so that a ledger put back to an older state is found.

A chain proves its own order, not that it is the newest: an older copy of the database holds a chain that is whole. What finds it is a head
that somebody saw and that the chain no longer contains. Each witness is asked for itself, and one that contradicts the ledger is enough:

    | witness                                 | kept                        | finds                                     |
    | --------------------------------------- | --------------------------- | ----------------------------------------- |
    | the site's own sealed statements        | in the site database        | an end of the ledger table cut off        |
    | the head file (`HeadKeeper`)            | beside the run secrets      | the database restored, emptied, torn      |
    | heads given from outside                | a file or a run's record    | the whole home or disk restored           |
    | the transparency log                    | at the server and other sites | the same, once the agent has read it    |

A witness that knows nothing yet gives no head; one that cannot be asked raises. It MUST NOT give a head before the entry with it is stored
for good. The ledger asks its witnesses *before* it reads the entries, so that an entry stored in between is no contradiction.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from pathfed_common import digest
from pathfed_common.digest import Digest
from pathfed_common.errors import ErrorCode, HostError, PrivacyError
from pathfed_common.ids import SiteName

_LINE = re.compile(r"(\S+)\s+(\S+)\s+(\S+)")
_REMEDY = (
    "do not train at this site: charges were forgotten. Keep the database as evidence, and compare with the statements that the "
    "operator's records hold: `pathfed-site ledger verify --heads RECORD`"
)


@dataclass(frozen=True, kw_only=True)
class SeenHead:
    """A head that somebody saw.

    Attributes:
        head: digest of the entry, or None where an empty ledger was seen.
        sequence: the entry's number, 0 for an empty ledger, or None where the witness does not say.
        where: who saw it, for people.
    """

    head: Digest | None
    sequence: int | None
    where: str

    def __post_init__(self) -> None:
        if self.head is not None:
            digest.parse(self.head)
        if self.sequence is not None and (isinstance(self.sequence, bool) or not isinstance(self.sequence, int) or self.sequence < 0):
            raise ValueError(f"sequence must be a whole number of at least 0, got {self.sequence!r}")
        if (self.head is None) != (self.sequence == 0):
            raise ValueError(f"an empty ledger has sequence 0 and no head, got sequence {self.sequence!r} and head {self.head!r}")


class HeadsPort(Protocol):
    """A witness of this ledger's heads."""

    def heads(self) -> Sequence[SeenHead]:
        """All that it has seen, or the newest: none where nothing is known yet.

        Raises:
            PrivacyError: PF310, it should know and cannot be asked.
        """
        ...


class HeadKeeper(HeadsPort, Protocol):
    """A witness of our own, kept apart from the database. MUST be durable when `keep` returns, and whole or unchanged if that fails."""

    def keep(self, head: Digest, sequence: int) -> None:
        """Remember the ledger's head. Called once the entry is stored for good, before its charge returns."""
        ...


def check_heads(seen: Sequence[SeenHead], chain: Sequence[Digest]) -> None:
    """Demand that a chain holds every head that was seen, at the place where it was seen.

    Args:
        seen: by all witnesses.
        chain: the digest of each entry, in order.

    Raises:
        PrivacyError: PF309, it does not.
    """
    known = set(chain)
    for one in seen:
        if one.sequence is None:
            if one.head not in known:
                assert one.head is not None, "checked by SeenHead"  # noqa: S101
                raise _behind(f"{one.where} names the head {digest.short(one.head)}, which the ledger does not hold", len(chain))
        elif one.sequence > len(chain):
            raise _behind(f"{one.where} has seen entry {one.sequence}, the ledger ends at {len(chain)}", len(chain))
        elif one.sequence > 0 and chain[one.sequence - 1] != one.head:
            raise _behind(f"{one.where} has seen another entry {one.sequence} than the ledger holds", one.sequence)


def parse_heads(data: bytes, site: SiteName, *, where: str) -> list[SeenHead]:
    """Read the heads of one site from a file made elsewhere; those of other sites are passed over.

    Args:
        data: JSON, a list of objects with "site", "sequence" (or null) and "head"; or text, a line `site sequence sha256:...` each, with -
            for a sequence that is not known, empty lines and lines that begin with # left out.
        site: whose heads are wanted.
        where: what to call the file.

    Raises:
        HostError: PF905, neither of the two forms, or no head of this site in it: nothing would have been compared.
    """
    try:
        text = data.decode("utf-8")
        rows = _json_rows(json.loads(text)) if text.lstrip().startswith("[") else _text_rows(text)
        seen = [SeenHead(head=digest.parse(head), sequence=sequence, where=where) for name, sequence, head in rows if name == site]
    except (ValueError, TypeError, KeyError) as error:
        raise _unusable(f"not a list of ledger heads: {error}", where) from None
    if not seen:
        raise _unusable(f"no head of site {site} is in it, so nothing was compared", where)
    return seen


def _json_rows(raw: object) -> list[tuple[str, int | None, str]]:
    if not isinstance(raw, list) or not all(isinstance(row, Mapping) for row in raw):
        raise ValueError("a list of objects is expected")
    return [(str(row["site"]), row["sequence"], str(row["head"])) for row in raw]


def _text_rows(text: str) -> list[tuple[str, int | None, str]]:
    rows: list[tuple[str, int | None, str]] = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        found = _LINE.fullmatch(line.strip())
        if found is None:
            raise ValueError(f"line {number} is not `site sequence sha256:...`")
        site, sequence, head = found.groups()
        rows.append((site, None if sequence == "-" else int(sequence), head))
    return rows


def _behind(what: str, sequence: int) -> PrivacyError:
    return PrivacyError(ErrorCode.LEDGER_BEHIND, what, where=f"ledger entry {sequence}", remedy=_REMEDY)


def _unusable(what: str, where: str) -> HostError:
    remedy = "give a JSON list of objects with site, sequence and head, or lines `site sequence sha256:...`"
    return HostError(ErrorCode.SETTINGS_INVALID, what, where=where, remedy=remedy)
