"""Certificates, keys and reports of sites in the server database: who a caller is, and what it may still do.

Who writes of a site locks the site's row first and then, on PostgreSQL, tables, `site` before the others; so does whoever revokes it.
"""

from sqlalchemy import Connection, RowMapping, and_, insert, or_, select, update

from pathfed_common.errors import ErrorCode, TransportError
from pathfed_common.ids import SiteName
from pathfed_common.provenance.documents import SiteCard
from pathfed_common.provenance.log_leaves import KeyRotated
from pathfed_server.db.audit_store import AuditStore, add_event
from pathfed_server.db.log_store import append_leaves
from pathfed_server.db.membership import lock_table
from pathfed_server.db.rows import CertificateRow, SiteKeyRow, SiteReportRow, SiteRow
from pathfed_server.db.schema import certificate, run, run_site, site, site_key, site_report
from pathfed_server.rounds.machine import OPEN
from pathfed_server.rounds.state import SiteState

#: Seconds for which a site's certificate is still taken after the first call with its successor: a process of the site may hold it open.
SUCCESSION_S = 600.0


class CertificateStore(AuditStore):
    """Who calls, and with which keys."""

    def caller(self, serial: str) -> tuple[SiteRow, CertificateRow] | None:
        """The site that a certificate was issued to, and the certificate; None: no certificate has this serial."""
        columns = [column.label(f"c_{column.name}") for column in certificate.c]
        query = select(site, *columns).join(certificate, certificate.c.site == site.c.name).where(certificate.c.serial == serial)
        with self._read() as connection:
            row = connection.execute(query).mappings().first()
        if row is None:
            return None
        who = {name: row[name] for name in site.c.keys()}  # noqa: SIM118 - a column collection, not a dict
        held = {column.name: row[f"c_{column.name}"] for column in certificate.c}
        return SiteRow(**{**who, "state": SiteState(who["state"])}), CertificateRow(**held)

    def note_first_use(self, used: CertificateRow, *, at: float) -> None:
        """The site has its new certificate at hand: those before it end soon."""
        with self._write() as connection:
            _lock_site(connection, used.site)
            here = and_(certificate.c.serial == used.serial, certificate.c.first_used_at.is_(None))
            if connection.execute(update(certificate).where(here).values(first_used_at=at)).rowcount == 0:
                return
            lasting = or_(certificate.c.revoked_at.is_(None), certificate.c.revoked_at > at + SUCCESSION_S)
            before = and_(certificate.c.site == used.site, certificate.c.serial != used.serial, lasting)
            connection.execute(update(certificate).where(before).values(revoked_at=at + SUCCESSION_S))

    def renew(self, issued: CertificateRow, *, holds: str, at: float) -> CertificateRow:
        """Keep a site's further certificate; those that it got before and never used end, but for the one that it calls with.

        Returns:
            The certificate; an earlier one, where it was issued for this key and stands: the reply got lost.

        Raises:
            TransportError: PF414, the key is that of the certificate the site calls with, or of another one that does not stand; PF415, the
                site is revoked.
        """
        with self._write() as connection:
            if _lock_site(connection, issued.site)["state"] != SiteState.ENROLLED:
                raise TransportError(ErrorCode.IDENTITY_REFUSED, "the site is revoked", value=issued.site)
            lock_table(connection, "certificate")
            row = connection.execute(select(certificate).where(certificate.c.tls_key == issued.tls_key)).mappings().first()
            if row is not None:
                before = CertificateRow(**row)
                if before.site != issued.site or before.serial == holds or not before.stands(at):
                    raise _key_taken()
                return before
            unused = and_(certificate.c.site == issued.site, certificate.c.serial != holds, certificate.c.first_used_at.is_(None))
            connection.execute(update(certificate).where(unused, certificate.c.revoked_at.is_(None)).values(revoked_at=at))
            add_certificate(connection, issued, at=at)
            detail = {"serial": issued.serial, "before": holds}
            add_event(connection, actor=f"site:{issued.site}", action="certificate.renewed", subject=issued.site, at=at, detail=detail)
        return issued

    def certificates(self, name: SiteName | None = None) -> list[CertificateRow]:
        """The certificates of a site or of all, the oldest first."""
        query = select(certificate).order_by(certificate.c.issued_at, certificate.c.serial)
        with self._read() as connection:
            rows = connection.execute(query if name is None else query.where(certificate.c.site == name)).mappings().all()
        return [CertificateRow(**row) for row in rows]

    def certificate(self, serial: str) -> CertificateRow:
        """One certificate, by a serial that the database names.

        Raises:
            LookupError: there is none.
        """
        with self._read() as connection:
            row = connection.execute(select(certificate).where(certificate.c.serial == serial)).mappings().first()
        if row is None:
            raise LookupError(f"no certificate {serial}")
        return CertificateRow(**row)

    def rotate_keys(self, card: SiteCard, *, before: SiteRow, continuity: bytes, leaf: KeyRotated | None, at: float) -> None:
        """Put a site's new evidence key or Flower node key, or both, in the place of those it had.

        Args:
            card: the site's new card.
            before: the site as it was when the change was checked.
            continuity: what the evidence key before signed to hand over.
            leaf: the log's leaf where the evidence key is another; None where it stays.
            at: UTC seconds.

        Raises:
            TransportError: PF418, a key was in use before, the site's keys have changed since, or it takes part in a run that is planned
                or going.
        """
        old = {"evidence": before.evidence_key, "flower": before.flower_key}
        new = {"evidence": card.evidence_key.to_text(), "flower": card.flower_key}
        changed = {kind: key for kind, key in new.items() if key != old[kind]}
        with self._write() as connection:
            here = _lock_site(connection, before.name)
            lock_table(connection, "site")
            lock_table(connection, "site_key")
            if (here["evidence_key"], here["flower_key"]) != (old["evidence"], old["flower"]):
                raise _rotation_refused("the site's keys have changed meanwhile")
            if connection.execute(select(site_key.c.seq).where(site_key.c.key.in_(changed.values()))).first() is not None:
                raise _rotation_refused("the key was in use before")
            # A run's record names the evidence key, and its round loop sends to the node key that it began with.
            if _takes_part(connection, before.name):
                raise _rotation_refused("the site takes part in a run that is planned or going")
            values = {"evidence_key": new["evidence"], "flower_key": new["flower"]}
            connection.execute(update(site).where(site.c.name == before.name).values(values))
            rows = [{"site": before.name, "kind": kind, "key": key, "continuity": continuity, "at": at} for kind, key in changed.items()]
            connection.execute(insert(site_key), rows)
            add_event(connection, actor=f"site:{before.name}", action="keys.rotated", subject=before.name, at=at, detail=changed)
            if leaf is not None:
                append_leaves(connection, [leaf])

    def site_keys(self, name: SiteName) -> list[SiteKeyRow]:
        """Every key a site has or had, the oldest first."""
        with self._read() as connection:
            rows = connection.execute(select(site_key).where(site_key.c.site == name).order_by(site_key.c.seq)).mappings().all()
        return [SiteKeyRow(**row) for row in rows]

    def note_report(self, told: SiteReportRow) -> None:
        """Keep what a site says of itself, in the place of what it said before."""
        with self._write() as connection:
            lock_table(connection, "site_report")
            values = vars(told)
            if connection.execute(update(site_report).where(site_report.c.site == told.site).values(values)).rowcount == 0:
                connection.execute(insert(site_report).values(values))

    def reports(self) -> dict[SiteName, SiteReportRow]:
        """What each site last said of itself."""
        with self._read() as connection:
            rows = connection.execute(select(site_report)).mappings().all()
        return {row["site"]: SiteReportRow(**row) for row in rows}


def add_certificate(connection: Connection, issued: CertificateRow, *, at: float) -> None:
    """Add a certificate in the caller's transaction.

    Raises:
        TransportError: PF414, its key has one already.
    """
    if connection.execute(select(certificate.c.serial).where(certificate.c.tls_key == issued.tls_key)).first() is not None:
        raise _key_taken()
    connection.execute(insert(certificate).values({**vars(issued), "issued_at": at}))


def _lock_site(connection: Connection, name: SiteName) -> RowMapping:
    return connection.execute(select(site).where(site.c.name == name).with_for_update()).mappings().one()


def _takes_part(connection: Connection, name: SiteName) -> bool:
    going = and_(run_site.c.site == name, run_site.c.left_at.is_(None), run.c.state.in_(sorted(OPEN)))
    return connection.execute(select(run.c.name).join(run_site, run_site.c.run == run.c.name).where(going)).first() is not None


def _key_taken() -> TransportError:
    return TransportError(ErrorCode.CERTIFICATE_REQUEST, "the TLS key has a certificate already", remedy="make a new key")


def _rotation_refused(what: str) -> TransportError:
    return TransportError(ErrorCode.ROTATION_REFUSED, what)
