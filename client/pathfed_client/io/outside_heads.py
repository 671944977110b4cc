"""Heads of this site's ledger that were seen outside this machine, read from what a person hands over.

Either a file of heads (`pathfed_client.budget.witness.parse_heads`), or the folder of a run's record: the statements of this site in it
are signed with the site's own evidence key and name the ledger's head of their time, so that the folder may come from anybody.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from pathfed_client.budget.witness import SeenHead, parse_heads
from pathfed_common import files
from pathfed_common.digest import Digest
from pathfed_common.errors import ErrorCode, HostError
from pathfed_common.ids import SiteName
from pathfed_common.provenance.keys import VerifyKey
from pathfed_common.provenance.statement import UpdateStatement


@dataclass(frozen=True)
class OutsideHeads:
    """A witness that was handed over."""

    seen: tuple[SeenHead, ...]

    def heads(self) -> tuple[SeenHead, ...]:
        """All heads of this site in it."""
        return self.seen

    @classmethod
    def read(cls, path: Path, site: SiteName, key: VerifyKey | Mapping[Digest, VerifyKey]) -> Self:
        """Read heads of `site` from a file, or from a folder that holds a run's record.

        Args:
            path: the file or folder.
            site: this site.
            key: its evidence key, or all it had by key id, for the statements in a record.

        Raises:
            HostError: PF904, it cannot be read; PF905, it names no head of this site, or is not such a file.
            ProvenanceError: PF601, PF602, a statement that bears this site's name is not a statement or not this site's.
        """
        if not path.is_dir():
            return cls(tuple(parse_heads(files.read_given(path), site, where=str(path))))
        statements = sorted(path.rglob(f"statements/round-*/{site}.dsse"))
        if not statements:
            raise HostError(
                ErrorCode.SETTINGS_INVALID,
                f"the folder holds no statement of site {site}, so nothing was compared",
                where=path,
                remedy="give the folder of a run's record in which this site took part",
            )
        return cls(tuple(_stated(statement, key) for statement in statements))


def _stated(path: Path, key: VerifyKey | Mapping[Digest, VerifyKey]) -> SeenHead:
    statement = UpdateStatement.from_envelope(files.read_given(path), key, where=str(path))
    return SeenHead(head=statement.ledger_head, sequence=None, where=f"the statement {path}")
