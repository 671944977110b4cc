"""The site's database: slides, withdrawals, approvals, sealed updates, the ledger, talk with the server, a log book; one SQLite file.

Only the modules of `io.database`, its parts, import a database library. Guarantees:

- every method is one transaction: done whole and flushed to the disk when it returns (`synchronous=FULL`), or not at all; inside
  `together` several methods are one;
- ledger entries are append-only and gapless, and withdrawals are for good, enforced by triggers inside the database;
- several processes of a site may use it at once (WAL, writers wait up to `BUSY_TIMEOUT_S` for each other);
- the file is readable by its owner alone: it holds slide names;
- a database of an earlier version is upgraded when it is opened, whole or not at all (`io.database.schema`).
"""

from pathfed_client.io.database.approvals_part import ApprovalsPart
from pathfed_client.io.database.approvers_part import ApproversPart
from pathfed_client.io.database.connection import BUSY_TIMEOUT_S
from pathfed_client.io.database.ledger_part import LedgerPart
from pathfed_client.io.database.log_book_part import LogBookPart
from pathfed_client.io.database.server_part import ServerPart
from pathfed_client.io.database.slides_part import SlidesPart
from pathfed_client.io.database.withdrawals_part import WithdrawalsPart

__all__ = ["BUSY_TIMEOUT_S", "SiteStore"]


class SiteStore(SlidesPart, WithdrawalsPart, LedgerPart, ApprovalsPart, ApproversPart, ServerPart, LogBookPart):
    """All of a site's database in one object; see the parts it is made of for its methods."""
