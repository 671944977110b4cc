"""Holds the database against the log: whether every row is what its leaf says, and every leaf and checkpoint what was signed.

Leaves were written in the transactions of the rows, so the two agree unless someone changed one of them past pathfed. What is compared:

| table | with |
| --- | --- |
| log_entry, log_checkpoint, cosignature | each other and the signatures, see `log_signed` |
| site, site_key | admission, revocation and key rotations; a later Flower node key, with the card that the evidence key vouched for |
| plan | its leaf, its own digest, the server's signature |
| approval, decision | its leaf, the site's signature, and in every column what the envelope says |
| update_statement, participation | the same |
| checkpoint, round | the leaf of the round's state |
| release | its leaf |

Not found is what no leaf holds: a site's first Flower node key, unless it is in use, or one that came with a new evidence key; times of
rotation, publication, release and commit; whether a site is suspended; places and sizes of files; the optimiser's digest; the audit
trail.

Leaves after the last signed checkpoint are compared with the rows alone: who changes a row and its leaf before a
checkpoint is signed is found by the site that keeps the envelope, and cosigns nothing without its leaf.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from sqlalchemy import Connection, RowMapping, and_, select

from pathfed_common import digest
from pathfed_common.errors import ErrorCode, PathfedError, ProvenanceError
from pathfed_common.provenance import dsse
from pathfed_common.provenance.documents import Approval, Decision, open_plan
from pathfed_common.provenance.keys import VerifyKey
from pathfed_common.provenance.log_leaves import (
    AnyLeaf,
    EncoderCommitted,
    PlanApproved,
    PlanDecided,
    PlanPublished,
    Released,
    SiteAdmitted,
    SiteRevoked,
    StatementLogged,
)
from pathfed_common.provenance.note import NoteKey
from pathfed_common.provenance.statement import UpdateStatement
from pathfed_server.db.database import Database
from pathfed_server.db.log_keys import check_keys
from pathfed_server.db.log_signed import Finding, ReadLog, read_log, subject_of
from pathfed_server.db.schema import approval, checkpoint, decision, participation, plan, release, round_, site, update_statement

#: Kinds that are compared row by row; admissions, revocations and rotations are compared as what they lead to.
_BY_ROW = (PlanPublished.kind, PlanApproved.kind, PlanDecided.kind, StatementLogged.kind, EncoderCommitted.kind, Released.kind)
#: A row's name, the leaf it should have, and what is wrong with the row by itself, if anything.
_Row = tuple[str, AnyLeaf, str | None]


@dataclass(frozen=True)
class LogReport:
    """What was compared, and what does not hold.

    Attributes:
        leaves: leaves in the log.
        checkpoints: signed checkpoints.
        cosignatures: lines under them.
        rows: rows of other tables that were compared.
        findings: what does not hold; empty: everything does.
    """

    leaves: int
    checkpoints: int
    cosignatures: int
    rows: int
    findings: tuple[Finding, ...]


def check_log(database: Database, key: NoteKey) -> LogReport:
    """Compare everything, as it is at one instant.

    Args:
        database: open.
        key: the log's key, which is the server's evidence key under the log's origin.
    """
    with database.snapshot() as connection:
        return check_connection(connection, key)


def check_connection(connection: Connection, key: NoteKey) -> LogReport:
    """The same, in the caller's transaction, which sees one state."""
    log = read_log(connection, key)
    rows = 0
    left = {about: found for about, found in log.leaves.items() if found[1].kind in _BY_ROW}
    for where, leaf, fault in _rows(connection, key.key, log):
        rows += 1
        _compare(where, leaf, fault, left.pop(subject_of(leaf), None), log)
    for index, leaf in left.values():
        _find(log, f"log_entry {index}", f"what the leaf says ({leaf.kind}) is no longer in the database")
    rows += _check_sites(connection, log) + check_keys(connection, log) + _check_rounds(connection, log)
    return LogReport(log.tree.size, log.checkpoints, log.cosignatures, rows, tuple(log.findings))


def _compare(where: str, leaf: AnyLeaf, fault: str | None, logged: tuple[int, AnyLeaf] | None, log: ReadLog) -> None:
    if logged is None:
        _find(log, where, "the log has no leaf of it")
    elif logged[1] != leaf:
        _find(log, where, f"is not what leaf {logged[0]} says")
    if fault is not None:
        _find(log, where, fault)


def _rows(connection: Connection, server: VerifyKey, log: ReadLog) -> Iterator[_Row]:
    for row in connection.execute(select(plan)).mappings():
        yield f"plan {row['digest']}", PlanPublished(plan=row["digest"]), _plan_fault(row, server)
    for row in connection.execute(select(approval)).mappings():
        leaf = PlanApproved(site=row["site"], plan=row["plan"], approval=digest.of_bytes(bytes(row["envelope"])))
        yield f"approval {row['site']}, {row['plan']}", leaf, _approval_fault(row, log)
    for row in connection.execute(select(decision)).mappings():
        named = {"site": row["site"], "plan": row["plan"]}
        yield f"decision {row['seq']}", PlanDecided(**named, decision=digest.of_bytes(bytes(row["envelope"]))), _decision_fault(row, log)
    for row in connection.execute(_STATEMENTS).mappings():
        named = {"site": row["site"], "run": row["run"], "round_index": row["round_index"]}
        where = f"update_statement {row['run']}, {row['round_index']}, {row['site']}"
        yield where, StatementLogged(**named, statement=digest.of_bytes(bytes(row["envelope"]))), _statement_fault(row, log)
    for row in connection.execute(select(checkpoint)).mappings():
        where = f"checkpoint {row['run']}, {row['round_index']}"
        yield where, EncoderCommitted(run=row["run"], round_index=row["round_index"], state=row["state"]), None
    for row in connection.execute(select(release)).mappings():
        yield f"release {row['digest']}", Released(run=row["run"], release=row["digest"]), None


