"""Whether the sites' keys in the database are those that the log names, and that each handed over to the next."""

from sqlalchemy import Connection, RowMapping, select

from pathfed_common.errors import ErrorCode, PathfedError
from pathfed_common.ids import SiteName
from pathfed_common.provenance import dsse
from pathfed_common.provenance.documents import SiteCard, open_card_change
from pathfed_common.provenance.log_leaves import KeyRotated, SiteAdmitted, read_leaf
from pathfed_server.db.log_signed import Finding, ReadLog, subject_of
from pathfed_server.db.schema import site, site_key


def check_keys(connection: Connection, log: ReadLog) -> int:
    """Compare every key of every site; how many there are.

    An evidence key is in the log. A Flower node key is in the signed card that came with it; a site's first is compared with nothing else.
    """
    named = {(name, key.to_text()) for name, keys in log.keys.items() for key in keys}
    latest: dict[tuple[str, str], str] = {}
    rows = connection.execute(select(site_key).order_by(site_key.c.seq)).mappings().all()
    for row in rows:
        first = (row["site"], row["kind"]) not in latest
        if not _follows(row, log, first=first):
            log.findings.append(Finding(ErrorCode.LOG_MISMATCH, f"site_key {row['seq']}", "the key is not one that was handed over to"))
        named.discard((row["site"], row["key"]))
        latest[row["site"], row["kind"]] = row["key"]
    for name, key in sorted(named):
        log.findings.append(Finding(ErrorCode.LOG_MISMATCH, f"site_key of {name}", f"{key} is in the log and no longer in the database"))
    for name, evidence, flower in connection.execute(select(site.c.name, site.c.evidence_key, site.c.flower_key)):
        if (latest.get((name, "evidence")), latest.get((name, "flower"))) != (evidence, flower):
            log.findings.append(Finding(ErrorCode.LOG_MISMATCH, f"site {name}", "its keys are not the latest of its history"))
    return len(rows)


def _follows(row: RowMapping, log: ReadLog, *, first: bool) -> bool:
    if first:
        admitted = log.leaves.get((SiteAdmitted.kind, row["site"]))
        if admitted is None or not isinstance(admitted[1], SiteAdmitted) or (row["at"], row["continuity"]) != (admitted[1].at, None):
            return False
        return bool(row["kind"] == "flower" or row["key"] == admitted[1].evidence_key.to_text())
    continuity = bytes(row["continuity"] or b"")
    try:
        if row["kind"] == "flower" and continuity.startswith(b'{"payload"'):
            return bool(_card(continuity, SiteName(row["site"]), log).flower_key == row["key"])
        handed = read_leaf(continuity)
    except PathfedError:
        return False
    if not isinstance(handed, KeyRotated) or log.leaves.get(subject_of(handed), (0, None))[1] != handed:
        return False
    return bool(handed.site == row["site"] and (row["kind"] == "flower" or handed.new_key.to_text() == row["key"]))


def _card(continuity: bytes, name: SiteName, log: ReadLog) -> SiteCard:
    """The new card that one of the site's evidence keys vouched for."""
    signer = dsse.parse(continuity).key_id
    key = next((key for key in log.keys.get(name, ()) if key.key_id == signer), None)
    return SiteCard.from_bytes(b"" if key is None else open_card_change(continuity, key))
