"""`log verify` finds every change of every row of evidence, made behind the triggers' back; on SQLite and on PostgreSQL."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sqlalchemy import Connection, Table, and_, delete, insert, select, text, update
from sqlalchemy.exc import DatabaseError
from tests.server.rounds.consortium import KEYS, NAMES, RUN, found, make_plan

from pathfed_common import digest
from pathfed_common.errors import ErrorCode
from pathfed_common.ids import SiteName
from pathfed_common.provenance.documents import REVOCATION, Decision, SiteCard, seal_card_change, seal_plan
from pathfed_common.provenance.keys import SigningKey
from pathfed_common.provenance.log_checkpoint import cosign_checkpoint, log_key, open_checkpoint, origin_of
from pathfed_common.provenance.log_leaves import PlanPublished, rotate_key
from pathfed_common.provenance.note import Note
from pathfed_common.units import UtcSeconds
from pathfed_server.db import schema
from pathfed_server.db.log_check import LogReport, check_connection, check_log
from pathfed_server.db.rows import DecisionRow
from pathfed_server.db.sql_store import SqlStore
from pathfed_server.provenance.log_keeper import LogKeeper

SERVER, ORIGIN = KEYS[SiteName("server")], origin_of("test")
KEY = log_key(ORIGIN, SERVER.public)
AT = 1_795_470_000.5
#: Tables of evidence, and those whose rows must agree with them.
TABLES = (
    schema.site,
    schema.site_key,
    schema.plan,
    schema.approval,
    schema.decision,
    schema.update_statement,
    schema.checkpoint,
    schema.release,
    schema.log_entry,
    schema.log_checkpoint,
    schema.cosignature,
)
#: What no leaf and no signature holds, as the module's docstring says.
UNHELD = {
    *("site_key.at, evidence", "site_key.at, flower", "site_key.seq, flower"),
    "site_key.key, flower",
    "decision.seq",
    "plan.published_at",
    "release.released_at",
    *("site.suspended_at", "site.reinstated_at"),
    *(f"checkpoint.{name}" for name in ("state_path", "state_bytes", "optimiser", "optimiser_path", "optimiser_bytes", "committed_at")),
}


@pytest.fixture
def evidence(url: str, tmp_path: Path) -> Iterator[SqlStore]:
    """A whole run with its release, a revoked site, a rotated key, and a cosigned log that went on afterwards."""
    torch.set_num_threads(1)
    (tmp_path / "home").mkdir()
    made = found(tmp_path / "home", make_plan(), NAMES, url=url)
    made.drive()
    store = made.store
    store.add_release(digest.of_bytes(b"release"), run=RUN, at=AT)
    given = digest.of_bytes(store.approvals(made.plan.digest)[0].envelope)
    word = Decision(site=NAMES[0], plan=made.plan.digest, kind=REVOCATION, approval=given, reason="", decided_at=UtcSeconds(AT))
    kept = {name: getattr(word, name) for name in ("site", "plan", "kind", "approval", "decided_at")}
    store.add_decision(DecisionRow(**kept, envelope=word.to_bytes(KEYS[NAMES[0]])), at=AT)
    store.revoke_site(NAMES[2], at=AT)
    new = SigningKey.generate()
    leaf = rotate_key(NAMES[1], KEYS[NAMES[1]], new, UtcSeconds(AT))
    card = SiteCard(site=NAMES[1], evidence_key=new.public, flower_key=store.site(NAMES[1]).flower_key)
    store.rotate_keys(card, before=store.site(NAMES[1]), continuity=leaf.to_bytes(), leaf=leaf, at=AT)
    again = replace(card, flower_key="another")
    change = seal_card_change(again.to_bytes(new), new)
    store.rotate_keys(again, before=store.site(NAMES[1]), continuity=change, leaf=None, at=AT)
    log = LogKeeper(store, SERVER, ORIGIN, least_interval_s=0.0)
    for _ in range(2):
        served = log.checkpoint(0)
        opened = open_checkpoint(Note.from_bytes(served.note), KEY)
        for name, key in ((NAMES[0], KEYS[NAMES[0]]), (NAMES[1], new)):
            log.cosign(name, served.size, cosign_checkpoint(opened, name, key, at=int(AT)).to_line().encode())
        other = make_plan(rounds=3 + served.size)
        store.add_plan(other.digest, name="tiny", canonical=other.canonical_bytes(), signed=seal_plan(other, SERVER), at=AT)
    yield store
    store.close()


def unguard(connection: Connection) -> None:
    """What someone with the database's files can do, until this transaction is rolled back."""
    if connection.dialect.name == "sqlite":
        for name in connection.execute(text("SELECT name FROM sqlite_master WHERE type = 'trigger'")).scalars().all():
            connection.execute(text(f"DROP TRIGGER {name}"))
        connection.execute(text("PRAGMA defer_foreign_keys=ON"))
    else:
        connection.execute(text("SET session_replication_role = replica"))


