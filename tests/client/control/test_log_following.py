"""What a site does with the log that its server shows: cosign an honest one, and cry out about every other."""

import json
import shutil

import pytest
from control_server import ORIGIN, Log, Refused

from pathfed_client.control import log_following
from pathfed_client.io.ledger_head import site_ledger
from pathfed_client.io.site_records import SealedUpdate
from pathfed_client.io.site_store import SiteStore
from pathfed_common import digest
from pathfed_common.errors import PrivacyError
from pathfed_common.ids import RunName, SiteName
from pathfed_common.protocol import control_pb2 as pb
from pathfed_common.provenance import note
from pathfed_common.provenance.keys import SigningKey
from pathfed_common.provenance.log_checkpoint import Checkpoint, LogProof, log_key, open_proof, sign_checkpoint, site_key
from pathfed_common.provenance.log_leaves import KeyRotated, PlanApproved, PlanPublished, SiteAdmitted, StatementLogged, rotate_key
from pathfed_common.provenance.log_witness import Head
from pathfed_common.provenance.merkle import leaf_hash
from pathfed_common.provenance.note import Note, NoteSignature
from pathfed_common.units import UtcSeconds

RUN = RunName("run-1")


def published(number: int) -> bytes:
    return PlanPublished(plan=digest.of_value(number)).to_bytes()


def statement_leaf(envelope: bytes, site: str = "site-a") -> bytes:
    return StatementLogged(site=SiteName(site), run=RUN, round_index=1, statement=digest.of_bytes(envelope)).to_bytes()


def envelope(head: str) -> bytes:
    """A statement's envelope as far as the site database reads it."""
    from pathfed_common.provenance import dsse

    return dsse.seal(digest.canonical({"predicate": {"ledger_head": head}}), "statement", SigningKey.generate())


def sealed(statement: bytes) -> SealedUpdate:
    return SealedUpdate(run=RUN, round_index=1, statement=statement, update_path="updates/x", update=digest.of_bytes(b"u"), at=1.0)


def test_an_honest_log_is_cosigned_by_the_sites_evidence_key(site, server):
    server.log.leaves += [published(1), published(2)]
    assert site.agent.pass_once()
    ((size, line),) = server.cosigned
    assert size == 3
    signed = Note(Note.from_bytes(server.log.note()).text, (NoteSignature.from_line(line.decode()),))
    key = site_key(ORIGIN, SiteName("site-a"), site.home.evidence_key.public)
    assert note.verify(signed, [key])[0].timestamp == int(site.clock[0])
    assert site.codes() == []


def test_the_head_is_on_the_disk_before_the_cosignature_leaves(site, server):
    seen: list[Head | None] = []

    def look(request, honest):
        seen.append(site.home.log_head.read())
        return honest

    server.lies["Cosign"] = look
    server.log.leaves.append(published(1))
    site.agent.pass_once()
    assert [head.size for head in seen if head] == [2]


def test_a_cosignature_that_was_lost_is_sent_again_and_one_that_arrived_is_not(site, server):
    def lose(request, honest):
        raise Refused("PF419")

    server.lies["Cosign"] = lose
    assert not site.agent.pass_once()
    del server.lies["Cosign"]
    server.cosigned.clear()
    assert site.agent.pass_once()
    assert [size for size, _ in server.cosigned] == [1]
    site.clock[0] += 10
    for _ in range(2):
        assert site.agent.pass_once()
    assert len(server.cosigned) == 1


def test_each_own_leaf_gets_a_receipt_that_proves_it_offline(site, server):
    statement = envelope(digest.of_bytes(b"head"))
    site.store.put_sealed(sealed(statement))
    server.log.leaves += [published(1), statement_leaf(statement), statement_leaf(envelope(digest.of_bytes(b"x")), "site-b")]
    assert site.agent.pass_once()
    leaves = site.store.own_leaves()
    assert {json.loads(leaf.leaf)["kind"] for leaf in leaves} == {"site-admitted", "statement"}
    for leaf in leaves:
        assert leaf.receipt is not None
        proof = LogProof.from_bytes(leaf.receipt)
        assert open_proof(proof, leaf_hash(leaf.leaf), log_key(ORIGIN, server.key.public)).size == 4
        cosigners = [line.name for line in proof.checkpoint.signatures]
        assert cosigners == [ORIGIN, f"{ORIGIN}/site-a"], "co-signed by this site"
    assert site.codes() == []


