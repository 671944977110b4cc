"""The migrations: they make the declared schema, all or nothing, on SQLite and on PostgreSQL."""

import re
import shutil
import threading
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import CheckConstraint, Engine, create_engine, inspect, text
from sqlalchemy.exc import DatabaseError

from pathfed_common import digest
from pathfed_common.errors import ErrorCode, PathfedError, RoundError
from pathfed_common.ids import RunName, SiteName
from pathfed_common.provenance.keys import VerifyKey
from pathfed_common.provenance.log_leaves import (
    EncoderCommitted,
    PlanApproved,
    PlanPublished,
    SiteAdmitted,
    SiteRevoked,
    StatementLogged,
    read_leaf,
)
from pathfed_common.units import UtcSeconds
from pathfed_server.db import database, schema
from pathfed_server.db.sql_store import SqlStore, migrate
from pathfed_server.rounds.state import RoundState, RunState


def engine_of(url: str) -> Engine:
    return create_engine(url.replace("postgresql://", "postgresql+psycopg://"))


def tables(url: str) -> set[str]:
    engine = engine_of(url)
    try:
        return set(inspect(engine).get_table_names())
    finally:
        engine.dispose()


def test_migrated_schema_is_the_declared_one(url: str) -> None:
    engine = engine_of(url)
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection, opts={"compare_type": True}), schema.metadata) == []
    engine.dispose()


def test_comparison_finds_a_column_that_no_migration_makes(url: str) -> None:
    engine = engine_of(url)
    with engine.begin() as connection:
        connection.execute(text("ALTER TABLE run_site ADD COLUMN extra INTEGER"))
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), schema.metadata) != []
    engine.dispose()


def test_check_constraints_are_the_declared_ones(url: str) -> None:
    engine = engine_of(url)
    inspector = inspect(engine)
    for table in schema.metadata.sorted_tables:
        found = {check["name"] for check in inspector.get_check_constraints(table.name)}
        assert found == {check.name for check in table.constraints if isinstance(check, CheckConstraint)}, table.name
    engine.dispose()


@pytest.mark.parametrize(("table", "states"), [("run", RunState), ("round", RoundState)])
def test_every_state_of_a_run_or_round_can_be_kept_and_no_other(url: str, table: str, states: type[RunState] | type[RoundState]) -> None:
    engine = engine_of(url)
    with engine.begin() as connection:
        for statement in PARENTS:
            connection.execute(text(statement))
    change = text(f"UPDATE {table} SET state = :state, {'committed_at = 1, next_state = state' if table == 'round' else 'attempt = 1'}")
    for state in states:
        with engine.begin() as connection:
            connection.execute(change, {"state": state.value})
    with pytest.raises(DatabaseError, match=f"ck_{table}_state"), engine.begin() as connection:
        connection.execute(change, {"state": "over"})
    engine.dispose()


def test_migrating_twice_changes_nothing(empty_url: str) -> None:
    migrate(empty_url)
    with SqlStore(empty_url) as store:
        store.audit(actor="server", action="test", subject="x", at=1.0)
    migrate(empty_url)
    with SqlStore(empty_url) as store:
        assert [event.subject for event in store.audit_events()] == ["x"]


def test_two_migrations_at_once_make_one_schema(empty_url: str) -> None:
    failed: list[BaseException] = []

    def work() -> None:
        try:
            migrate(empty_url)
        except PathfedError as error:
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    with SqlStore(empty_url) as store:
        assert store.sites() == []


@pytest.fixture
def broken_next_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Migrations with one revision more, which makes a table, fills another and then fails."""
    folder = tmp_path / "migrations"
    shutil.copytree(Path(database.__file__).parent / "migrations", folder)
    source = """
from alembic import op
import sqlalchemy as sa
revision = "broken"
down_revision = "HEAD"
def upgrade():
    op.create_table("half", sa.Column("x", sa.Integer()))
    op.execute("INSERT INTO audit_event (at, actor, action, subject, detail) VALUES (1, 'a', 'a', 'a', '{}')")
    op.execute("INSERT INTO nowhere VALUES (1)")
