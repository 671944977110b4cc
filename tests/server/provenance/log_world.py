"""A log in a real database, and sites that watch it the way a site does."""

import hashlib
from collections.abc import Collection
from dataclasses import dataclass, field

from sqlalchemy import insert

from pathfed_common import digest
from pathfed_common.ids import RunName, SiteName
from pathfed_common.provenance import note
from pathfed_common.provenance.keys import SigningKey
from pathfed_common.provenance.log_checkpoint import cosign_checkpoint, origin_of
from pathfed_common.provenance.log_leaves import AnyLeaf, StatementLogged, read_leaf
from pathfed_common.provenance.log_witness import Head, Judgement, PlacedProof, judge
from pathfed_common.provenance.merkle import leaf_hash
from pathfed_common.provenance.note import Note
from pathfed_server.db.log_store import append_leaves
from pathfed_server.db.schema import log_entry
from pathfed_server.db.sql_store import SqlStore
from pathfed_server.provenance.log_keeper import LogKeeper
from pathfed_server.provenance.log_ports import LogService

ORIGIN = origin_of("test")
SERVER = SigningKey.generate()
RUN = RunName("run-1")
AT = 1_795_460_462.123457


def plan_digest(name: str) -> digest.Digest:
    return digest.of_bytes(name.encode())


def statement_digest(number: int) -> digest.Digest:
    return digest.of_bytes(str(number).encode())


def statement(number: int) -> StatementLogged:
    return StatementLogged(site=SiteName("a"), run=RUN, round_index=1 + number, statement=statement_digest(number))


def append(store: SqlStore, *leaves: AnyLeaf) -> None:
    with store._write() as connection:
        append_leaves(connection, leaves)


def append_many(store: SqlStore, count: int) -> None:
    """What `append` does with so many statements, faster; for an empty log."""
    plain = statement(0).to_bytes()
    blank = statement(0).statement.encode()
    made = [plain.replace(blank, statement_digest(number).encode()).replace(b":1,", b":%d," % (1 + number)) for number in range(count)]
    assert made[7] == statement(7).to_bytes()
    rows = [{"leaf_index": index, "kind": "statement", "leaf": leaf, "leaf_hash": leaf_hash(leaf)} for index, leaf in enumerate(made)]
    with store._write() as connection:
        connection.execute(insert(log_entry), rows)


def leaves_of(store: SqlStore) -> list[AnyLeaf]:
    return [read_leaf(leaf) for leaf in store.log_leaves(0, store.log_size())]


def keeper(store: SqlStore, **settings: float) -> LogKeeper:
    return LogKeeper(store, SERVER, ORIGIN, **{"least_interval_s": 0.0, **settings})  # type: ignore[arg-type]


@dataclass
class Watcher:
    """A site: its key, and what it last cosigned."""

    name: SiteName
    key: SigningKey = field(default_factory=SigningKey.generate)
    last: Head | None = None

    def enrol(self, store: SqlStore) -> None:
        store.add_site(
            self.name,
            evidence_key=self.key.public.to_text(),
            flower_key=hashlib.sha256(self.key.public.to_text().encode()).hexdigest(),
            at=AT,
        )

    def look(self, log: LogService, own: Collection[bytes] = ()) -> Judgement:
        """Judge the log's latest checkpoint."""
        served = log.checkpoint(self.last.size if self.last else 0)
        proofs = {}
        for leaf in own:
            found = log.inclusion(leaf_hash(leaf), served.size)
            proofs[leaf] = PlacedProof(found.index, found.proof)
        key = note.NoteKey(ORIGIN, note.KeyKind.NOTE, SERVER.public)
        return judge(Note.from_bytes(served.note), key, last=self.last, consistency=served.consistency, own=own, proofs=proofs)

    def cosign(self, log: LogService, own: Collection[bytes] = ()) -> int:
        """Cosign the log's latest checkpoint; its size."""
        judged = self.look(log, own)
        assert judged.checkpoint is not None, judged.refusal
        self.last = judged.head
        line = cosign_checkpoint(judged.checkpoint, self.name, self.key, at=int(AT)).to_line().encode()
        log.cosign(self.name, judged.checkpoint.size, line)
        return judged.checkpoint.size


def watchers(*names: str) -> list[Watcher]:
    return [Watcher(SiteName(name)) for name in names]