def fork(server, count: int) -> Log:
    """Another history from the second leaf on."""
    return Log(server.key, [server.log.leaves[0], *(published(100 + number) for number in range(count))])


def cosigned_then(site, server, count: int = 3) -> int:
    server.log.leaves += [published(number) for number in range(count)]
    assert site.agent.pass_once()
    server.cosigned.clear()
    return len(server.log.leaves)


def refuses(site, server, code: str) -> None:
    """The site does not cosign, cries out with the code, and keeps the head that it had."""
    before = site.home.log_head.read()
    site.agent.pass_once()
    assert code in site.codes()
    assert server.cosigned == []
    assert site.home.log_head.read() == before


@pytest.mark.parametrize(("leaves", "what"), [(3, "same size"), (5, "larger"), (1, "smaller")])
def test_another_history_is_not_cosigned(site, server, leaves, what):
    cosigned_then(site, server)
    server.log = fork(server, leaves)
    refuses(site, server, "PF434")
    alarm = site.store.alarms()[0]
    assert alarm.evidence is not None
    assert open_checkpoint_of(alarm.evidence, server) == leaves + 1, "the server's own signature is kept as evidence"


def open_checkpoint_of(evidence: bytes, server) -> int:
    from pathfed_common.provenance.log_checkpoint import open_checkpoint

    return open_checkpoint(Note.from_bytes(evidence), log_key(ORIGIN, server.key.public)).size


def test_a_forked_log_shown_to_two_sites_can_never_be_joined_again(enrolled, server):
    """Each sees a history of its own for a while; whichever the server goes on with, one of them cries out."""
    first, second = enrolled("site-a"), enrolled("site-b")
    common = list(server.log.leaves)
    one, other = Log(server.key, [*common, published(1)]), Log(server.key, [*common, published(2)])
    for site, log in ((first, one), (second, other)):
        server.log = log
        assert site.agent.pass_once()
        assert site.codes() == []
    assert [size for size, _ in server.cosigned] == [3, 3]
    one.leaves.append(published(3))
    server.log = one
    server.cosigned.clear()
    assert first.agent.pass_once()
    assert first.codes() == []
    assert [size for size, _ in server.cosigned] == [4]
    server.cosigned.clear()
    refuses(second, server, "PF434")


def test_the_alarm_stands_for_good_and_an_honest_log_is_cosigned_again(site, server):
    cosigned_then(site, server)
    honest = server.log
    server.log = fork(server, 5)
    refuses(site, server, "PF434")
    honest.leaves.append(published(50))
    server.log = honest
    site.agent.pass_once()
    assert [size for size, _ in server.cosigned] == [5]
    assert site.codes() == ["PF434"]


def changed_checkpoint(change):
    def lie(request, honest):
        return change(honest) or honest

    return lie


def wrong_proof(reply):
    for index, value in enumerate(reply.consistency):
        reply.consistency[index] = bytes(32) if value else value


def no_proof(reply):
    del reply.consistency[:]


def other_text(reply):
    reply.note = reply.note.replace(b"\n5\n", b"\n6\n")


def no_note(reply):
    reply.note = b""


def garbage(reply):
    reply.note = b"garbage"


CHECKPOINTS = {
    "a wrong consistency proof": (wrong_proof, "PF434"),
    "no consistency proof": (no_proof, "PF434"),
    "a changed checkpoint": (other_text, "PF437"),
    "an empty log": (no_note, "PF434"),
    "no note": (garbage, "PF437"),
}


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_a_checkpoint_that_is_not_proven_is_not_cosigned(case, site, server):
    change, code = CHECKPOINTS[case]
    cosigned_then(site, server)
    server.log.leaves.append(published(9))
    server.lies["GetCheckpoint"] = changed_checkpoint(change)
    refuses(site, server, code)


