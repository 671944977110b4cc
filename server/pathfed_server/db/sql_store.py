"""The server's store: sites, enrolments, certificates, operators, plans, approvals, runs, rounds and the audit trail in one SQL database.

    store = SqlStore("sqlite:////var/lib/pathfed/server.db")
    with store: ...                       # opens: checks that the database is reachable and at this version's schema

It may be used from several threads and processes at once. `migrate(url)` makes or upgrades the database.
"""

from pathfed_server.db.bulk_store import BulkStore
from pathfed_server.db.certificate_store import CertificateStore
from pathfed_server.db.database import migrate
from pathfed_server.db.enrolment_store import EnrolmentStore
from pathfed_server.db.operators_store import OperatorsStore
from pathfed_server.db.rounds_store import RoundsStore

__all__ = ["SqlStore", "migrate"]


class SqlStore(RoundsStore, EnrolmentStore, CertificateStore, OperatorsStore, BulkStore):
    """All of the store in one object; it implements `rounds.ports.RoundStore`. See the parts it is made of for its methods."""