_STATEMENTS = select(
    update_statement,
    participation.c.state.label("noted_state"),
    participation.c.update_digest.label("noted_update"),
    participation.c.statement.label("noted_statement"),
    participation.c.epsilon_plan,
    participation.c.epsilon_total,
).outerjoin(
    participation,
    and_(
        participation.c.run == update_statement.c.run,
        participation.c.round_index == update_statement.c.round_index,
        participation.c.site == update_statement.c.site,
    ),
)


def _plan_fault(row: RowMapping, server: VerifyKey) -> str | None:
    where, canonical = f"plan {row['digest']}", bytes(row["canonical"])
    try:
        signed = open_plan(bytes(row["signed"]), server, where=where)
        held = (digest.of_bytes(canonical), signed.canonical_bytes(), signed.name) == (row["digest"], canonical, row["name"])
    except PathfedError as error:
        return error.what
    return None if held else "digest, name, canonical bytes and signed plan are not of one plan"


def _approval_fault(row: RowMapping, log: ReadLog) -> str | None:
    envelope = bytes(row["envelope"])
    try:
        said = Approval.from_bytes(envelope, _signer(envelope, row, log))
    except PathfedError as error:
        return error.what
    changed = [name for name, value in said.plain().items() if name in row and value != row[name]]
    return f"the approval says otherwise of {', '.join(changed)}" if changed else None


def _decision_fault(row: RowMapping, log: ReadLog) -> str | None:
    envelope = bytes(row["envelope"])
    try:
        said = Decision.from_bytes(envelope, _signer(envelope, row, log))
    except PathfedError as error:
        return error.what
    due = {**said.plain(), "digest": digest.of_bytes(envelope)}
    changed = [name for name, value in due.items() if name in row and value != row[name]]
    return f"the decision says otherwise of {', '.join(changed)}" if changed else None


def _statement_fault(row: RowMapping, log: ReadLog) -> str | None:
    envelope = bytes(row["envelope"])
    try:
        said = UpdateStatement.from_envelope(envelope, _signer(envelope, row, log))
    except PathfedError as error:
        return error.what
    name = digest.of_bytes(envelope)
    due = {
        "run": said.run,
        "round_index": said.round_index,
        "site": said.site,
        "digest": name,
        "noted_state": "admitted",
        "noted_update": said.update,
        "noted_statement": name,
        "epsilon_plan": said.epsilon_plan,
        "epsilon_total": said.epsilon_total,
    }
    changed = [column for column, value in due.items() if row[column] != value]
    return f"the statement says otherwise of {', '.join(changed)}" if changed else None


def _signer(envelope: bytes, row: RowMapping, log: ReadLog) -> VerifyKey:
    """The key of the row's site that the envelope says it is signed with."""
    named = dsse.parse(envelope).key_id
    for key in log.keys.get(row["site"], ()):
        if key.key_id == named:
            return key
    raise ProvenanceError(ErrorCode.RECORD_SIGNATURE, "signed with a key that the log does not name for the site", value=named)


def _check_sites(connection: Connection, log: ReadLog) -> int:
    """Compare each site's row with what its leaves lead to."""
    roll = log.tree.roll(log.tree.size)
    last = {member.site: (key, member in roll.members) for member, key in sorted({**roll.former, **roll.members}.items())}
    rows = connection.execute(select(site)).mappings().all()
    for row in rows:
        where, name = f"site {row['name']}", row["name"]
        if name not in last:
            _find(log, where, "the log has no leaf of it")
            continue
        key, enrolled = last.pop(name)
        admitted, revoked = (log.leaves.get((kind, name)) for kind in (SiteAdmitted.kind, SiteRevoked.kind))
        due = {
            "evidence_key": key.to_text(),
            "state": "enrolled" if enrolled else "revoked",
            "enrolled_at": admitted[1].plain()["at"] if admitted else None,
            "revoked_at": revoked[1].plain()["at"] if revoked and not enrolled else None,
        }
        changed = [column for column, value in due.items() if row[column] != value]
        if changed:
            _find(log, where, f"the log says otherwise of {', '.join(changed)}")
    for name in last:
        _find(log, f"site {name}", "is in the log and no longer in the database")
    return len(rows)


def _check_rounds(connection: Connection, log: ReadLog) -> int:
    """Compare each committed round with the states before and after it."""
    rows = connection.execute(select(round_.c.run, round_.c.round_index, round_.c.state, round_.c.base_state, round_.c.next_state)).all()
    for run, index, state, base, following in rows:
        states = [_state(log, run, number) for number in (index - 1, index)]
        due = (base, following) == tuple(states) if state == "committed" else states[1] is None and base == states[0]
        if not due:
            _find(log, f"round {run}, {index}", "the log says otherwise of the states before and after it")
    return len(rows)


def _state(log: ReadLog, run: str, index: int) -> str | None:
    found = log.leaves.get((EncoderCommitted.kind, index, run))
    return found[1].state if found and isinstance(found[1], EncoderCommitted) else None


def _find(log: ReadLog, row: str, what: str) -> None:
    log.findings.append(Finding(ErrorCode.LOG_MISMATCH, row, what))