def resigned(server, key=None, **changes):
    def lie(request, honest):
        shown = Checkpoint.from_text(Note.from_bytes(honest.note).text)
        values = {"origin": shown.origin, "size": shown.size, "root": shown.root, **changes}
        honest.note = sign_checkpoint(Checkpoint(**values), key or server.key).to_bytes()
        return honest

    return lie


@pytest.mark.parametrize("case", ["another key", "another origin", "extensions"])
def test_a_checkpoint_of_another_log_is_not_cosigned(case, site, server):
    cosigned_then(site, server)
    server.log.leaves.append(published(9))
    server.lies["GetCheckpoint"] = {
        "another key": resigned(server, SigningKey.generate()),
        "another origin": resigned(server, origin="pathfed/other"),
        "extensions": resigned(server, extensions=("more",)),
    }[case]
    refuses(site, server, "PF437")


def test_a_server_that_itself_says_its_log_is_too_small_is_cried_out_about(site, server):
    cosigned_then(site, server)
    server.log.leaves.append(published(9))

    def behind(request, honest):
        raise Refused("PF608")

    server.lies["GetCheckpoint"] = behind
    refuses(site, server, "PF434")


@pytest.mark.parametrize("case", ["a changed leaf", "too few", "none", "too many"])
def test_leaves_that_are_not_the_checkpoints_are_found(case, site, server):
    cosigned_then(site, server)
    server.log.leaves += [published(9), published(10)]
    shown = {
        "a changed leaf": lambda leaves: [leaves[0], published(77)],
        "too few": lambda leaves: leaves[:1] if len(leaves) == 2 else [],
        "none": lambda leaves: [],
        "too many": lambda leaves: [*leaves, published(78)],
    }[case]
    server.lies["GetLeaves"] = lambda request, honest: pb.GetLeavesReply(leaves=shown(list(honest.leaves)))
    refuses(site, server, "PF434")


def test_leaves_come_in_pages(site, server, monkeypatch):
    monkeypatch.setattr(log_following, "_PAGE", 2)
    cosigned_then(site, server, 6)
    assert site.codes() == []
    assert server.calls.count("GetLeaves") == 4


def give_word(site, server) -> bytes:
    given = b"signed approval"
    leaf = PlanApproved(site=SiteName("site-a"), plan=digest.of_bytes(b"plan"), approval=digest.of_bytes(given)).to_bytes()
    site.store.add_word(given, leaf, site.clock[0])
    assert site.agent.pass_once()
    assert server.words == [given]
    return leaf


def test_what_the_server_acknowledged_must_come_into_the_log_within_the_patience(site, server):
    leaf = give_word(site, server)
    assert site.codes() == [], "it has time"
    assert len(server.cosigned) == 1
    server.cosigned.clear()
    site.clock[0] += log_following.PATIENCE_S + 1
    server.log.leaves.append(published(1))
    refuses(site, server, "PF435")
    server.log.leaves.append(leaf)
    assert site.agent.pass_once()
    assert site.codes() == [], "the alarm ends when the leaf is in"
    assert [alarm.code.value for alarm in site.store.alarms(standing=False)] == ["PF435"]
    assert [size for size, _ in server.cosigned] == [3]
    assert all(known.receipt for known in site.store.own_leaves())


@pytest.mark.parametrize("case", ["another index", "a wrong proof", "no proof"])
def test_a_false_proof_is_no_proof(case, site, server):
    leaf = give_word(site, server)
    server.cosigned.clear()
    site.clock[0] += log_following.PATIENCE_S + 1
    server.log.leaves += [published(1), leaf, published(2)]

    def lie(request, honest):
        changed = {
            "another index": pb.GetInclusionReply(index=honest.index + 1, proof=honest.proof),
            "a wrong proof": pb.GetInclusionReply(index=honest.index, proof=[bytes(32) for _ in honest.proof]),
            "no proof": pb.GetInclusionReply(index=honest.index),
        }
        return changed[case]

    server.lies["GetInclusion"] = lie
    refuses(site, server, "PF435")
    assert all(known.receipt is None for known in site.store.own_leaves() if known.leaf == leaf)


