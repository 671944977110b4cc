"""What the stores of sites and enrolments do alike, in the caller's transaction: enrol a site, and end a site's access.

Leaves of the log are returned for the caller to append, which must be the last thing that its transaction does.
"""

from sqlalchemy import Connection, and_, insert, or_, select, update

from pathfed_common.errors import ErrorCode, RoundError
from pathfed_common.ids import SiteName
from pathfed_common.provenance.keys import VerifyKey
from pathfed_common.provenance.log_leaves import SiteAdmitted
from pathfed_common.units import UtcSeconds
from pathfed_server.db.audit_store import add_event
from pathfed_server.db.schema import certificate, enrolment, invitation, site, site_key
from pathfed_server.rounds.state import SiteState


def enrol_site(connection: Connection, name: SiteName, *, evidence_key: str, flower_key: str, at: float, by: str) -> SiteAdmitted:
    """Add a site with its first keys.

    Returns:
        The leaf to append.

    Raises:
        RoundError: PF502, the name or one of the keys is taken; revoked sites keep theirs, and no key is used again.
        ValueError: `evidence_key` is not a public evidence key.
    """
    leaf = SiteAdmitted(site=name, evidence_key=VerifyKey.from_text(evidence_key), at=UtcSeconds(at))
    lock_table(connection, "site")
    holder = connection.execute(
        select(site.c.name)
        .join(site_key, site_key.c.site == site.c.name, isouter=True)
        .where(or_(site.c.name == name, site_key.c.key.in_([evidence_key, flower_key])))
    ).scalar()
    if holder is not None:
        raise RoundError(
            ErrorCode.SITE_EXISTS, "a site has this name or one of these keys already", value=holder, remedy="use a new name and new keys"
        )
    values = {"name": name, "evidence_key": evidence_key, "flower_key": flower_key, "state": SiteState.ENROLLED, "enrolled_at": at}
    connection.execute(insert(site).values(values))
    keys = {"evidence": evidence_key, "flower": flower_key}
    connection.execute(insert(site_key), [{"site": name, "kind": kind, "key": key, "at": at} for kind, key in keys.items()])
    add_event(connection, actor=by, action="site.enrolled", subject=name, at=at, detail={"evidence_key": evidence_key})
    return leaf


def end_access(connection: Connection, name: SiteName, *, at: float) -> None:
    """Revoke every certificate of a site, withdraw its invitations, and refuse what is pending."""
    lives = or_(certificate.c.revoked_at.is_(None), certificate.c.revoked_at > at)
    connection.execute(update(certificate).where(certificate.c.site == name, lives).values(revoked_at=at))
    withdraw_invitations(connection, name, at=at)
    pending = and_(enrolment.c.site == name, enrolment.c.state == "pending")
    connection.execute(update(enrolment).where(pending).values(state="refused", decided_at=at))


def withdraw_invitations(connection: Connection, name: SiteName | None, *, at: float) -> int:
    """Withdraw the invitations of a site, or of every site, that nobody has used.

    Returns:
        How many.
    """
    unused = and_(invitation.c.withdrawn_at.is_(None), invitation.c.secret_hash.not_in(select(enrolment.c.invitation)))
    whose = unused if name is None else and_(unused, invitation.c.site == name)
    return connection.execute(update(invitation).where(whose).values(withdrawn_at=at)).rowcount


def lock_table(connection: Connection, table: str) -> None:
    """On PostgreSQL, let one writer of the table at a time look and then insert. SQLite's transactions do so by themselves."""
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql(f"LOCK TABLE {table} IN SHARE ROW EXCLUSIVE MODE")