"""
    (folder / "versions" / "broken.py").write_text(source.replace("HEAD", database.head()))
    monkeypatch.setattr(database, "_MIGRATIONS", folder)


@pytest.mark.usefixtures("broken_next_revision")
def test_failing_migration_rolls_back_whole(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RoundError) as caught:
        migrate(url)
    assert caught.value.code is ErrorCode.DATABASE_SCHEMA
    assert "half" not in tables(url)
    monkeypatch.undo()
    with SqlStore(url) as store:
        assert store.audit_events() == []


@pytest.mark.usefixtures("broken_next_revision")
def test_failing_migration_of_an_empty_database_leaves_it_empty(empty_url: str) -> None:
    with pytest.raises(RoundError):
        migrate(empty_url)
    assert tables(empty_url) == set()


def test_open_refuses_a_database_that_was_never_migrated(empty_url: str, backend: str, tmp_path: Path) -> None:
    if backend == "sqlite":
        (tmp_path / "server.db").touch()
    with pytest.raises(RoundError, match=r"PF513.*found none") as caught:
        SqlStore(empty_url).open()
    assert caught.value.code is ErrorCode.DATABASE_SCHEMA


def test_open_and_migrate_refuse_a_database_of_a_newer_version(url: str) -> None:
    engine = engine_of(url)
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    engine.dispose()
    for action in (SqlStore(url).open, lambda: migrate(url)):
        with pytest.raises(RoundError) as caught:
            action()
        assert caught.value.code is ErrorCode.DATABASE_SCHEMA


def test_missing_sqlite_file_is_told_and_not_made(tmp_path: Path) -> None:
    with pytest.raises(RoundError) as caught:
        SqlStore(f"sqlite:///{tmp_path}/none.db").open()
    assert caught.value.code is ErrorCode.DATABASE_UNAVAILABLE
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("url", ["mysql://u@h/x", "nonsense", "postgresql://u:secret@127.0.0.1:1/x"])
def test_unusable_address_is_told_without_its_password(url: str) -> None:
    with pytest.raises(RoundError) as caught:
        SqlStore(url).open()
    assert caught.value.code is ErrorCode.DATABASE_UNAVAILABLE
    assert "secret" not in str(caught.value)


def test_damaged_sqlite_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "server.db").write_bytes(b"not a database" * 1000)
    with pytest.raises(RoundError) as caught:
        SqlStore(f"sqlite:///{tmp_path}/server.db").open()
    assert caught.value.code is ErrorCode.DATABASE_UNAVAILABLE


FILLED = {
    "audit_event": "INSERT INTO audit_event (seq, at, actor, action, subject, detail) VALUES (1, 1, 'a', 'a', 'a', '{}')",
    "approval": "INSERT INTO approval VALUES ('a', 'p', 1, TRUE, 'e', 1)",
    "decision": "INSERT INTO decision VALUES (1, 'a', 'p', 'revocation', 'e', 'd', 1)",
    "update_statement": "INSERT INTO update_statement VALUES ('r', 1, 'a', 'd', 'e')",
    "log_entry": "INSERT INTO log_entry VALUES (0, 'k', 'l', 'h')",
    "log_checkpoint": "INSERT INTO log_checkpoint VALUES (1, 'n')",
    "cosignature": "INSERT INTO cosignature VALUES (1, 'a', 'l')",
    "release": "INSERT INTO release VALUES ('d', 'r', 1)",
    "site_key": "INSERT INTO site_key (seq, site, kind, key, at) VALUES (1, 'a', 'evidence', 'k', 1)",
}
#: A column of each, and what it is to be changed to.
CHANGES = {
    "audit_event": "at = 2",
    "approval": "envelope = 'changed'",
    "decision": "kind = 'rejection'",
    "update_statement": "envelope = 'changed'",
    "log_entry": "leaf = 'changed'",
    "log_checkpoint": "note = 'changed'",
    "cosignature": "line = 'changed'",
    "release": "released_at = 2",
    "site_key": "site = 'b'",
}
PARENTS = (
    "INSERT INTO site (name, evidence_key, flower_key, state, enrolled_at) VALUES ('a', 'k', 'f', 'enrolled', 1)",
    "INSERT INTO plan (digest, name, canonical, signed, published_at) VALUES ('p', 'p', 'c', 's', 1)",
    "INSERT INTO run (name, plan, state, attempt, failures, planned_at) VALUES ('r', 'p', 'planned', 0, 0, 1)",
    "INSERT INTO round (run, round_index, state, attempt, base_state) VALUES ('r', 1, 'planned', 0, 'b')",
)


@pytest.mark.parametrize("table", schema.APPEND_ONLY)
def test_evidence_can_be_neither_changed_nor_deleted_nor_replaced(url: str, backend: str, table: str) -> None:
    engine = engine_of(url)
    with engine.begin() as connection:
        for statement in (*PARENTS, *([FILLED["log_checkpoint"]] if table == "cosignature" else []), FILLED[table]):
            connection.execute(text(statement))
    attempts = [f"UPDATE {table} SET {CHANGES[table]}", f"DELETE FROM {table}"]
    # A table that others refer to is not emptied without them.
    attempts += [re.sub("^INSERT", "INSERT OR REPLACE", FILLED[table])] if backend == "sqlite" else [f"TRUNCATE {table} CASCADE"]
    for attempt in attempts:
        with pytest.raises(DatabaseError, match="append-only"), engine.begin() as connection:
            connection.execute(text(attempt))
    with engine.connect() as connection:
        assert connection.execute(text(f"SELECT count(*) FROM {table}")).scalar() == 1
    engine.dispose()


@pytest.mark.parametrize("index", [1, 2, -1])
def test_log_takes_the_next_index_alone(url: str, index: int) -> None:
    engine = engine_of(url)
    with pytest.raises(DatabaseError), engine.begin() as connection:
        connection.execute(text(f"INSERT INTO log_entry VALUES ({index}, 'k', 'l', 'h')"))
    with engine.begin() as connection:
        connection.execute(text("INSERT INTO log_entry VALUES (0, 'k', 'l', 'h')"))
    with pytest.raises(DatabaseError), engine.begin() as connection:
        connection.execute(text("INSERT INTO log_entry VALUES (2, 'k', 'l', 'i')"))
    engine.dispose()


BEFORE_THE_LOG = (
    "INSERT INTO site (name, evidence_key, flower_key, state, enrolled_at) VALUES ('a', '{a}', 'f', 'enrolled', 10.5)",
    "INSERT INTO site VALUES ('b', '{b}', 'g', 'revoked', 10.5, 40)",
    "INSERT INTO plan (digest, name, canonical, signed, published_at) VALUES ('{plan}', 'p', 'c', 's', 20)",
    # Approved by a clock that is behind the server's.
    "INSERT INTO approval VALUES ('a', '{plan}', 40, TRUE, '{envelope}', 19)",
    "INSERT INTO run (name, plan, state, attempt, failures, planned_at) VALUES ('r', '{plan}', 'planned', 1, 0, 29)",
    "INSERT INTO round (run, round_index, state, attempt, base_state) VALUES ('r', 1, 'planned', 0, 'x')",
    "INSERT INTO checkpoint VALUES ('r', 0, '{first}', 'p', 1, 'o', 'p', 1, 30)",
    "INSERT INTO checkpoint VALUES ('r', 1, '{second}', 'p', 1, 'o', 'p', 1, 31)",
    "INSERT INTO update_statement VALUES ('r', 1, 'a', '{statement}', 'e')",
)


def test_what_was_recorded_before_there_was_a_log_gets_its_leaves(empty_url: str, backend: str) -> None:
    keys = [VerifyKey(bytes([number]) * 32) for number in (1, 2)]
    plan, first, second, statement = (digest.of_bytes(name) for name in (b"plan", b"first", b"second", b"statement"))
    values = {"a": keys[0].to_text(), "b": keys[1].to_text(), "plan": plan, "first": first, "second": second, "statement": statement}
    engine = engine_of(empty_url)
    with engine.begin() as connection:
        command.upgrade(database.alembic_config(connection), "0001")
        for line in BEFORE_THE_LOG:
            connection.execute(text(line.format(envelope="approval", **values)))
        if backend == "sqlite":  # as the driver keeps bytes
            connection.execute(text("DROP TRIGGER approval_no_update"))
            connection.execute(text("UPDATE approval SET envelope = CAST(envelope AS BLOB)"))
    engine.dispose()
    migrate(empty_url)
    run, a, b = RunName("r"), SiteName("a"), SiteName("b")
    with SqlStore(empty_url) as store:
        assert [read_leaf(leaf) for leaf in store.log_leaves(0, 100)] == [
            SiteAdmitted(site=a, evidence_key=keys[0], at=UtcSeconds(10.5)),
            SiteAdmitted(site=b, evidence_key=keys[1], at=UtcSeconds(10.5)),
            PlanPublished(plan=plan),
            PlanApproved(site=a, plan=plan, approval=digest.of_bytes(b"approval")),
            EncoderCommitted(run=run, round_index=0, state=first),
            StatementLogged(site=a, run=run, round_index=1, statement=statement),
            EncoderCommitted(run=run, round_index=1, state=second),
            SiteRevoked(site=b, at=UtcSeconds(40)),
        ]
        store.revoke_site(a, at=50)
        assert store.log_size() == 9


def test_a_database_that_is_there_is_upgraded_and_nothing_else_becomes_one(empty_url: str, tmp_path: Path) -> None:
    """A server that is started on an empty database, or on none, must not take itself for a new consortium."""
    database.migrate_existing(empty_url) if not empty_url.startswith("sqlite") else None
    engine = engine_of(empty_url)
    with engine.begin() as connection:
        assert MigrationContext.configure(connection).get_current_heads() == ()
        command.upgrade(database.alembic_config(connection), "0001")
    engine.dispose()
    with pytest.raises(RoundError, match="PF513"):
        SqlStore(empty_url).open()
    for _ in range(2):
        database.migrate_existing(empty_url)
        with SqlStore(empty_url) as store:
            assert store.runs() == []
    missing = tmp_path / "missing.db"
    with pytest.raises(RoundError, match="PF512"):
        database.migrate_existing(f"sqlite:///{missing}")
    assert not missing.exists()