def foreign_rotation() -> KeyRotated:
    return rotate_key(SiteName("site-a"), SigningKey.generate(), SigningKey.generate(), UtcSeconds(1.0))


FOREIGN = {
    "statement": statement_leaf(b"never made"),
    "approval": PlanApproved(site=SiteName("site-a"), plan=digest.of_bytes(b"p"), approval=digest.of_bytes(b"never")).to_bytes(),
    "rotation": foreign_rotation().to_bytes(),
    "admission": SiteAdmitted(site=SiteName("site-a"), evidence_key=SigningKey.generate().public, at=UtcSeconds(1.0)).to_bytes(),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_a_leaf_in_this_sites_name_that_it_did_not_make_is_cried_out_about(what, site, server):
    server.log.leaves.append(FOREIGN[what])
    site.agent.pass_once()
    assert site.codes() == ["PF438"]
    assert site.store.alarms()[0].evidence == FOREIGN[what]


def test_a_leaf_of_no_known_kind_is_cried_out_about(site, server):
    server.log.leaves.append(b'{"kind":"other","version":1}')
    site.agent.pass_once()
    assert site.codes() == ["PF437"]


def test_a_disk_that_was_restored_whole_is_found_by_the_log_and_the_ledger_refuses(site, server, tmp_path):
    """Database, ledger head and log head are all put back: only the log knows better."""
    site.agent.pass_once()
    site.close()
    shutil.copytree(site.home.root, tmp_path / "backup")
    site = site.reopened()
    statement = envelope(digest.of_bytes(b"head"))
    site.store.put_sealed(sealed(statement))
    server.log.leaves.append(statement_leaf(statement))
    assert site.agent.pass_once()
    assert site.codes() == []
    site.close()
    shutil.rmtree(site.home.root)
    shutil.copytree(tmp_path / "backup", site.home.root)
    restored = site.reopened()
    try:
        restored.agent.pass_once()
        assert restored.codes() == ["PF438"]
        home = restored.home
        with pytest.raises(PrivacyError, match="PF309"):
            site_ledger(restored.store, home.evidence_key, home.policy, home.run_secrets).entries()
    finally:
        restored.close()


def test_a_home_that_lost_what_it_cosigned_cosigns_nothing(site, server):
    cosigned_then(site, server)
    server.log.leaves.append(published(9))
    (site.home.run_secrets / "log-head").unlink()
    site.agent.pass_once()
    assert site.codes() == ["PF436"]
    assert server.cosigned == []
    again = site.reopened()
    again.agent.pass_once()
    assert server.cosigned == []
    again.close()


@pytest.mark.parametrize(
    "text", ["", "{}", '{"size":-1,"root":""}', '{"size":3,"root":""}', '{"size":0,"root":"00"}', '{"size":1,"root":"zz"}']
)
def test_a_changed_head_file_is_a_lost_one(text, site, server):
    (site.home.run_secrets / "log-head").write_text(text)
    site.agent.pass_once()
    assert site.codes() == ["PF436"]
    assert server.cosigned == []


def test_a_head_never_goes_back(site):
    site.home.log_head.keep(Head(5, bytes(32)))
    with pytest.raises(ValueError, match="after one of 5"):
        site.home.log_head.keep(Head(4, bytes(32)))


def test_what_was_read_of_the_log_is_read_again_where_it_cannot_be_right(site, server):
    site.store.set_facts({"log_read": "nonsense"})
    cosigned_then(site, server)
    assert site.codes() == []
    with SiteStore(site.home.database) as store:
        store.set_facts({"log_read": "3 " + "00" * 32 + " " + "11" * 32})
    server.log.leaves.append(published(9))
    refuses(site, server, "PF434")
    site.agent.pass_once()
    assert [size for size, _ in server.cosigned] == [5]
