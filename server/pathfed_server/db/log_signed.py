"""Whether the log in the database is the one that was signed: its entries, its checkpoints, and the sites' cosignatures."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from sqlalchemy import Connection, select

from pathfed_common.errors import ErrorCode, PathfedError
from pathfed_common.ids import SiteName
from pathfed_common.provenance import note
from pathfed_common.provenance.keys import VerifyKey
from pathfed_common.provenance.log_checkpoint import open_checkpoint, site_key
from pathfed_common.provenance.log_leaves import AnyLeaf, KeyRotated, SiteAdmitted, read_leaf
from pathfed_common.provenance.merkle import leaf_hash
from pathfed_common.provenance.note import Note, NoteKey, NoteSignature
from pathfed_server.db.schema import cosignature, log_checkpoint, log_entry
from pathfed_server.provenance.log_tree import LogTree

_BESIDE = ("at", "evidence_key", "old_signature", "new_signature", "approval", "statement", "state")
#: What a leaf is about: no two leaves of a log have the same, but for admissions and revocations of a name that came back.
Subject = tuple[str | int, ...]


@dataclass(frozen=True)
class Finding:
    """One thing that does not hold.

    Attributes:
        code: PF606, a row and its leaf disagree; PF607, the log is not the one that was signed.
        row: which row, for people.
        what: what is wrong with it.
    """

    code: ErrorCode
    row: str
    what: str


@dataclass
class ReadLog:
    """The log as it was read.

    Attributes:
        tree: its tree, as far as its leaves may follow each other.
        leaves: its leaves by what they are about, with their indices.
        keys: every evidence key that the log names for a site.
        checkpoints: signed checkpoints found.
        cosignatures: cosignatures found.
        findings: what does not hold.
    """

    tree: LogTree = field(default_factory=LogTree)
    leaves: dict[Subject, tuple[int, AnyLeaf]] = field(default_factory=dict)
    keys: dict[SiteName, set[VerifyKey]] = field(default_factory=dict)
    checkpoints: int = 0
    cosignatures: int = 0
    findings: list[Finding] = field(default_factory=list)

    def find(self, row: str, what: str) -> None:
        """Note that the log is not the one that was signed."""
        self.findings.append(Finding(ErrorCode.LOG_DAMAGED, row, what))


def read_log(connection: Connection, key: NoteKey) -> ReadLog:
    """Read the log, its checkpoints and cosignatures, and say what does not hold.

    Args:
        connection: within one transaction that sees one state.
        key: the log's key; its name is the origin.
    """
    found = ReadLog()
    _read_entries(connection, found)
    signed = dict(_checkpoints(connection, key, found))
    _check_cosignatures(connection, key, signed, found)
    return found


def subject_of(leaf: AnyLeaf) -> Subject:
    """What a leaf is about: its kind and its fields but for digests of envelopes and states, keys, signatures and times."""
    beside = {
        "at",
        "evidence_key",
        "old_signature",
        "new_signature",
        "approval",
        "statement",
        "state",
        "run" if leaf.kind == "released" else "",
    }
    return leaf.kind, *(value for name, value in sorted(leaf.plain().items()) if name not in beside)


def _read_entries(connection: Connection, found: ReadLog) -> None:
    query = select(log_entry).order_by(log_entry.c.leaf_index)
    for place, row in enumerate(connection.execute(query).mappings()):
        data, where = bytes(row["leaf"]), f"log_entry {row['leaf_index']}"
        try:
            leaf = read_leaf(data, where=where)
        except PathfedError as error:
            found.find(where, error.what)
            return
        if (row["leaf_index"], row["kind"], bytes(row["leaf_hash"])) != (place, leaf.kind, leaf_hash(data)):
            found.find(where, f"place, kind or hash are not the leaf's: {place}, {leaf.kind}, {leaf_hash(data).hex()}")
        if not _keep(place, leaf, data, found):
            return


def _keep(place: int, leaf: AnyLeaf, data: bytes, found: ReadLog) -> bool:
    """Take a leaf into the tree; whether it may follow."""
    about, where = subject_of(leaf), f"log_entry {place}"
    if about in found.leaves and not leaf.kind.startswith("site-"):
        found.find(where, f"says again what leaf {found.leaves[about][0]} says")
    found.leaves[about] = (place, leaf)
    if isinstance(leaf, SiteAdmitted | KeyRotated):
        found.keys.setdefault(leaf.site, set()).add(leaf.evidence_key if isinstance(leaf, SiteAdmitted) else leaf.new_key)
    try:
        found.tree.append([data])
    except PathfedError as error:
        found.find(where, error.what)
        return False
    return True


def _checkpoints(connection: Connection, key: NoteKey, found: ReadLog) -> Iterator[tuple[int, str]]:
    """Sizes and texts of the checkpoints that hold."""
    for size, data in connection.execute(select(log_checkpoint.c.size, log_checkpoint.c.note).order_by(log_checkpoint.c.size)):
        found.checkpoints += 1
        where = f"log_checkpoint {size}"
        try:
            signed = Note.from_bytes(bytes(data), where=where)
            checkpoint = open_checkpoint(signed, key, where=where)
        except PathfedError as error:
            found.find(where, error.what)
            continue
        if checkpoint.size != size or len(signed.signatures) != 1:
            found.find(where, "the note is of another size, or has further lines")
        elif size > found.tree.size or checkpoint.root != found.tree.root(size):
            found.find(where, "the leaves are not those that were signed")
        else:
            yield size, signed.text


def _check_cosignatures(connection: Connection, key: NoteKey, signed: dict[int, str], found: ReadLog) -> None:
    query = select(cosignature.c.size, cosignature.c.site, cosignature.c.line).order_by(cosignature.c.size, cosignature.c.site)
    for size, site, line in connection.execute(query):
        found.cosignatures += 1
        where = f"cosignature {size}, {site}"
        enrolled = found.tree.roll(size).enrolled if size in signed else {}
        if site not in enrolled:
            found.find(where, "there is no such checkpoint, or the site is not enrolled in it")
            continue
        try:
            given = NoteSignature.from_line(bytes(line).decode("utf-8"))
            note.verify(Note(signed[size], (given,)), [site_key(key.name, site, enrolled[site])], where=where)
        except (PathfedError, ValueError):
            found.find(where, "the line is not the site's cosignature of this checkpoint")