def changed(table: Table, column: str, row: Any) -> Any:
    """Another value that a careful forger could put there."""
    value = row[column]
    if isinstance(value, bytes | memoryview):
        raw = bytearray(bytes(value))
        raw[len(raw) // 2] ^= 1
        return bytes(raw)
    if column in ("state",) and table is schema.site:
        return "enrolled" if value == "revoked" else "revoked"
    if table is schema.decision and column == "kind":
        return "rejection"
    if isinstance(value, str) and table is schema.site_key and column == "kind":
        return "flower" if value == "evidence" else "evidence"
    if column in ("site", "name") and table.name in ("approval", "decision", "update_statement", "cosignature", "site", "site_key"):
        return "d-hospital"
    if isinstance(value, str) and value.startswith("sha256:"):
        return digest.of_bytes(value.encode())
    if isinstance(value, str) and value.startswith("ed25519:"):
        return SigningKey.generate().public.to_text()
    if isinstance(value, bool):
        return not value
    if value is None:
        return b"x" if column == "continuity" else 1.5
    return f"{value}x" if isinstance(value, str) else value + 1


def here(table: Table, row: Any) -> Any:
    return and_(*(table.c[column.name] == row[column.name] for column in table.primary_key))


def after(store: SqlStore, *statements: Any) -> LogReport | None:
    """The report once these have been carried out past the triggers; None: the database itself refuses them. Nothing stays."""
    with store._engine.connect() as connection, connection.begin() as transaction:
        try:
            unguard(connection)
            for statement in statements:
                connection.execute(statement)
            return check_connection(connection, KEY)
        except DatabaseError:
            return None
        finally:
            transaction.rollback()


def rows_of(store: SqlStore, table: Table) -> list[Any]:
    with store.snapshot() as connection:
        return list(connection.execute(select(table).order_by(*table.primary_key)).mappings())


def test_everything_agrees_where_nothing_was_changed(evidence: SqlStore) -> None:
    report = check_log(evidence, KEY)
    assert report.findings == ()
    assert report.leaves == evidence.log_size() > 15
    assert (report.checkpoints, report.cosignatures) == (2, 4)
    assert report.rows == sum(len(rows_of(evidence, table)) for table in (*TABLES[:8], schema.round_))


def test_every_changed_value_of_every_row_is_found(evidence: SqlStore) -> None:
    unfound: set[str] = set()
    tried = 0
    for table in TABLES:
        for row in rows_of(evidence, table):
            for column in table.c:
                value = changed(table, column.name, row)
                report = after(evidence, update(table).where(here(table, row)).values({column.name: value}))
                tried += report is not None
                if report is not None and not report.findings:
                    unfound.add(f"{table.name}.{column.name}" + (f", {row['kind']}" if table is schema.site_key else ""))
    assert unfound == UNHELD
    assert tried > 100


def test_every_deleted_row_is_found(evidence: SqlStore) -> None:
    for table in (*TABLES[:9], schema.log_checkpoint):
        for row in rows_of(evidence, table):
            report = after(evidence, delete(table).where(here(table, row)))
            last = table is schema.log_checkpoint and row["size"] == max(each["size"] for each in rows_of(evidence, table))
            assert report is not None
            assert report.findings or last, (table.name, dict(row))


def test_cosignature_that_is_gone_is_not_found_but_shows_in_the_quorum(evidence: SqlStore) -> None:
    """A cosignature is the site's, given for others to see; the log does not hold it. Taking it away only weakens the operator's case."""
    row = rows_of(evidence, schema.cosignature)[0]
    report = after(evidence, delete(schema.cosignature).where(here(schema.cosignature, row)))
    assert report is not None
    assert report.findings == ()
    assert report.cosignatures == 3


def test_every_row_that_came_without_a_leaf_is_found(evidence: SqlStore) -> None:
    for table in TABLES:
        row = rows_of(evidence, table)[-1]
        fresh = {column.name for column in table.c if column.primary_key or column.unique}
        new = {name: changed(table, name, row) if name in fresh else value for name, value in row.items()}
        if table is schema.log_entry:
            leaf = PlanPublished(plan=digest.of_bytes(b"never published"))
            new = {"leaf_index": evidence.log_size(), "kind": leaf.kind, "leaf": leaf.to_bytes(), "leaf_hash": leaf.hash}
        report = after(evidence, insert(table).values(new))
        assert report is not None, table.name
        assert report.findings, table.name


def test_row_and_leaf_changed_together_are_found_where_they_were_signed(evidence: SqlStore) -> None:
    """A careful forger replaces a plan, its leaf and the leaf's hash."""
    plan = make_plan(rounds=9)
    old = next(row for row in rows_of(evidence, schema.plan) if row["digest"] == make_plan().digest)
    leaf, entries = PlanPublished(plan=plan.digest), rows_of(evidence, schema.log_entry)
    place = next(row for row in entries if bytes(row["leaf"]) == PlanPublished(plan=old["digest"]).to_bytes())
    forged = {"digest": plan.digest, "canonical": plan.canonical_bytes(), "signed": seal_plan(plan, SERVER)}
    report = after(
        evidence,
        update(schema.log_entry).where(here(schema.log_entry, place)).values(leaf=leaf.to_bytes(), leaf_hash=leaf.hash),
        insert(schema.plan).values({**old, **forged}),
        update(schema.approval).where(schema.approval.c.plan == old["digest"]).values(plan=plan.digest),
        update(schema.run).values(plan=plan.digest),
        delete(schema.plan).where(here(schema.plan, old)),
    )
    assert report is not None
    assert {finding.code for finding in report.findings} == {ErrorCode.LOG_DAMAGED, ErrorCode.LOG_MISMATCH}


def test_rounds_and_participations_that_contradict_their_evidence_are_found(evidence: SqlStore) -> None:
    other = digest.of_bytes(b"other")
    round_, part = schema.round_, schema.participation
    for statement in (
        update(round_).where(round_.c.round_index == 1).values(next_state=other),
        update(round_).where(round_.c.round_index == 2).values(base_state=other),
        update(part).where(part.c.site == NAMES[0], part.c.round_index == 1).values(update_digest=other),
        update(part).where(part.c.site == NAMES[0], part.c.round_index == 1).values(statement=other),
        update(part).where(part.c.site == NAMES[0], part.c.round_index == 2).values(epsilon_plan=0.1),
        update(part).where(part.c.site == NAMES[0], part.c.round_index == 2).values(epsilon_total=0.1),
        delete(part).where(part.c.site == NAMES[1]),
    ):
        report = after(evidence, statement)
        assert report is not None
        assert [finding.code for finding in report.findings][:1] == [ErrorCode.LOG_MISMATCH]


def test_another_servers_key_finds_every_checkpoint_and_plan(evidence: SqlStore) -> None:
    stranger = log_key(ORIGIN, KEYS[SiteName("stranger")].public)
    rows = {finding.row.split(" ")[0] for finding in check_log(evidence, stranger).findings}
    assert {"log_checkpoint", "plan"} <= rows
