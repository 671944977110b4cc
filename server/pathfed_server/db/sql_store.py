"""The server's store: sites, enrolments, certificates, operators, plans, approvals, runs, rounds, events and more in one SQL database.

    store = SqlStore("sqlite:////var/lib/pathfed/server.db")
    with store: ...                       # opens: checks that the database is reachable and at this version's schema

It may be used from several threads and processes at once. `migrate(url)` makes or upgrades the database,
`migrate_existing(url)` upgrades one that is there.
"""

from pathfed_server.db.bulk_store import BulkStore
from pathfed_server.db.certificate_store import CertificateStore
from pathfed_server.db.database import migrate, migrate_existing
from pathfed_server.db.enrolment_store import EnrolmentStore
from pathfed_server.db.notify_store import NotifyStore
from pathfed_server.db.operators_store import OperatorsStore
from pathfed_server.db.quarantine_store import QuarantineStore
from pathfed_server.db.rounds_store import RoundsStore
from pathfed_server.db.standing_store import StandingStore
from pathfed_server.db.watch_store import WatchStore

__all__ = ["SqlStore", "migrate", "migrate_existing"]


class SqlStore(
    RoundsStore, QuarantineStore, StandingStore, EnrolmentStore, CertificateStore, OperatorsStore, BulkStore, WatchStore, NotifyStore
):
    """All of the store in one object; it implements `rounds.ports.RoundStore`. See the parts it is made of for its methods."""
